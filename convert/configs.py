"""From the configs of a folder in the diffusers layout to our geometry."""

import os
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import check_fit, described
from flux2_mlx.config import (
    MAX_LAYERS,
    VARIANTS,
    Config,
    TransformerConfig,
    VAEConfig,
    Variant,
    VisionConfig,
    get_variant,
)
from flux2_mlx.errors import CheckpointError
from flux2_mlx.hub_cache import INDEX, PICKLES
from flux2_mlx.weights import read_json

from . import options
from .options import check_alike, checked, refuse, rope_theta

_PARTS = ("transformer", "text_encoder", "vae")
# The pipelines of diffusers that are saved as such a folder, with what they take for a missing `is_distilled`.
_DEV = ("Flux2Pipeline", "Flux2ModularPipeline")
_KV = "Flux2KleinKVPipeline"
_KLEIN = {
    "Flux2KleinPipeline": False,
    "Flux2KleinInpaintPipeline": False,
    "Flux2KleinBaseModularPipeline": False,
    "Flux2KleinModularPipeline": True,
}
_FILES = {
    **dict.fromkeys(PICKLES, "a pickle, which could run code"),
    ".gguf": "a GGUF file, whose quantized weights are not read",
    ".safetensors": "one file of weights",
}
_UNQUANTIZED = "give the model that it was made from, which becomes qint8 or qint4 here"
COMPLETE = "fetch it again, or give a complete copy"
_SCHEDULER = "scheduler/scheduler_config.json"
# Of these, diffusers takes the class from `model_index.json` rather than from their own files.
_CLASSES = {
    "transformer": "Flux2Transformer2DModel",
    "vae": "AutoencoderKLFlux2",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
# Where in `text_encoder/config.json` the geometry of each kind of text model stands.
_TEXT_SECTIONS = {"qwen3": "", "mistral3": "text_config."}
_VISION_SECTION = "vision_config."


@dataclass(frozen=True)
class Description:
    """What the small files of a folder say, of which nothing but the kind of the model is understood yet."""

    folder: Path
    index: dict[str, Any]
    values: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]


def describe(folder: Path) -> Description:
    """Read the small files of the folder that holds `model_index.json`.

    Raises:
        CheckpointError: another family of models, a file that is missing or damaged, quantized weights.
    """
    index = read_index(folder)
    paths = {name: folder / name / "config.json" for name in _PARTS}
    for path in (*paths.values(), folder / _SCHEDULER):
        if not os.path.lexists(path):
            raise CheckpointError(f"{folder} is incomplete: there is no {path.relative_to(folder)}; {COMPLETE}")
    values = {name: read_json(path) for name, path in paths.items()}
    for name, config in values.items():
        if stored := config.get("quantization_config") or config.get("compression_config"):
            method = stored.get("quant_method") if isinstance(stored, dict) else None
            refuse_quantized(folder / name, f"quantized by {method or 'an unknown method'!s:.80}")
    return Description(folder, index, values, read_json(folder / _SCHEDULER))


def read_configs(description: Description, variant: str | None) -> tuple[Variant, dict[str, Config]]:
    """The model's row of the table, and the geometry of each of its networks.

    Args:
        description: what `describe` has read.
        variant: the model's name where geometry and `model_index.json` can't tell, or None.

    Raises:
        CheckpointError: another model, or one that asks for what is not implemented.
    """
    folder, index, values = description.folder, description.index, description.values
    paths = {name: folder / name / "config.json" for name in _PARTS}
    configs = {}
    configs["transformer"] = described(
        "transformer", _transformer_values(values["transformer"], paths["transformer"]), paths["transformer"]
    )
    row = _choose_variant(folder, index, configs["transformer"], variant)
    configs |= _text_configs(values["text_encoder"], row, paths["text_encoder"])
    configs["vae"] = described("vae", _vae_values(values["vae"], paths["vae"]), paths["vae"])
    check_fit(row, configs)
    checked(description.scheduler, options.SCHEDULER, folder / _SCHEDULER)
    return row, configs


def _text_configs(values: dict[str, Any], variant: Variant, path: Path) -> dict[str, Config]:
    """The geometries of what is made from the text encoder."""
    text = _text_values(values, variant, path)
    section = _TEXT_SECTIONS[text["model_type"]]
    configs = {"text_encoder": described("text_encoder", text, path, section)}
    if text["num_later_layers"]:
        configs["language_model"] = configs["text_encoder"]
    if section and "vision_config" in values:
        configs["vision"] = described("vision", _vision_values(values, text, path), path, _VISION_SECTION)
    return configs


def refuse_quantized(folder: Path, how: str) -> None:
    raise CheckpointError(f"{folder} holds weights that are {how}, which are not read; {_UNQUANTIZED}")


