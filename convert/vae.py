"""diffusers' `AutoencoderKLFlux2`: our names are the same, convolutions become channels-last."""

from flux2_mlx.config import VAEConfig

from .rules import Rule, Shape, channels_last, copy


def rule_for(name: str, shape: Shape) -> Rule:
    """The rule for our tensor `name`."""
    return channels_last(name) if len(shape) == 4 else copy(name)


def is_dropped(name: str, config: VAEConfig) -> bool:
    """Whether a source tensor has no place in our checkpoint: the counter of batches seen in training."""
    return name == "bn.num_batches_tracked"
