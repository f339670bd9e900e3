"""Where weights come from: a folder in the diffusers layout."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_mlx.checkpoint import TensorInfo, read_header, read_json
from flux2_mlx.config import VARIANTS, TextConfig, TransformerConfig, VAEConfig, Variant, get_variant
from flux2_mlx.errors import CheckpointError

_PIPELINES = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline")
_STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FIXED_VAE = {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True, "act_fn": "silu"}


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
        transformer = TransformerConfig.from_dict(_transformer_values(folder))
        vae_values = read_json(folder / "vae" / "config.json")
        _fixed(vae_values, _FIXED_VAE, folder / "vae" / "config.json")
        text_values = read_json(folder / "text_encoder" / "config.json")
        row = _choose_variant(folder, index, transformer, text_values, variant)
        configs = {
            "transformer": transformer,
            "text_encoder": _text_config(text_values, row, folder),
            "vae": VAEConfig.from_dict(vae_values),
        }
        _check_scheduler(folder)
        files = {name: _weight_files(folder / name, stem) for name, stem in _STEMS.items()}
        tensors = {name: _headers(paths) for name, paths in files.items()}
        return cls(folder, row, configs, files, tensors)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names, sizes and headers of all weight files."""
        digest = hashlib.sha256()
        for component, paths in self.files.items():
            for path in paths:
                digest.update(f"{component}/{path.name}:{path.stat().st_size}\n".encode())
            for name, tensor in sorted(self.tensors[component].items()):
                digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
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


def _transformer_values(folder: Path) -> dict[str, Any]:
    path = folder / "transformer" / "config.json"
    values = read_json(path)
    _fixed(values, {"_class_name": "Flux2Transformer2DModel", "patch_size": 1, "out_channels": None}, path)
    return values


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


def _text_config(values: dict[str, Any], variant: Variant, folder: Path) -> TextConfig:
    out_layers = variant.text.out_layers
    path = folder / "text_encoder" / "config.json"
    _fixed(values, {"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False}, path)
    available = values.get("num_hidden_layers", 0)
    if available < max(out_layers):
        raise CheckpointError(f"{path}: {available} layers, but the states of layers {out_layers} are needed")
    rope = {"rope_theta": (values.get("rope_parameters") or values).get("rope_theta", variant.text.rope_theta)}
    return TextConfig.from_dict({**values, **rope, "out_layers": out_layers, "num_hidden_layers": max(out_layers)})


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
        shards = read_json(index).get("weight_map", {})
        files = [folder / name for name in sorted(set(shards.values()))]
    else:
        files = [folder / f"{stem}.safetensors"]
    missing = [path.name for path in files if not path.is_file()]
    if missing and any(path.suffix in _PICKLES for path in folder.glob("*")):
        raise CheckpointError(f"{folder} holds pickles, which could run code; fetch its .safetensors files")
    if missing or not files:
        raise CheckpointError(f"{folder} is incomplete: there is no {', '.join(missing) or 'weight file'}")
    return files


def _headers(paths: list[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        tensors |= read_header(path)
    return tensors
