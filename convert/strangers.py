"""What tensors are that are no model of this program, by their names: other models, adapters, and parts of them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flux2_mlx.config import VARIANTS
from flux2_mlx.weights import TensorInfo

from .others import other_model

_Infos = Mapping[str, TensorInfo]
_ONLY = "only FLUX.2 is run here; give one of its models"
_ENCODER = "FLUX.2 reads prompts with Qwen3 (klein) or Mistral Small 3.2 (dev); give that"
_CONTROL = "ControlNets can't be used; give references in their place"
# What may stand before the names of a model.
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "unet.", "control_model.")
# What it is, what to do, and sets of names each of which proves it. The first that fits counts.
_STRANGERS: tuple[tuple[str, str, tuple[tuple[str, ...], ...]], ...] = (
    (
        "a ControlNet for FLUX.2",
        _CONTROL,
        (("control_img_in.weight", "control_transformer_blocks.0.before_proj.weight"),),
    ),
    (
        "a ControlNet",
        _CONTROL,
        (
            ("controlnet_x_embedder.weight",),
            ("controlnet_blocks.0.weight",),
            ("controlnet_down_blocks.0.weight",),
            ("control_img_in.weight",),
            ("zero_convs.0.0.weight",),
        ),
    ),
    ("FLUX.1 Redux", _ONLY, (("redux_up.weight", "redux_down.weight"),)),
    ("Chroma", _ONLY, (("distilled_guidance_layer.in_proj.weight",),)),
    (
        "HunyuanVideo",
        _ONLY,
        (
            ("txt_in.individual_token_refiner.blocks.0.norm1.weight",),
            ("context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight",),
        ),
    ),
    (
        "FLUX.1 dev",
        _ONLY,
        (
            ("double_blocks.0.img_mod.lin.weight", "guidance_in.in_layer.weight"),
            ("single_transformer_blocks.0.proj_mlp.weight", "time_text_embed.guidance_embedder.linear_1.weight"),
        ),
    ),
    (
        "FLUX.1 schnell",
        _ONLY,
        (
            ("double_blocks.0.img_mod.lin.weight",),
            ("single_transformer_blocks.0.proj_mlp.weight", "transformer_blocks.0.norm1_context.linear.weight"),
        ),
    ),
    (
        "Stable Diffusion 3",
        _ONLY,
        (
            ("joint_blocks.0.context_block.attn.qkv.weight",),
            ("pos_embed.proj.weight", "transformer_blocks.0.attn.add_k_proj.weight"),
        ),
    ),
    ("Qwen-Image", _ONLY, (("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"),)),
    ("Z-Image", _ONLY, (("cap_pad_token", "context_refiner.0.attention_norm1.weight"),)),
    (
        "Lumina 2",
        _ONLY,
        (
            ("cap_embedder.1.weight", "context_refiner.0.attention_norm1.weight"),
            ("time_caption_embed.caption_embedder.1.weight",),
        ),
    ),
    (
        "Wan",
        _ONLY,
        (
            ("patch_embedding.weight", "blocks.0.cross_attn.k.weight"),
            ("patch_embedding.weight", "condition_embedder.time_proj.weight"),
        ),
    ),
    (
        "Stable Diffusion XL",
        _ONLY,
        (
            ("label_emb.0.0.weight", "input_blocks.0.0.weight"),
            ("add_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"),
        ),
    ),
    (
        "Stable Diffusion 1 or 2",
        _ONLY,
        (
            ("input_blocks.0.0.weight", "middle_block.1.norm.weight"),
            ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",),
        ),
    ),
    (
        "a T5 text encoder",
        _ENCODER,
        (("encoder.block.0.layer.0.SelfAttention.q.weight",), ("enc.blk.0.attn_q.weight",)),
    ),
    (
        "a CLIP text encoder",
        _ENCODER,
        (
            ("text_model.encoder.layers.0.self_attn.q_proj.weight",),
            ("embeddings.token_embedding.weight", "encoder.layers.0.self_attn.out_proj.weight"),
        ),
    ),
    (
        "a CLIP image encoder",
        _ENCODER,
        (
            ("vision_model.encoder.layers.0.self_attn.q_proj.weight",),
            ("embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.out_proj.weight"),
        ),
    ),
    (
        "Qwen3-VL",
        _ENCODER,
        (
            ("language_model.layers.0.self_attn.q_norm.weight",),
            ("language_model.model.layers.0.self_attn.q_norm.weight",),
        ),
    ),
    ("Qwen2.5-VL", _ENCODER, (("visual.blocks.0.attn.qkv.weight",),)),
    ("Qwen2 or Qwen2.5", _ENCODER, (("layers.0.self_attn.q_proj.bias",), ("blk.0.attn_q.bias",))),
    ("Gemma", _ENCODER, (("layers.0.pre_feedforward_layernorm.weight",),)),
    (
        "a Mistral in its maker's own naming",
        "give it as transformers saves it: the repository's files called model-*.safetensors",
        (("tok_embeddings.weight", "layers.0.attention.wq.weight"),),
    ),
    ("a vision tower of llama.cpp", "give the text model's file, or the folder", (("v.blk.0.attn_q.weight",),)),
    (
        "TAESD, a tiny autoencoder",
        "give FLUX.2's own VAE",
        (
            ("1.weight", "3.conv.0.weight"),
            ("0.weight", "1.conv.0.weight"),
            ("decoder.layers.0.weight", "encoder.layers.0.weight"),
        ),
    ),
    (
        "an upscaler",
        "upscalers can't be used",
        (
            ("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"),
            ("conv_first.weight", "body.0.rdb1.conv1.weight"),
            ("conv_first.weight", "conv_after_body.weight"),
        ),
    ),
)
# What the names of an adapter's first factor end with, and the kind that it is of.
_FACTORS = (
    (re.compile(r"(.+?)\.lora_(?:A(?:\.[^.]+)?|down)\.weight"), "LoRA"),
    (re.compile(r"(.+?)\.lokr_w1(?:_a)?"), "LoKr"),
    (re.compile(r"(.+?)\.hada_w1_a"), "LoHa"),
)
_OWN = re.compile(r"\.(?:lora_|lokr_|hada_|alpha$|dora_scale$)")  # where the name of an adapter's own tensor begins
_SECOND = {"lora_A": "lora_B", "lora_down": "lora_up"}
# The outputs of a block's layers, as multiples of the hidden size, which is what they take: in FLUX.2, and in FLUX.1,
# which also has other layers. Names have dots for Kohya's underscores.
_LAYER = re.compile(r"(?:^|\.)(double|single\.transformer|single|transformer)\.blocks\.(\d{1,3})\.(.+)")
_ATTENTION = ("to.q", "to.k", "to.v", "to.out.0", "add.q.proj", "add.k.proj", "add.v.proj", "to.add.out")
_OUTPUTS = {
    "img.attn.qkv": (3, 3),
    "txt.attn.qkv": (3, 3),
    "img.attn.proj": (1, 1),
    "txt.attn.proj": (1, 1),
    **{f"attn.{name}": (1, 1) for name in _ATTENTION},
    "img.mlp.0": (6, 4),
    "txt.mlp.0": (6, 4),
    "linear1": (9, 7),
    "ff.linear.in": (6, None),
    "ff.context.linear.in": (6, None),
    "attn.to.qkv.mlp.proj": (9, None),
    "img.mod.lin": (None, 6),
    "txt.mod.lin": (None, 6),
    "modulation.lin": (None, 3),
    "norm1.linear": (None, 6),
    "norm.linear": (None, 3),
    "ff.net.0.proj": (None, 4),
    "ff.context.net.0.proj": (None, 4),
    "proj.mlp": (None, 4),
}
FLUX1 = "FLUX.1"
_FLUX1 = (3072, 19, 38)  # its hidden size and its blocks of both kinds


@dataclass(frozen=True)
class Stranger:
    """What some tensors are that can't be converted, and what a user can do, as parts of a sentence."""

    name: str
    advice: str


