"""diffusers' `AutoencoderKLFlux2`: its config, and what its tensors tell."""

from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import described
from flux2_mlx.config import VARIANTS, Geometries, VAEConfig, Variant
from flux2_mlx.errors import CheckpointError

from .options import VAE, check_alike, checked
from .shapes import Infos, agreeing, block_count, shape_of

_OTHERS = {4: "Stable Diffusion", 16: "FLUX.1, SD3 or Qwen-Image"}  # by their latent channels


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


def measured(infos: Infos) -> Geometries:
    """The geometry that the shapes tell."""
    latents = shape_of(infos, "decoder.conv_in.weight", 4)[1]
    told = {
        "block_out_channels": _channels(infos, "encoder.down_blocks."),
        "layers_per_block": block_count(infos, "encoder.down_blocks.0.resnets."),
        "latent_channels": latents,
    }
    decoder = _channels(infos, "decoder.up_blocks.")[::-1]
    config = agreeing((row.vae for row in VARIANTS.values()), told)
    if config is None:
        whose = f"as that of {_OTHERS[latents]}" if latents in _OTHERS else "of no known size"
        raise CheckpointError(f"it is a VAE of {latents} latent channels, {whose}; FLUX.2's has 32")
    values = {"decoder_block_out_channels": None if decoder == config.block_out_channels else decoder}
    return {"vae": VAEConfig.from_dict(config.to_dict() | values)}


def _channels(infos: Infos, levels: str) -> tuple[int, ...]:
    """The channels that each level gives."""
    count = block_count(infos, levels)
    return tuple(shape_of(infos, f"{levels}{level}.resnets.0.conv1.weight", 4)[0] for level in range(count))
