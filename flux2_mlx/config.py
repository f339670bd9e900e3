"""Geometry of the networks and the one table of model variants.

Field names follow the diffusers and transformers `config.json` files. Sources: the FLUX.2 reference code
(black-forest-labs/flux2) and the published configurations.
"""

import dataclasses
import math
import reprlib
from dataclasses import dataclass
from typing import Any, Self, get_args, get_origin

from .errors import CheckpointError, InputError

QUANTIZATIONS = ("bf16", "qint8", "qint6", "mixed4", "qint4")  # from most bits to fewest
DTYPES = ("float32", "bfloat16", "float16")
TEXT_MODELS = ("qwen3", "mistral3")
# Several times what any FLUX.2 has, so that no config can ask for more than memory holds before files are looked at.
# Whole numbers from 2^63 on are none for MLX.
MAX_LAYERS = 256
MAX_SIZE = 2**24
_MAX_NUMBER = 1e15  # float32 still holds its square


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def _check_value(name: str, kind: Any, value: Any) -> None:
    """Raise CheckpointError if `value`, read from a file, is not of the `kind` that a field states, or out of range."""
    if get_origin(kind) is tuple:
        sizes = get_args(kind)
        fixed = sizes[-1] is not Ellipsis
        good = isinstance(value, tuple) and (len(value) == len(sizes) if fixed else 0 < len(value) <= MAX_LAYERS)
        _check(good, f"{name} is {reprlib.repr(value)}, not a list of {len(sizes) if fixed else 'some'} whole numbers")
        for item in value:
            _check_value(f"an item of {name}", int, item)
    elif get_args(kind):  # of a type or None
        if value is not None:
            _check_value(name, get_args(kind)[0], value)
    elif kind is int:
        least, most = (0, MAX_LAYERS) if name.startswith("num_") and name.endswith("layers") else (1, MAX_SIZE)
        good = type(value) is int and least <= value <= most
        _check(good, f"{name} is {reprlib.repr(value)}, not a whole number from {least} to {most}")
    elif kind is float:
        good = type(value) in (int, float) and math.isfinite(value) and 0 < value <= _MAX_NUMBER
        _check(good, f"{name} is {reprlib.repr(value)}, not a number above 0")
    else:
        what = {bool: "true or false", str: "text"}[kind]
        _check(type(value) is kind, f"{name} is {reprlib.repr(value)}, not {what}")


