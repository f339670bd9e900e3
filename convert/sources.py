"""Where weights come from: a folder in the diffusers layout."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_mlx.checkpoint import COUNTS, Component, check_counts
from flux2_mlx.config import Config, Variant
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo, load_arrays, read_headers, read_json

from .configs import PICKLES, read_configs
from .text import canonical

_STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
# The fingerprint reads this many pieces of this many bytes from each file, at even distances.
_SAMPLES, _SAMPLE_BYTES = 1024, 4096


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
        row, configs = read_configs(folder, variant)
        if text_only:
            configs = {name: config for name, config in configs.items() if name not in ("transformer", "vae")}
        files = {name: _weight_files(folder / name, stem) for name, stem in _STEMS.items() if name in configs}
        tensors = {name: read_headers(files[name]) for name in files}
        tensors["text_encoder"] = {canonical(key): tensor for key, tensor in tensors["text_encoder"].items()}
        return cls(folder, row, configs, files, tensors)

    def check(self) -> None:
        """CheckpointError if the configs ask for more than the files hold, or for networks that can't be built."""
        for name, config in self.configs.items():
            part = name if name in self.tensors else "text_encoder"  # which the other two are made from
            path = self.folder / part / "config.json"
            check_counts(_counts(name, config), self.tensors[part], path)
            Component(name, config, None, ()).check(path)

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


def _counts(name: str, config: Any) -> dict[str, tuple[str, int]]:
    """What `check_counts` compares with names in the source, by the start of these."""
    if name == "transformer":
        return {
            "transformer_blocks.": ("num_layers", config.num_layers),
            "single_transformer_blocks.": ("num_single_layers", config.num_single_layers),
        }
    if name in ("text_encoder", "language_model"):
        return {"model.layers.": ("num_hidden_layers", config.num_hidden_layers + config.num_later_layers)}
    return COUNTS[name](config)


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
    if missing and any(path.suffix in PICKLES for path in folder.glob("*")):
        raise CheckpointError(f"{folder} holds pickles, which could run code; fetch its .safetensors files")
    if missing or not files:
        raise CheckpointError(f"{folder} is incomplete: there is no {', '.join(missing) or 'weight file'}")
    return files
