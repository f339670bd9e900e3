"""diffusers' `Flux2Transformer2DModel`: its config, and what its tensors tell."""

from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import described
from flux2_mlx.config import VARIANTS, Geometries, TransformerConfig, Variant
from flux2_mlx.errors import CheckpointError

from .options import TRANSFORMER, checked, refuse
from .shapes import AGAIN, GIVE_FOLDER, Infos, agreeing, block_count, divided, shape_of

_GUIDANCE = ("guidance_in.in_layer.weight", "guidance_in.out_layer.weight")


def configs(values: dict[str, Any], variant: Variant | None, path: Path, notes: list[str]) -> Geometries:
    """The geometry that the config at `path` describes."""
    values = checked(values, TRANSFORMER, path, notes)
    channels = values.get("in_channels", TransformerConfig.in_channels)
    if values.get("out_channels") not in (None, 0, channels):
        refuse("out_channels", values["out_channels"], channels, path)
    return {"transformer": described("transformer", values, path)}


def measured(infos: Infos) -> Geometries:
    """The geometry that the shapes tell."""
    width, channels = shape_of(infos, "img_in.weight", 2)
    head = shape_of(infos, "double_blocks.0.img_attn.norm.query_norm.scale", 1)[0]
    told = {
        "num_layers": block_count(infos, "double_blocks."),
        "num_single_layers": block_count(infos, "single_blocks."),
        "num_attention_heads": divided(width, head, "img_in.weight"),
        "joint_attention_dim": shape_of(infos, "txt_in.weight", 2)[1],
        "attention_head_dim": head,
        "in_channels": channels,
        "timestep_guidance_channels": shape_of(infos, "time_in.in_layer.weight", 2)[1],
        "mlp_ratio": shape_of(infos, "double_blocks.0.img_mlp.2.weight", 2)[1] / width,
        "guidance_embeds": any(name.startswith("guidance_in.") for name in infos),
    }
    config = agreeing((row.transformer for row in VARIANTS.values()), told)
    if config is None and agreeing((row.transformer for row in VARIANTS.values()), told | {"guidance_embeds": True}):
        raise CheckpointError(f"there is no {' and no '.join(_GUIDANCE)}, which dev needs; {AGAIN}")
    if config is None:
        blocks = f"{told['num_layers']} double and {told['num_single_layers']} single blocks"
        raise CheckpointError(
            f"it is a FLUX.2 transformer of no known size: {width} features, {blocks}, {told['joint_attention_dim']} "
            f"text features; {GIVE_FOLDER}"
        )
    return {"transformer": config}
