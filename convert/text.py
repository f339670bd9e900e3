"""transformers' text models `Qwen3ForCausalLM` and `Mistral3ForConditionalGeneration`: config and what tensors tell."""

import re
import reprlib
from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import described
from flux2_mlx.components import COMPONENTS
from flux2_mlx.config import MAX_LAYERS, VARIANTS, Geometries, TextConfig, Variant, VisionConfig
from flux2_mlx.errors import CheckpointError

from .options import MISTRAL, MISTRAL3, PIXTRAL, QWEN3, check_alike, checked, refuse, rope_theta
from .rules import Rule, Shape, copy
from .shapes import GIVE_FOLDER, Infos, agrees, block_count, divided, shape_of

_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
# Where in the config the geometry of each kind of text model stands.
_SECTIONS = {"qwen3": "", "mistral3": "text_config."}
_VISION_SECTION = "vision_config."
_TOWER = "vision_tower."
# Language models that it uses, by their kind and width.
_NAMES = {("qwen3", 2560): "Qwen3-4B", ("qwen3", 4096): "Qwen3-8B", ("mistral3", 5120): "Mistral-Small-3.2-24B"}
# Language models that FLUX.2 does not use, by what tells them apart: the kind, the width and the number of layers.
_OTHERS = {
    ("qwen3", 1024, 28): "Qwen3-0.6B",
    ("qwen3", 2048, 28): "Qwen3-1.7B",
    ("qwen3", 5120, 40): "Qwen3-14B",
    ("qwen3", 5120, 64): "Qwen3-32B",
    ("mistral3", 4096, 32): "Mistral-7B or Llama-8B",
}


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
        inner["head_dim"] = _head_dim(inner["hidden_size"], heads)
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
    if inner.get("head_dim", _head_dim(width, heads)) not in (None, _head_dim(width, heads)):
        refuse(f"{_VISION_SECTION}head_dim", inner["head_dim"], _head_dim(width, heads), path)
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


def _head_dim(width: Any, heads: Any) -> Any:
    """The width of a head where a config leaves it to the other two; None if these are no such numbers."""
    return width // heads if type(width) is type(heads) is int and heads > 0 else None


def model_name(text: TextConfig) -> str | None:
    """The name of the language model that a text encoder of this geometry is; None: it has no name."""
    return _NAMES.get((text.model_type, text.hidden_size))


def measured(infos: Infos) -> Geometries:
    """The geometries of what the tensors are enough for, as their shapes tell."""
    told = _measured_text(infos)
    layers = block_count(infos, "model.layers.")
    found = next((row for row in VARIANTS.values() if agrees(row.text, told)), None)
    if found is None:
        raise CheckpointError(_other_text(told, layers))
    row = found.text
    last = found.text.num_hidden_layers
    full = last + row.num_later_layers
    if not last <= layers <= full:
        raise CheckpointError(f"the text encoder has {layers} layers, but {last} to {full} are needed")
    has_head = "model.norm.weight" in infos and (row.tie_word_embeddings or "lm_head.weight" in infos)
    values = {
        "vocab_size": shape_of(infos, "model.embed_tokens.weight", 2)[0],
        "num_later_layers": row.num_later_layers if layers == full and has_head else 0,
    }
    configs: Geometries = {"text_encoder": TextConfig.from_dict(row.to_dict() | values)}
    if values["num_later_layers"]:
        configs["language_model"] = configs["text_encoder"]
    if found.vision is not None and any(name.startswith(_TOWER) for name in infos):
        configs["vision"] = _measured_vision(infos, found.vision)
    return configs


def _measured_text(infos: Infos) -> dict[str, Any]:
    """What shapes tell of a text model; heads are as wide as those of its kind."""
    layer = "model.layers.0."
    is_qwen = f"{layer}self_attn.q_norm.weight" in infos
    width = shape_of(infos, "model.embed_tokens.weight", 2)[1]
    kind = "qwen3" if is_qwen else "mistral3"
    rows = [row.text for row in VARIANTS.values() if row.text.model_type == kind]
    head = shape_of(infos, f"{layer}self_attn.q_norm.weight", 1)[0] if is_qwen else rows[0].head_dim
    queries, keys = (shape_of(infos, f"{layer}self_attn.{x}_proj.weight", 2)[0] for x in "qk")
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": shape_of(infos, f"{layer}mlp.gate_proj.weight", 2)[0],
        "num_attention_heads": divided(queries, head, "q_proj"),
        "num_key_value_heads": divided(keys, head, "k_proj"),
        "head_dim": head,
    }


def _other_text(told: dict[str, Any], layers: int) -> str:
    kind = told["model_type"]
    width = told["hidden_size"]
    name = _OTHERS.get((kind, width, layers), "a language model")
    return (
        f"the text encoder is {name}, with {width} features, {told['intermediate_size']} in between and {layers} "
        "layers; FLUX.2 klein needs Qwen3-4B or Qwen3-8B, dev Mistral-Small-3.2-24B"
    )


def _measured_vision(infos: Infos, row: VisionConfig) -> VisionConfig:
    width, _, patch, _ = shape_of(infos, f"{_TOWER}patch_conv.weight", 4)
    merged = shape_of(infos, "multi_modal_projector.patch_merger.merging_layer.weight", 2)[1]
    told = {
        "hidden_size": width,
        "patch_size": patch,
        "intermediate_size": shape_of(infos, f"{_TOWER}transformer.layers.0.feed_forward.gate_proj.weight", 2)[0],
        "num_hidden_layers": block_count(infos, f"{_TOWER}transformer.layers."),
        "text_hidden_size": shape_of(infos, "multi_modal_projector.linear_1.weight", 2)[0],
        "spatial_merge_size": round(divided(merged, width, "merging_layer") ** 0.5),
    }
    if not agrees(row, told):
        raise CheckpointError(f"the vision tower is of no known size: {told}; {GIVE_FOLDER}")
    return row
