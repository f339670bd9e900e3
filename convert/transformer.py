"""diffusers' `Flux2Transformer2DModel` to the names of the original release.

Source: `scripts/convert_flux2_to_diffusers.py` of diffusers, read backwards.
"""

import re
from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import described
from flux2_mlx.config import Geometries, TransformerConfig, Variant

from .options import TRANSFORMER, checked, refuse
from .rules import Rule, Shape, copy, join_rows, swap_halves

_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_attn.proj.weight": "attn.to_out.0.weight",
    "txt_attn.proj.weight": "attn.to_add_out.weight",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "img_mlp.0.weight": "ff.linear_in.weight",
    "img_mlp.2.weight": "ff.linear_out.weight",
    "txt_mlp.0.weight": "ff_context.linear_in.weight",
    "txt_mlp.2.weight": "ff_context.linear_out.weight",
}
_DOUBLE_QKV = {
    "img_attn.qkv.weight": ("to_q", "to_k", "to_v"),
    "txt_attn.qkv.weight": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_SINGLE = {
    "linear1.weight": "to_qkv_mlp_proj.weight",
    "linear2.weight": "to_out.weight",
    "norm.query_norm.scale": "norm_q.weight",
    "norm.key_norm.scale": "norm_k.weight",
}
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


def rule_for(name: str, shape: Shape) -> Rule:
    """The rule for our tensor `name`."""
    if name == "final_layer.adaLN_modulation.1.weight":
        return swap_halves("norm_out.linear.weight")
    block = _BLOCK.fullmatch(name)
    if block is None:
        return copy(f"{_TOP[name.removesuffix('.weight')]}.weight")
    kind, number, rest = block.groups()
    if kind == "single":
        return copy(f"single_transformer_blocks.{number}.attn.{_SINGLE[rest]}")
    prefix = f"transformer_blocks.{number}."
    if rest in _DOUBLE_QKV:
        return join_rows(*(f"{prefix}attn.{part}.weight" for part in _DOUBLE_QKV[rest]))
    return copy(prefix + _DOUBLE[rest])


def is_dropped(name: str, config: TransformerConfig) -> bool:
    """Whether a source tensor has no place in our checkpoint: none has not."""
    return False


def configs(values: dict[str, Any], variant: Variant | None, path: Path) -> Geometries:
    """The geometry that the config at `path` describes."""
    values = checked(values, TRANSFORMER, path)
    channels = values.get("in_channels", TransformerConfig.in_channels)
    if values.get("out_channels") not in (None, 0, channels):
        refuse("out_channels", values["out_channels"], channels, path)
    return {"transformer": described("transformer", values, path)}


def counts(configs: Geometries) -> dict[str, tuple[str, int]]:
    """How many blocks of each kind the source has, and the key that says so."""
    config = configs["transformer"]
    return {
        "transformer_blocks.": ("num_layers", config.num_layers),
        "single_transformer_blocks.": ("num_single_layers", config.num_single_layers),
    }
