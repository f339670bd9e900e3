"""The config of diffusers' `Flux2Transformer2DModel`."""

from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import described
from flux2_mlx.config import Geometries, TransformerConfig, Variant

from .options import TRANSFORMER, checked, refuse


def configs(values: dict[str, Any], variant: Variant | None, path: Path, notes: list[str]) -> Geometries:
    """The geometry that the config at `path` describes."""
    values = checked(values, TRANSFORMER, path, notes)
    channels = values.get("in_channels", TransformerConfig.in_channels)
    if values.get("out_channels") not in (None, 0, channels):
        refuse("out_channels", values["out_channels"], channels, path)
    return {"transformer": described("transformer", values, path)}
