"""diffusers' `AutoencoderKLFlux2`: our names are the same, convolutions become channels-last."""

from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import described
from flux2_mlx.components import COMPONENTS
from flux2_mlx.config import Geometries, VAEConfig, Variant

from .options import VAE, check_alike, checked
from .rules import Rule, Shape, channels_last, copy


def rule_for(name: str, shape: Shape) -> Rule:
    """The rule for our tensor `name`."""
    return channels_last(name) if len(shape) == 4 else copy(name)


def is_dropped(name: str, config: VAEConfig) -> bool:
    """Whether a source tensor has no place in our checkpoint: the counter of batches seen in training."""
    return name == "bn.num_batches_tracked"


def configs(values: dict[str, Any], variant: Variant | None, path: Path) -> Geometries:
    """The geometry that the config at `path` describes."""
    values = checked(values, VAE, path)
    channels = values.get("block_out_channels", VAEConfig.block_out_channels)
    levels = len(channels) if isinstance(channels, list | tuple) else None
    check_alike(values, "down_block_types", "DownEncoderBlock2D", levels, path)
    check_alike(values, "up_block_types", "UpDecoderBlock2D", levels, path)
    return {"vae": described("vae", values, path)}


def counts(configs: Geometries) -> dict[str, tuple[str, int]]:
    """How many blocks of each kind the source has, and the key that says so."""
    return COMPONENTS["vae"].counts(configs["vae"])
