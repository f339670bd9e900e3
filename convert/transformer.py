"""diffusers' `Flux2Transformer2DModel` to the names of the original release."""

from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import described
from flux2_mlx.config import Geometries, TransformerConfig, Variant

from .dialects import DIFFUSERS
from .options import TRANSFORMER, checked, refuse
from .rules import Rule, Shape


def rule_for(name: str, shape: Shape) -> Rule:
    """The rule for our tensor `name`."""
    return DIFFUSERS.rule(name)


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