def read_index(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise CheckpointError(f"there is no file or folder {folder}")
    if folder.is_file():
        kind = _FILES.get(folder.suffix.lower(), "not a model folder")
        raise CheckpointError(
            f"{folder} is {kind}; give the whole model, as a folder in the diffusers layout or a repo id"
        )
    if not (folder / INDEX).is_file():
        hint = _whereabouts(folder)
        raise CheckpointError(f"{folder} is no model folder in the diffusers layout: it has no {INDEX}{hint}")
    index = read_json(folder / INDEX)
    pipeline = index.get("_class_name")
    if pipeline not in (*_DEV, _KV, *_KLEIN):
        raise CheckpointError(f"{folder} holds {reprlib.repr(pipeline)}, not FLUX.2; give a model of that family")
    for name, wanted in _CLASSES.items():
        match index.get(name):
            case [_, str(found)] if found != wanted:
                refuse(name, found, wanted, folder / "model_index.json")
    return index


def _choose_variant(folder: Path, index: dict[str, Any], transformer: TransformerConfig, name: str | None) -> Variant:
    same = [v for v in VARIANTS.values() if v.transformer == transformer]
    if name is not None:
        row = get_variant(name)
        if same and row not in same:
            raise CheckpointError(f"{folder} can't be {name}: its geometry is that of {_names(same)}")
        return row
    rows = same if len(same) == 1 else [v for v in same or VARIANTS.values() if _is_like(v, index)]
    if len(rows) != 1:
        raise CheckpointError(
            f"can't tell which model {folder} is; name it with --variant ({_names(same or VARIANTS.values())})"
        )
    return rows[0]


def _is_like(variant: Variant, index: dict[str, Any]) -> bool:
    """Whether a model is of the kind that the class and `is_distilled` tell."""
    pipeline = index["_class_name"]
    if pipeline in _DEV or variant.transformer.guidance_embeds:
        return pipeline in _DEV and variant.transformer.guidance_embeds
    if pipeline == _KV or variant.kv_cache:
        return pipeline == _KV and variant.kv_cache
    return index.get("is_distilled", _KLEIN[pipeline]) == variant.distilled


def _whereabouts(folder: Path) -> str:
    """Where the model may be that is not in `folder`."""
    if (folder.parent / INDEX).is_file():
        return f"; it is a part of {folder.parent}, give that"
    found = sorted((*folder.glob(f"*/{INDEX}"), *folder.glob("models--*--*/snapshots")))
    if found:
        return f"; give {' or '.join(str(path.parent) for path in found[:3])}"
    index = folder / "transformer" / "model.safetensors.index.json"
    if index.is_file() and "mflux_version" in str(read_json(index).get("metadata")):
        return f", as mflux saves a model; {_UNQUANTIZED}"
    if (folder / "transformer" / "config.json").is_file():
        return "; copy that of the model that it was made from into it"
    return ""


def _names(variants: Iterable[Variant]) -> str:
    return ", ".join(variant.name for variant in variants)


def _transformer_values(values: dict[str, Any], path: Path) -> dict[str, Any]:
    values = checked(values, options.TRANSFORMER, path)
    channels = values.get("in_channels", TransformerConfig.in_channels)
    if values.get("out_channels") not in (None, 0, channels):
        refuse("out_channels", values["out_channels"], channels, path)
    return values


def _vae_values(values: dict[str, Any], path: Path) -> dict[str, Any]:
    values = checked(values, options.VAE, path)
    channels = values.get("block_out_channels", VAEConfig.block_out_channels)
    levels = len(channels) if isinstance(channels, list | tuple) else None
    check_alike(values, "down_block_types", "DownEncoderBlock2D", levels, path)
    check_alike(values, "up_block_types", "UpDecoderBlock2D", levels, path)
    return values


def _text_values(values: dict[str, Any], variant: Variant, path: Path) -> dict[str, Any]:
    """The geometry with the layers that are needed, in our terms."""
    model_type = values.get("model_type")
    if model_type != variant.text.model_type:
        raise CheckpointError(
            f"{path}: model_type is {reprlib.repr(model_type)}, {variant.name} reads prompts with "
            f"{variant.text.model_type!r}"
        )
    tied, section = values.get("tie_word_embeddings", False), _TEXT_SECTIONS[model_type]
    if section:
        checked(values, options.MISTRAL3, path)
        inner = checked(_section(values, "text_config", path), options.MISTRAL, path, section)
    else:
        inner = checked(values, options.QWEN3, path)
    check_alike(inner, "layer_types", "full_attention", None, path, section)
    heads = inner["num_attention_heads"]
    if inner.get("num_key_value_heads") is None:
        inner["num_key_value_heads"] = heads
    if inner.get("head_dim") is None:
        inner["head_dim"] = _divided(inner["hidden_size"], heads)
    out_layers, available = variant.text.out_layers, inner["num_hidden_layers"]
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


def _vision_values(values: dict[str, Any], text: dict[str, Any], path: Path) -> dict[str, Any]:
    """The vision tower's geometry in our terms; `text` is that of the text model."""
    inner = checked(_section(values, "vision_config", path), options.PIXTRAL, path, _VISION_SECTION)
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
