"""Where weights come from: a folder in the diffusers layout."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_mlx.checkpoint import Component, TensorInfo, check_fit, read_headers, read_json
from flux2_mlx.config import VARIANTS, TextConfig, TransformerConfig, VAEConfig, Variant, get_variant
from flux2_mlx.errors import CheckpointError

_PIPELINES = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline")
_STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# The fingerprint reads this many pieces of this many bytes from each file, at even distances.
_SAMPLES, _SAMPLE_BYTES = 1024, 4096
_FIXED: dict[str, dict[str, Any]] = {
    "transformer": {"_class_name": "Flux2Transformer2DModel", "patch_size": 1, "out_channels": None},
    "text_encoder": {"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False},
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
    configs: dict[str, TransformerConfig | TextConfig | VAEConfig]
    files: dict[str, list[Path]]
    tensors: dict[str, dict[str, TensorInfo]]
    _arrays: dict[tuple[str, str], mx.array] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, variant: str | None = None) -> "Source":
        """Read the configurations and file headers of a diffusers folder.

        Args:
            folder: holds `model_index.json`.
            variant: the model's name where geometry and `model_index.json` can't tell, or None.

        Raises:
            CheckpointError: another model, pickles, missing or damaged files.
        """
        index = _read_index(folder)
        paths = {name: folder / name / "config.json" for name in _STEMS}
        values = {name: read_json(path) for name, path in paths.items()}
        for name, required in _FIXED.items():
            _fixed(values[name], required, paths[name])
        transformer = Component.described("transformer", values["transformer"], paths["transformer"]).config
        row = _choose_variant(folder, index, transformer, values["text_encoder"], variant)
        values["text_encoder"] = _text_values(values["text_encoder"], row, paths["text_encoder"])
        configs = {name: Component.described(name, values[name], path).config for name, path in paths.items()}
        check_fit(row, configs)
        _check_scheduler(folder)
        files = {name: _weight_files(folder / name, stem) for name, stem in _STEMS.items()}
        return cls(folder, row, configs, files, {name: read_headers(files[name]) for name in files})

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
                self._arrays |= {(component, key): array for key, array in mx.load(str(path)).items()}
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


def _choose_variant(
    folder: Path, index: dict[str, Any], transformer: TransformerConfig, text: dict[str, Any], name: str | None
) -> Variant:
    if transformer.guidance_embeds or text.get("model_type") != "qwen3":
        raise CheckpointError(
            f"{folder} is a FLUX.2 dev model (text encoder {text.get('model_type')!r}), which can't be converted yet"
        )
    same = [v for v in VARIANTS.values() if v.transformer == transformer]
    if name is not None:
        row = get_variant(name)
        if same and row not in same:
            raise CheckpointError(f"{folder} can't be {name}: its geometry is that of {_names(same)}")
        return row
    kv = index["_class_name"] == "Flux2KleinKVPipeline"
    rows = [v for v in same if v.kv_cache == kv and v.distilled == index.get("is_distilled", kv)]
    if len(rows) != 1:
        raise CheckpointError(
            f"can't tell which model {folder} is; name it with --variant ({_names(same or VARIANTS.values())})"
        )
    return rows[0]


def _names(variants: Iterable[Variant]) -> str:
    return ", ".join(variant.name for variant in variants)


def _text_values(values: dict[str, Any], variant: Variant, path: Path) -> dict[str, Any]:
    """The geometry with only the layers that are needed, and with the rotation's base where ours has it."""
    out_layers = variant.text.out_layers
    available = values.get("num_hidden_layers")
    if not isinstance(available, int) or available < max(out_layers):
        raise CheckpointError(f"{path}: {available} layers, but the states of layers {out_layers} are needed")
    rope = values.get("rope_parameters")
    theta = (rope if isinstance(rope, dict) else values).get("rope_theta", variant.text.rope_theta)
    return {**values, "rope_theta": theta, "out_layers": out_layers, "num_hidden_layers": max(out_layers)}


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
