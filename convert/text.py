"""transformers' text models `Qwen3ForCausalLM` and `Mistral3ForConditionalGeneration`: config and what tensors tell."""

import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import described
from flux2_mlx.components import COMPONENTS
from flux2_mlx.config import MAX_LAYERS, VARIANTS, Geometries, TextConfig, Variant, VisionConfig
from flux2_mlx.errors import CheckpointError

from .options import MISTRAL, MISTRAL3, PIXTRAL, QWEN3, Options, check_alike, checked, refuse, rope_theta
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

# What says of a loose text encoder how it computes: by its kind and that of its config, the section of this that does,
# and what is known of the section.
_LOOSE = {
    ("qwen3", "qwen3"): ("", QWEN3),
    ("mistral3", "mistral"): ("", MISTRAL),
    ("mistral3", "mistral3"): (_SECTIONS["mistral3"], MISTRAL),
}
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
# Kinds of other language models with widths as FLUX.2's have, by what configs and llama.cpp call them.
_KINDS = dict.fromkeys(("qwen3_vl", "qwen3_vl_text", "qwen3vl"), "Qwen3-VL")
# What llama.cpp calls these networks, and what it calls what their configs say.
_ARCHITECTURES = {"qwen3": "qwen3", "llama": "mistral", "mistral": "mistral", "mistral3": "mistral"}
_KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
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


def settings(config: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What is said of a text encoder that lies alone, as its config in transformers says it; nothing if nothing is.

    Args:
        config: the `config.json` beside its files.
        metadata: what its files say of themselves; a GGUF file's comes first.
    """
    kind = metadata.get("general.architecture", "")
    said = {name[len(kind) + 1 :]: x for name, x in metadata.items() if kind and name.startswith(f"{kind}.")}
    if not said:
        return dict(config) if "model_type" in config else {}
    values = {ours: _number(said[theirs]) for theirs, ours in _KEYS.items() if theirs in said}
    return {"model_type": _ARCHITECTURES.get(kind, kind), **values, **_scaling(said)}


def _scaling(said: Mapping[str, str]) -> dict[str, Any]:
    """How a GGUF file says that angles are scaled, as a config says it; nothing if they are not."""
    factor = _number(said.get("rope.scaling.factor", said.get("rope.scale_linear", "1")))
    kind = said.get("rope.scaling.type", "linear")
    is_plain = kind == "none" or (kind == "linear" and factor in (0, 1))
    return {} if is_plain else {"rope_scaling": {"rope_type": kind, "factor": factor}}


def _number(text: str) -> float | str:
    """The number that a text is, or else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def obeyed(configs: Geometries, said: dict[str, Any], path: Path) -> Geometries:
    """The `measured` geometries with what shapes don't tell as `settings` say it.

    Raises:
        CheckpointError: they are of another language model, or ask for what is not implemented.
    """
    if not said:
        return configs
    text: TextConfig = configs["text_encoder"]
    section, options = _loose(text, said, path)
    if section:
        checked(said, MISTRAL3, path, [])
    given = _section(said, "text_config", path) if section else said
    values = checked(given, options, path, [], section)
    check_alike(values, "layer_types", "full_attention", None, path, section)
    for key in _WIDTHS:
        if (found := given.get(key)) not in (None, getattr(text, key)):
            raise CheckpointError(
                f"{path}: {section}{key} is {reprlib.repr(found)} by its config and {getattr(text, key)} by its "
                "tensors; give the config of these weights, or none"
            )
    # What states no widths is no whole config, and leaves out more.
    usual = {} if "hidden_size" in given else {"rope_theta": text.rope_theta}
    told = {
        "rope_theta": rope_theta(usual | values, ("default",), path, section),
        "rms_norm_eps": given.get("rms_norm_eps", text.rms_norm_eps),
    }
    other = {key: x for key, x in told.items() if not _is_close(x, getattr(text, key))}
    made = described("text_encoder", text.to_dict() | other, path, section)
    found = {name: made if config is text else config for name, config in configs.items()}
    if "vision" in found and "vision_config" in said:
        vision = _vision_values(said, made.to_dict(), path, [])
        found["vision"] = described("vision", vision, path, _VISION_SECTION)
    return found


def _loose(text: TextConfig, said: dict[str, Any], path: Path) -> tuple[str, Options]:
    """The section of `_LOOSE` that says how a text encoder computes, and what is known of it."""
    kind = said["model_type"]
    if not isinstance(kind, str) or (text.model_type, kind) not in _LOOSE:
        raise CheckpointError(
            f"{path}: by its config it is {_KINDS.get(str(kind), reprlib.repr(kind))}, which FLUX.2 does not read "
            "prompts with; klein needs Qwen3-4B or Qwen3-8B, dev Mistral-Small-3.2-24B"
        )
    return _LOOSE[text.model_type, kind]


def _is_close(value: Any, own: float) -> bool:
    """Whether a number is another one, as far as 32 bits have it."""
    return isinstance(value, float) and math.isclose(value, own, rel_tol=1e-6)


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