@dataclass(frozen=True)
class Adapter:
    """What an adapter is.

    Attributes:
        kind: `LoRA`, `LoKr` or `LoHa`.
        naming: who names layers so.
        models: the models of the table that it fits, and `FLUX1` if it fits that; none if it is of another.
        other: the model outside of the table that its layers are of, or None.
    """

    kind: str
    naming: str
    models: tuple[str, ...]
    other: str | None


@dataclass(frozen=True)
class _Layer:
    """An adapted layer of a block: what it gives and takes."""

    is_single: bool
    number: int
    name: str
    outputs: int
    inputs: int


def stranger(infos: _Infos) -> Stranger | None:
    """What tensors of another model are; None if they are not known."""
    for name, advice, proofs in _STRANGERS:
        if any(all(any(prefix + key in infos for prefix in _PREFIXES) for key in proof) for proof in proofs):
            return Stranger(name, advice)
    return None


def refusal(infos: _Infos) -> str | None:
    """What tensors of an adapter or of another model are, and what to do; None if they are not known."""
    if found := adapter(infos):
        models = " or ".join(found.models) or found.other or "another model"
        return f"a {found.kind} for {models} (names as of {found.naming}), which goes on top of a model; give the model"
    known = stranger(infos)
    return None if known is None else f"{known.name}; {known.advice}"


