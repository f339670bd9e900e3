"""transformers' `Qwen3ForCausalLM` and `Mistral3ForConditionalGeneration`."""

import re
import reprlib
from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import described
from flux2_mlx.components import COMPONENTS
from flux2_mlx.config import MAX_LAYERS, Geometries, TextConfig, Variant, VisionConfig
from flux2_mlx.errors import CheckpointError

from .options import MISTRAL, MISTRAL3, PIXTRAL, QWEN3, check_alike, checked, refuse, rope_theta
from .rules import Rule, Shape, copy

_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
# Where in the config the geometry of each kind of text model stands.
_SECTIONS = {"qwen3": "", "mistral3": "text_config."}
_VISION_SECTION = "vision_config."


def rule_for(name: str, shape: Shape) -> Rule:
    """The rule for the encoder's tensor `name`."""
    return copy(f"model.{name}")


def later_rule_for(name: str, shape: Shape, first: int) -> Rule:
    """The rule for tensor `name` of the later layers, which start with layer `first` of the source."""
    layer = _LAYER.match(name)
    if layer:
        return copy(f"model.layers.{first + int(layer[1])}.{layer[2]}")
    return copy(name if name.startswith("lm_head.") else f"model.{name}")


def is_dropped(name: str, config: TextConfig) -> bool:
    """Whether a canonical tensor has no place in our checkpoint: what generates text, where that is not kept, and a
    head that repeats the embedding."""
    if name == "model.norm.weight":
        return not config.num_later_layers and not config.final_norm
    if name == "lm_head.weight":
        return config.tie_word_embeddings or not config.num_later_layers
    layer = _LAYER.match(name)
    return layer is not None and int(layer[1]) >= config.num_hidden_layers and not config.num_later_layers


def configs(values: dict[str, Any], variant: Variant, path: Path, notes: list[str]) -> Geometries:
    """The geometries of what is made of the text model of `variant`, whose config is at `path`."""
    text = _text_values(values, variant, path, notes)
    section = _SECTIONS[text["model_type"]]
    configs: Geometries = {"text_encoder": described("text_encoder", text, path, section)}
    if text["num_later_layers"]:
        configs["language_model"] = configs["text_encoder"]
    if section and "vision_config" in values:
        configs["vision"] = described("vision", _vision_values(values, text, path, notes), path, _VISION_SECTION)
    return configs


def counts(configs: Geometries) -> dict[str, tuple[str, int]]:
    """How many layers of each kind the part has, by what their canonical names begin with, and the key that says so."""
    text = configs["text_encoder"]
    layers = {"model.layers.": ("num_hidden_layers", text.num_hidden_layers + text.num_later_layers)}
    return layers | (COMPONENTS["vision"].counts(configs["vision"]) if "vision" in configs else {})


def _text_values(values: dict[str, Any], variant: Variant, path: Path, notes: list[str]) -> dict[str, Any]:
    """The geometry with the layers that are needed, in our terms."""
    model_type = values.get("model_type")
    if model_type != variant.text.model_type:
        raise CheckpointError(
            f"{path}: model_type is {reprlib.repr(model_type)}, {variant.name} reads prompts with "
            f"{variant.text.model_type!r}"
        )
    tied = values.get("tie_word_embeddings", False)
    section = _SECTIONS[model_type]
    if section:
        checked(values, MISTRAL3, path, notes)
        inner = checked(_section(values, "text_config", path), MISTRAL, path, notes, section)
    else:
        inner = checked(values, QWEN3, path, notes)
    check_alike(inner, "layer_types", "full_attention", None, path, section)
    heads = inner["num_attention_heads"]
    if inner.get("num_key_value_heads") is None:
        inner["num_key_value_heads"] = heads
    if inner.get("head_dim") is None:
        inner["head_dim"] = _divided(inner["hidden_size"], heads)
    out_layers = variant.text.out_layers
    available = inner["num_hidden_layers"]
    if type(available) is not int or available > MAX_LAYERS:
        raise CheckpointError(
            f"{path}: {section}num_hidden_layers is {reprlib.repr(available)}, not a whole number up to {MAX_LAYERS}"
        )
    if available < max(out_layers):
        raise CheckpointError(
            f"{path}: {section}num_hidden_layers says {available} layers, but the states of layers {out_layers} are "
            "needed"
        )
    later = available - max(out_layers) if variant.text.num_later_layers else 0
    if inner.get("tie_last_hidden_states") not in (None, True, False):
        refuse(f"{section}tie_last_hidden_states", inner["tie_last_hidden_states"], True, path)
    return {
        **inner,
        "model_type": model_type,
        "rope_theta": rope_theta(inner, ("default",), path, section),
        "tie_word_embeddings": tied,
        "out_layers": out_layers,
        "num_hidden_layers": max(out_layers),
        "num_later_layers": later,
        # The last of transformers' hidden states, and only that, has been through the final norm.
        "final_norm": available == max(out_layers) and inner.get("tie_last_hidden_states") in (None, True),
    }


def _vision_values(values: dict[str, Any], text: dict[str, Any], path: Path, notes: list[str]) -> dict[str, Any]:
    """The vision tower's geometry in our terms; `text` is that of the text model."""
    inner = checked(_section(values, "vision_config", path), PIXTRAL, path, notes, _VISION_SECTION)
    width, heads = (inner.get(key, getattr(VisionConfig, key)) for key in ("hidden_size", "num_attention_heads"))
    if inner.get("head_dim", _divided(width, heads)) not in (None, _divided(width, heads)):
        refuse(f"{_VISION_SECTION}head_dim", inner["head_dim"], _divided(width, heads), path)
    merge = values.get("spatial_merge_size", VisionConfig.spatial_merge_size)
    if type(merge) is not int:
        refuse("spatial_merge_size", merge, VisionConfig.spatial_merge_size, path)
    return {
        **inner,
        "rope_theta": rope_theta(inner, ("axial", "default"), path, _VISION_SECTION),
        "text_hidden_size": text["hidden_size"],
        "spatial_merge_size": merge,
        "projector_eps": text["rms_norm_eps"],
    }


def _section(values: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = values.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} has no {name}")
    return section


def _divided(width: Any, heads: Any) -> Any:
    """The width of a head where a config leaves it to the other two; None if these are no such numbers."""
    return width // heads if type(width) is type(heads) is int and heads > 0 else None
