"""Where weights come from: a folder in the diffusers layout."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_mlx.checkpoint import Component, check_fit
from flux2_mlx.config import VARIANTS, Config, TransformerConfig, Variant, VisionConfig, get_variant
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo, load_arrays, read_headers, read_json

from .text import canonical

_PIPELINES = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline")
_STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# The fingerprint reads this many pieces of this many bytes from each file, at even distances.
_SAMPLES, _SAMPLE_BYTES = 1024, 4096
_FIXED: dict[str, dict[str, Any]] = {
    "transformer": {"_class_name": "Flux2Transformer2DModel", "patch_size": 1, "out_channels": None},
    "vae": {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True, "act_fn": "silu"},
}


def _fixed(values: dict[str, Any], required: dict[str, Any], path: Path) -> None:
    for key, value in required.items():
        if values.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} is {values[key]!r}, FLUX.2 has {value!r}")


@dataclass
class Source:
    """An opened source: parsed configurations and the headers of its weight files, no weights.

    Build it with `Source.open`.
    """

    folder: Path
    variant: Variant
    configs: dict[str, Config]
    files: dict[str, list[Path]]
    tensors: dict[str, dict[str, TensorInfo]]
    _arrays: dict[tuple[str, str], mx.array] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, variant: str | None = None, *, text_only: bool = False) -> "Source":
        """Read the configurations and file headers of a diffusers folder.

        Args:
            folder: holds `model_index.json`.
            variant: the model's name where geometry and `model_index.json` can't tell, or None.
            text_only: leave out the transformer and the VAE, whose weights need not be there.

        Raises:
            CheckpointError: another model, pickles, missing or damaged files.
        """
        index = _read_index(folder)
        paths = {name: folder / name / "config.json" for name in _STEMS}
        values = {name: read_json(path) for name, path in paths.items()}
        for name, required in _FIXED.items():
            _fixed(values[name], required, paths[name])
        text = values["text_encoder"]
        transformer = Component.described("transformer", values["transformer"], paths["transformer"]).config
        row = _choose_variant(folder, index, transformer, variant)
        values["text_encoder"] = _text_values(text, row, paths["text_encoder"])
        if values["text_encoder"]["num_later_layers"]:
            values["language_model"], paths["language_model"] = values["text_encoder"], paths["text_encoder"]
        if "vision_config" in text:
            values["vision"], paths["vision"] = _vision_values(text, paths["text_encoder"]), paths["text_encoder"]
        configs = {name: Component.described(name, values[name], path).config for name, path in paths.items()}
        check_fit(row, configs)
        _check_scheduler(folder)
        if text_only:
            configs = {name: config for name, config in configs.items() if name not in ("transformer", "vae")}
        files = {name: _weight_files(folder / name, stem) for name, stem in _STEMS.items() if name in configs}
        tensors = {name: read_headers(files[name]) for name in files}
        tensors["text_encoder"] = {canonical(key): tensor for key, tensor in tensors["text_encoder"].items()}
        return cls(folder, row, configs, files, tensors)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and sizes of all weight files and pieces of their content, headers included.

        Two fine-tunes of a model differ in nearly every tensor, so pieces tell them apart as well as all bytes would.
        """
        digest = hashlib.sha256()
        for component, paths in self.files.items():
            for path in paths:
                size = path.stat().st_size
                digest.update(f"{component}/{path.name}:{size}\n".encode())
                with path.open("rb") as file:
                    for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                        file.seek(start)
                        digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def take(self, component: str, name: str) -> mx.array:
        """The tensor, still unread; it is handed out once, so that reading it leaves nothing behind here."""
        if (component, name) not in self._arrays:
            for path in self.files[component]:
                self._arrays |= {(component, canonical(key)): array for key, array in load_arrays(path).items()}
        return self._arrays.pop((component, name))


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise CheckpointError(f"there is no file or folder {folder}")
    if folder.is_file():
        pickle = "a pickle, which could run code; " if folder.suffix in _PICKLES else ""
        raise CheckpointError(f"{folder} is {pickle}not a model folder; give a folder in the diffusers layout")
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is no model folder in the diffusers layout: it has no model_index.json")
    index = read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in _PIPELINES:
        raise CheckpointError(f"{folder} holds a {pipeline}, not FLUX.2; its class must be one of {_PIPELINES}")
    return index


