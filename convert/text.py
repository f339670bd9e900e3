"""transformers' `Qwen3ForCausalLM`: the embedding and the layers whose states are used."""

import re

from flux2_mlx.config import TextConfig

from .rules import Rule, Shape, copy

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def rule_for(name: str, shape: Shape) -> Rule:
    """The rule for our tensor `name`."""
    return copy(f"model.{name}")


def is_dropped(name: str, config: TextConfig) -> bool:
    """Whether a source tensor serves text generation only: later layers, the final norm, the head."""
    layer = _LAYER.match(name)
    if layer:
        return int(layer[1]) >= config.num_hidden_layers
    return name in ("model.norm.weight", "lm_head.weight")
