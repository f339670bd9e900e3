"""transformers' `Qwen3ForCausalLM` and `Mistral3ForConditionalGeneration`."""

import re

from flux2_mlx.config import TextConfig

from .rules import Rule, Shape, channels_last, copy

_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
# Mistral's names on disk and as transformers saves them since 4.52, and what both become.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    # Of a decoder that was saved without its head.
    ("layers.", "model.layers."),
    ("embed_tokens.", "model.embed_tokens."),
    ("norm.", "model.norm."),
)


def canonical(name: str) -> str:
    """A source tensor's name in the naming that the rules read: Qwen3's, with Mistral's vision parts on top."""
    for prefix, ours in _PREFIXES:
        if name.startswith(prefix):
            return ours + name[len(prefix) :]
    return name


def rule_for(name: str, shape: Shape) -> Rule:
    """The rule for the encoder's tensor `name`."""
    return copy(f"model.{name}")


def later_rule_for(name: str, shape: Shape, first: int) -> Rule:
    """The rule for tensor `name` of the later layers, which start with layer `first` of the source."""
    layer = _LAYER.match(name)
    if layer:
        return copy(f"model.layers.{first + int(layer[1])}.{layer[2]}")
    return copy(name if name.startswith("lm_head.") else f"model.{name}")


def vision_rule_for(name: str, shape: Shape) -> Rule:
    """The rule for tensor `name` of the vision tower and projector."""
    return channels_last(name) if len(shape) == 4 else copy(name)


def is_dropped(name: str, config: TextConfig) -> bool:
    """Whether a source tensor has no place in our checkpoint: what generates text, where that is not kept, and a
    head that repeats the embedding."""
    if name == "model.norm.weight":
        return not config.num_later_layers and not config.final_norm
    if name == "lm_head.weight":
        return config.tie_word_embeddings or not config.num_later_layers
    layer = _LAYER.match(name)
    return layer is not None and int(layer[1]) >= config.num_hidden_layers and not config.num_later_layers