def _choose_variant(folder: Path, index: dict[str, Any], transformer: TransformerConfig, name: str | None) -> Variant:
    same = [v for v in VARIANTS.values() if v.transformer == transformer]
    if name is not None:
        row = get_variant(name)
        if same and row not in same:
            raise CheckpointError(f"{folder} can't be {name}: its geometry is that of {_names(same)}")
        return row
    kv = index["_class_name"] == "Flux2KleinKVPipeline"
    distilled = index.get("is_distilled", index["_class_name"] != "Flux2KleinPipeline")
    rows = [v for v in same if v.kv_cache == kv and v.distilled == distilled]
    if len(rows) != 1:
        raise CheckpointError(
            f"can't tell which model {folder} is; name it with --variant ({_names(same or VARIANTS.values())})"
        )
    return rows[0]


def _names(variants: Iterable[Variant]) -> str:
    return ", ".join(variant.name for variant in variants)


def _text_values(values: dict[str, Any], variant: Variant, path: Path) -> dict[str, Any]:
    """The geometry with the layers that are needed, in our terms."""
    model_type = values.get("model_type")
    if model_type != variant.text.model_type:
        expected = variant.text.model_type
        raise CheckpointError(f"{path} is a {model_type} model, {variant.name} reads prompts with {expected}")
    inner = _section(values, "text_config", path) if "text_config" in values else values
    _fixed(inner, {"attention_bias": False, "hidden_act": "silu"}, path)
    if model_type == "qwen3":
        _fixed(inner, {"use_sliding_window": False}, path)
    else:
        _fixed(inner, {"sliding_window": None}, path)
    out_layers = variant.text.out_layers
    available = inner.get("num_hidden_layers")
    if not isinstance(available, int) or available < max(out_layers):
        raise CheckpointError(f"{path}: {available} layers, but the states of layers {out_layers} are needed")
    later = available - max(out_layers) if variant.text.num_later_layers else 0
    return {
        **inner,
        "model_type": model_type,
        "rope_theta": _rope_theta(inner, variant.text.rope_theta),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "out_layers": out_layers,
        "num_hidden_layers": max(out_layers),
        "num_later_layers": later,
    }


def _vision_values(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The vision tower's geometry in our terms."""
    inner, text = _section(values, "vision_config", path), _section(values, "text_config", path)
    _fixed(inner, {"model_type": "pixtral", "hidden_act": "silu", "num_channels": 3}, path)
    _fixed(
        values,
        {"projector_hidden_act": "gelu", "multimodal_projector_bias": False, "vision_feature_layer": -1},
        path,
    )
    return {
        **inner,
        "rope_theta": _rope_theta(inner, VisionConfig.rope_theta),
        "text_hidden_size": text.get("hidden_size"),
        "spatial_merge_size": values.get("spatial_merge_size", VisionConfig.spatial_merge_size),
        "projector_eps": text.get("rms_norm_eps", VisionConfig.projector_eps),
    }


def _section(values: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = values.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} has no {name}")
    return section


def _rope_theta(values: dict[str, Any], default: float) -> float:
    """The rotation's base, which transformers nests under `rope_parameters` since version 5."""
    nested = values.get("rope_parameters")
    return (nested if isinstance(nested, dict) else values).get("rope_theta", default)


def _check_scheduler(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    required = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        "time_shift_type": "exponential",
        "num_train_timesteps": 1000,
    }
    _fixed(read_json(path), required, path)


def _weight_files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index} has no weight_map from tensors to files")
        files = [folder / name for name in sorted(set(shards.values()))]
    else:
        files = [folder / f"{stem}.safetensors"]
    missing = [path.name for path in files if not path.is_file()]
    if missing and any(path.suffix in _PICKLES for path in folder.glob("*")):
        raise CheckpointError(f"{folder} holds pickles, which could run code; fetch its .safetensors files")
    if missing or not files:
        raise CheckpointError(f"{folder} is incomplete: there is no {', '.join(missing) or 'weight file'}")
    return files
