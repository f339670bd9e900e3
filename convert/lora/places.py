"""Which of our layers a module of a trainer's model is, in every spelling: with dots, or with underscores for them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from flux2_mlx.checkpoint import Component
from flux2_mlx.components import COMPONENTS
from flux2_mlx.config import Config

from ..dialects import DIALECTS
from ..rules import Shape, swap_halves

TRANSFORMER = "transformer"
TEXT = "text_encoder"
_WEIGHT = ".weight"
_PREFIX = re.compile(
    r"^(?:base_model_model_|model_diffusion_model_|diffusion_model_|lora_unet_|lora_transformer_|lycoris_|"
    r"transformer_(?!blocks_)|model_)*"
)
_BLOCK = re.compile(r"((?:double|single|transformer|single_transformer|sformer)_blocks)_(0|[1-9]\d{0,2})_(.+)")
_CUT = {"sformer_blocks": "transformer_blocks"}  # by some tool
_LAYER = re.compile(
    r"(?:base_model_model_)?(?:(?:lora|lycoris)_te1?_|(?:lora_|lycoris_)?text_encoders?_)?(?:base_model_model_)?"
    r"(?:(?:qwen3_4b|qwen3_8b|mistral3_24b)_)?(?:transformer_|language_model_|model_)*"
    r"layers_(0|[1-9]\d{0,2})_(self_attn_[qkvo]_proj|mlp_(?:gate|up|down)_proj)"
)
# Layers that diffusers has after `fuse_qkv_projections`.
_FUSED = {
    "transformer_blocks.*.attn.to_qkv": "double_blocks.*.img_attn.qkv",
    "transformer_blocks.*.attn.to_added_qkv": "double_blocks.*.txt_attn.qkv",
}


@dataclass(frozen=True)
class Place:
    """A linear layer of ours, or one of several equal parts of its outputs.

    Attributes:
        network: `transformer` or `text_encoder`.
        layer: its name there.
        part: which one it is, counted from 0.
        parts: of how many.
        is_swapped: whether the halves of its outputs stand in the other order than ours.
    """

    network: str
    layer: str
    part: int = 0
    parts: int = 1
    is_swapped: bool = False

    def shape(self, configs: Mapping[str, Config]) -> Shape | None:
        """That of the module's weight, given the geometries of the networks; None: there is no such layer."""
        if self.network not in configs:
            return None
        whole = layer_shapes(self.network, configs[self.network]).get(self.layer)
        return whole if whole is None else (whole[0] // self.parts, whole[1])

    def rows(self, outputs: int) -> slice | None:
        """The rows of our layer's weight, where the module gives so many outputs; None: all."""
        return None if self.parts == 1 else slice(self.part * outputs, (self.part + 1) * outputs)

    def overlaps(self, other: "Place") -> bool:
        """Whether both have outputs of the same layer in common."""
        same = (self.network, self.layer) == (other.network, other.layer)
        return same and (self.parts != other.parts or self.part == other.part)

    def __str__(self) -> str:
        part = f" ({self.part + 1} of {self.parts})" if self.parts > 1 else ""
        return f"{self.network}.{self.layer}{part}"


@cache
def layer_shapes(network: str, config: Config) -> Mapping[str, Shape]:
    """The shapes of the weights of a network's linear layers, by the names of these."""
    infos = Component(network, config, None, ()).infos
    return {
        name.removesuffix(_WEIGHT): info.shape
        for name, info in infos.items()
        if len(info.shape) == 2 and name.endswith(_WEIGHT) and not name.startswith(COMPONENTS[network].looked_up)
    }


def place(module: str) -> Place | None:
    """The place of a trainer's module; None: it is none of a layer that can be adapted."""
    if "*" in module:
        return None
    flat = module.replace(".", "_")
    if match := _LAYER.fullmatch(flat):
        return Place(TEXT, f"layers.{match[1]}.{re.sub('^(self_attn|mlp)_', lambda x: f'{x[1]}.', match[2])}")
    flat = _PREFIX.sub("", flat, count=1)
    block = _BLOCK.fullmatch(flat)
    known = _table().get(f"{_CUT.get(block[1], block[1])}_*_{block[3]}" if block else flat)
    return known and replace(known, layer=known.layer.replace("*", block[2] if block else ""))


@cache
def _table() -> dict[str, Place]:
    """The places in our transformer by the spellings of modules, with stars for the numbers of blocks."""
    found = {theirs: Place(TRANSFORMER, ours) for theirs, ours in _FUSED.items()}
    for dialect in DIALECTS:
        if dialect.part == TRANSFORMER:
            for ours, spellings in dialect.table.items():
                for spelling in spellings if ours.endswith(_WEIGHT) else ():
                    whole = Place(TRANSFORMER, ours.removesuffix(_WEIGHT), 0, 1, spelling.rule is swap_halves)
                    for part, theirs in enumerate(spelling.templates):
                        one = replace(whole, part=part, parts=len(spelling.templates))
                        found[theirs.removesuffix(_WEIGHT)] = one
    return {theirs.replace(".", "_"): known for theirs, known in found.items()}
