"""The config of diffusers' `AutoencoderKLFlux2`."""

from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import described
from flux2_mlx.config import Geometries, VAEConfig, Variant

from .options import VAE, check_alike, checked


def is_dropped(name: str, config: VAEConfig) -> bool:
    """Whether a canonical tensor has no place in our checkpoint: the counter of batches seen in training."""
    return name == "bn.num_batches_tracked"


def configs(values: dict[str, Any], variant: Variant | None, path: Path, notes: list[str]) -> Geometries:
    """The geometry that the config at `path` describes."""
    values = checked(values, VAE, path, notes)
    channels = values.get("block_out_channels", VAEConfig.block_out_channels)
    levels = len(channels) if isinstance(channels, list | tuple) else None
    check_alike(values, "down_block_types", "DownEncoderBlock2D", levels, path)
    check_alike(values, "up_block_types", "UpDecoderBlock2D", levels, path)
    return {"vae": described("vae", values, path)}