def adapter(infos: _Infos) -> Adapter | None:
    """The adapter that tensors are of; None if they are of none."""
    factors = list(_factors(infos))
    if not factors:
        return None
    modules = [module for module, _, _ in factors]
    models = _models([*_layers(infos, factors)])
    other = FLUX1 if models == (FLUX1,) else other_model(modules)
    return Adapter(factors[0][1], _naming(modules), models, other)


def _factors(infos: _Infos) -> Iterator[tuple[str, str, str]]:
    """The layers that are adapted, each with its kind and the name of its first factor."""
    for name in infos:
        for pattern, kind in _FACTORS:
            if match := pattern.fullmatch(name):
                yield match[1], kind, name


def adapter_tensors(infos: _Infos) -> list[str]:
    """The names of those tensors that are an adapter's."""
    modules = {module for module, _, _ in _factors(infos)}
    cut = ((name, _OWN.search(name)) for name in infos)
    return [name for name, match in cut if match and name[: match.start()] in modules]


def _naming(modules: list[str]) -> str:
    for naming, signs in (
        ("kohya", ("lora_unet_", "lora_te", "lycoris_")),
        ("the original release", ("double_blocks.", "single_blocks.")),
        ("diffusers", ("transformer_blocks.",)),
    ):
        if any(sign in module for module in modules for sign in signs):
            return naming
    return "an unknown trainer"


def _layers(infos: _Infos, factors: list[tuple[str, str, str]]) -> Iterator[_Layer]:
    """The adapted layers of blocks whose sizes tell of a model."""
    for module, kind, name in factors:
        match = _LAYER.search(module.replace("_", "."))
        if match and match[3] in _OUTPUTS:
            yield _Layer(match[1].startswith("single"), int(match[2]), match[3], *_sizes(infos, module, kind, name))


def _models(layers: list[_Layer]) -> tuple[str, ...]:
    """The models that have all of these layers."""
    sizes = {
        name: (row.transformer.hidden_size, row.transformer.num_layers, row.transformer.num_single_layers)
        for name, row in VARIANTS.items()
    }
    fitting = [name for name, size in sizes.items() if all(_has(layer, size, 0) for layer in layers)]
    if all(_has(layer, _FLUX1, 1) for layer in layers):
        fitting.append(FLUX1)
    return tuple(fitting) if layers else ()


def _has(layer: _Layer, size: tuple[int, int, int], family: int) -> bool:
    width, doubles, singles = size
    times = _OUTPUTS[layer.name][family]
    is_there = layer.number < (singles if layer.is_single else doubles)
    return is_there and times is not None and (layer.outputs, layer.inputs) == (times * width, width)


def _sizes(infos: _Infos, module: str, kind: str, name: str) -> tuple[int, int]:
    """How many features an adapted layer gives and takes; zeros if its factors don't tell."""

    def shape(full: str) -> tuple[int, ...]:
        return infos[full].shape if full in infos and len(infos[full].shape) == 2 else (0, 0)

    def factor(part: str) -> tuple[int, int]:
        a, b = (shape(f"{module}.{part}{end}") for end in ("_a", "_b"))
        rows, columns = shape(f"{module}.{part}")
        return rows or a[0], columns or b[1]

    if kind == "LoRA":
        first = name[len(module) + 1 :].partition(".")[0]
        return shape(f"{module}.{_SECOND[first]}{name[len(module) + 1 + len(first) :]}")[0], shape(name)[1]
    (a, b), (c, d) = factor("hada_w1" if kind == "LoHa" else "lokr_w1"), factor("lokr_w2")
    return (a, b) if kind == "LoHa" else (a * c, b * d)