@dataclass(frozen=True)
class Config:
    """What the geometries share: reading and writing `config.json`."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a parsed `config.json`; keys that are no field are ignored, lists become tuples.

        Raises:
            CheckpointError: a key is missing, or its value is of another type or out of range.
        """
        kept = {}
        for field in dataclasses.fields(cls):
            if field.name in values:
                value = values[field.name]
                kept[field.name] = tuple(value) if isinstance(value, list) else value
                _check_value(field.name, field.type, kept[field.name])
            else:
                _check(field.default is not dataclasses.MISSING, f"missing key {field.name!r}")
        return cls(**kept)

    def check_known(self, values: dict[str, Any]) -> None:
        """CheckpointError if `values`, from a file of ours, have keys that are no field."""
        unknown = sorted(values.keys() - self.to_dict().keys())
        _check(not unknown, f"unknown keys {reprlib.repr(unknown)}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def admits(self, found: Any) -> bool:
        """Whether a network of the geometry `found` can be the one of this geometry in a model of the table."""
        return bool(self == found)


# Of a model's networks by name: each is of the class that its row in `components.py` says.
Geometries = dict[str, Any]


@dataclass(frozen=True)
class TransformerConfig(Config):
    """Geometry of the MMDiT (diffusers `Flux2Transformer2DModel`)."""

    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    joint_attention_dim: int
    attention_head_dim: int = 128
    in_channels: int = 128
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    def __post_init__(self) -> None:
        _check(
            sum(self.axes_dims_rope) == self.attention_head_dim and all(d % 2 == 0 for d in self.axes_dims_rope),
            f"transformer: RoPE axes {self.axes_dims_rope} must be even and add up to the head dimension "
            f"{self.attention_head_dim}",
        )
        _check(len(self.axes_dims_rope) == 4, f"transformer: RoPE needs 4 axes, got {self.axes_dims_rope}")
        _check(self.in_channels % 4 == 0, f"transformer: in_channels {self.in_channels} is not a multiple of 4")
        channels = self.timestep_guidance_channels
        _check(channels % 2 == 0, f"transformer: timestep_guidance_channels {channels} is not even")

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


@dataclass(frozen=True)
class VAEConfig(Config):
    """Geometry of the autoencoder (diffusers `AutoencoderKLFlux2`)."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    batch_norm_eps: float = 1e-4
    patch_size: tuple[int, int] = (2, 2)

    def __post_init__(self) -> None:
        _check(self.patch_size == (2, 2), f"vae: patch_size must be (2, 2), got {self.patch_size}")
        for channels in (*self.block_out_channels, *self.decoder_channels):
            _check(
                channels % self.norm_num_groups == 0,
                f"vae: {channels} channels do not divide into {self.norm_num_groups} groups",
            )
        _check(
            len(self.decoder_channels) == len(self.block_out_channels),
            f"vae: encoder and decoder differ in depth: {self.block_out_channels}, {self.decoder_channels}",
        )

    def admits(self, found: Any) -> bool:
        """The same but for the decoder, which may have been made narrower."""
        return bool(self == dataclasses.replace(found, decoder_block_out_channels=None))

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def scale_factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def token_channels(self) -> int:
        """Channels of one image token: a 2×2 patch of latents."""
        return 4 * self.latent_channels

    @property
    def token_size(self) -> int:
        """Pixels per image token along one side."""
        return 2 * self.scale_factor


@dataclass(frozen=True)
class TextConfig(Config):
    """Geometry of a text encoder.

    `num_hidden_layers` counts the layers up to the last of `out_layers`, the hidden states that the transformer reads
    (k = residual stream after k layers). `num_later_layers` are the further ones, which only generating text needs.
    With `final_norm` the last state is taken after the model's own norm, as transformers does at its last layer.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    out_layers: tuple[int, ...]
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    num_later_layers: int = 0
    tie_word_embeddings: bool = False
    final_norm: bool = False

    def __post_init__(self) -> None:
        kinds = ", ".join(TEXT_MODELS)
        _check(self.model_type in TEXT_MODELS, f"text encoder: {reprlib.repr(self.model_type)} is none of {kinds}")
        _check(
            all(a < b for a, b in zip((0, *self.out_layers), self.out_layers, strict=False)),
            f"text encoder: the states {self.out_layers} are not in ascending order",
        )
        _check(self.head_dim % 2 == 0, f"text encoder: the head dimension {self.head_dim} is not even")
        _check(
            max(self.out_layers) == self.num_hidden_layers,
            f"text encoder: states {self.out_layers} need {max(self.out_layers)} layers, not {self.num_hidden_layers}",
        )
        _check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"text encoder: {self.num_attention_heads} heads do not divide into {self.num_key_value_heads} groups",
        )

    def admits(self, found: Any) -> bool:
        """The same kind and widths: the model may have been cut to the layers that are needed, or given other words."""
        widths = ("model_type", "hidden_size", "intermediate_size")
        return all(getattr(self, name) == getattr(found, name) for name in widths)

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised head by head."""
        return self.model_type == "qwen3"

    @property
    def output_size(self) -> int:
        """Features of one text token for the transformer."""
        return len(self.out_layers) * self.hidden_size


@dataclass(frozen=True)
class VisionConfig(Config):
    """Geometry of Mistral's vision tower and projector (Pixtral). `image_size` is the longest side in pixels."""

    text_hidden_size: int
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    patch_size: int = 14
    image_size: int = 1540
    spatial_merge_size: int = 2
    rope_theta: float = 1e4
    projector_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check(
            self.hidden_size % (4 * self.num_attention_heads) == 0,
            f"vision: {self.hidden_size} features do not divide into {self.num_attention_heads} heads of a multiple "
            "of 4",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def cell_size(self) -> int:
        """Pixels along one side of what becomes one `[IMG]` token."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class Variant:
    """One model: where it comes from, its geometry, its defaults and its licence.

    `kv_cache` marks the model that was trained to see references at the first step only. `size` is the default
    width and height in pixels, `max_sequence_length` the text tokens that the transformer sees, `max_image_tokens`
    what is recommended for the image and its references together.
    """

    name: str
    repo: str | None
    transformer: TransformerConfig
    text: TextConfig
    vae: VAEConfig = VAEConfig()
    vision: VisionConfig | None = None
    steps: int = 4
    guidance: float = 1.0
    distilled: bool = True
    kv_cache: bool = False
    commercial_use: bool = False
    gated: bool = True
    size: int = 1024
    max_sequence_length: int = 512
    max_image_tokens: int = 16_384

    def __post_init__(self) -> None:
        _check(
            self.transformer.joint_attention_dim == self.text.output_size,
            f"{self.name}: the transformer takes {self.transformer.joint_attention_dim} text features, "
            f"the encoder gives {self.text.output_size}",
        )
        _check(
            self.vision is None or self.vision.text_hidden_size == self.text.hidden_size,
            f"{self.name}: the vision tower and the text encoder differ in width",
        )
        _check(
            self.transformer.in_channels == self.vae.token_channels,
            f"{self.name}: the transformer takes {self.transformer.in_channels} channels a token, "
            f"the VAE gives {self.vae.token_channels}",
        )

    @property
    def uses_cfg(self) -> bool:
        """Guidance is a second pass with the empty prompt (neither embedded nor distilled away)."""
        return not (self.distilled or self.transformer.guidance_embeds)

    @property
    def licence(self) -> str:
        return "Apache-2.0" if self.commercial_use else "FLUX non-commercial"


_QWEN3_4B = TextConfig("qwen3", 2560, 9728, 27, 151936, (9, 18, 27), num_later_layers=9, tie_word_embeddings=True)
_QWEN3_8B = TextConfig("qwen3", 4096, 12288, 27, 151936, (9, 18, 27), num_later_layers=9)
_MISTRAL = TextConfig(
    "mistral3", 5120, 32768, 30, 131072, (10, 20, 30), rms_norm_eps=1e-5, rope_theta=1e9, num_later_layers=10
)
_4B = TransformerConfig(5, 20, 24, 7680, guidance_embeds=False)
_9B = TransformerConfig(8, 24, 32, 12288, guidance_embeds=False)
_DEV = TransformerConfig(8, 48, 48, 15360)
# Five and ten references of 1024² pixels beside an image of that size.
_9B_TOKENS, _DEV_TOKENS = 24_576, 45_056
_BFL = "black-forest-labs/FLUX.2-"

_DEMO = Variant(
    "demo",
    None,
    TransformerConfig(2, 4, 4, 384, 32, 32, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False),
    TextConfig("qwen3", 128, 384, 3, 480, (1, 2, 3), 4, 2, 32, rope_theta=1e4),
    VAEConfig((16, 32, 64, 64), None, 1, 8, 8),
    steps=8,
    size=128,
    max_sequence_length=48,
    max_image_tokens=128,
    commercial_use=True,
    gated=False,
)

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _DEMO,
        Variant("klein-4b", _BFL + "klein-4B", _4B, _QWEN3_4B, commercial_use=True, gated=False),
        Variant(
            "klein-base-4b",
            _BFL + "klein-base-4B",
            _4B,
            _QWEN3_4B,
            steps=50,
            guidance=4.0,
            distilled=False,
            commercial_use=True,
            gated=False,
        ),
        Variant("klein-9b", _BFL + "klein-9B", _9B, _QWEN3_8B, max_image_tokens=_9B_TOKENS),
        Variant(
            "klein-base-9b",
            _BFL + "klein-base-9B",
            _9B,
            _QWEN3_8B,
            steps=50,
            guidance=4.0,
            distilled=False,
            max_image_tokens=_9B_TOKENS,
        ),
        Variant("klein-9b-kv", _BFL + "klein-9b-kv", _9B, _QWEN3_8B, kv_cache=True, max_image_tokens=_9B_TOKENS),
        Variant(
            "dev",
            _BFL + "dev",
            _DEV,
            _MISTRAL,
            vision=VisionConfig(5120),
            steps=50,
            guidance=4.0,
            max_image_tokens=_DEV_TOKENS,
        ),
    )
}


def variant_named(name: str) -> Variant:
    """The row of the table whose name is exactly `name`; InputError lists the names if there is none."""
    if name not in VARIANTS:
        raise InputError(f"unknown model {name!r}; choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def check_quant(quant: str) -> str:
    """`quant` itself; InputError if it is not one of `QUANTIZATIONS`."""
    if quant not in QUANTIZATIONS:
        raise InputError(f"unknown quantization {quant!r}; choose one of {', '.join(QUANTIZATIONS)}")
    return quant
