"""Where weights come from: a folder in the diffusers layout."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_mlx.checkpoint import Component, check_counts
from flux2_mlx.components import COMPONENTS
from flux2_mlx.config import Config, Variant
from flux2_mlx.errors import CheckpointError
from flux2_mlx.hub_cache import PICKLES
from flux2_mlx.weights import TensorInfo, load_arrays, read_headers, read_json

from .configs import COMPLETE, describe, read_configs, refuse_quantized
from .text import canonical

_STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
TOKENIZER = "tokenizer/tokenizer.json"
FLOATS = ("BF16", "F16", "F32")
# What the names of tensors end with that a quantization adds to a model.
_MARKS = {
    "quantized by bitsandbytes": (".absmax", ".quant_map", ".SCB", "bitsandbytes__nf4", "bitsandbytes__fp4"),
    "quantized by quanto": ("._data", "._scale"),
    "quantized by torchao": ("_qdata", ":_data"),
    "quantized for nunchaku": (".wscales", ".smooth_factor", ".smooth"),
    "quantized by GPTQ or AWQ": (".qweight", ".qzeros"),
    "in NVFP4": (".weight_scale_2",),
    "in fp8 with scales": (".weight_scale", ".weight_scale_inv", ".scale_weight", "scaled_fp8", ".input_scale"),
    "quantized by MLX": (".scales",),
}
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
            CheckpointError: another model, pickles, missing or damaged files; the variant comes last.
        """
        description = describe(folder)
        files = {
            name: _weight_files(folder / name, stem)
            for name, stem in _STEMS.items()
            if name == "text_encoder" or not text_only
        }
        if not (folder / TOKENIZER).is_file():
            advice = "add that of the model that it was made from, in a local copy of a repo"
            raise CheckpointError(f"{folder} is incomplete: there is no {TOKENIZER}; {advice}")
        tensors = {name: read_headers(files[name]) for name in files}
        for name, found in tensors.items():
            if how := _quantized(found):
                refuse_quantized(folder / name, how)
        row, configs = read_configs(description, variant)
        if text_only:
            configs = {name: config for name, config in configs.items() if name not in ("transformer", "vae")}
        tensors["text_encoder"] = {canonical(key): tensor for key, tensor in tensors["text_encoder"].items()}
        return cls(folder, row, configs, files, tensors)

    def check(self) -> None:
        """CheckpointError if the configs ask for more than the files hold, or for networks that can't be built."""
        for name, config in self.configs.items():
            part = COMPONENTS[name].part
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
    return COMPONENTS[name].counts(config)


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The files of a network: those that an index lists, or one, or numbered ones without an index, or else the same
    of the variants `bf16` and `fp16`, which have that in their names."""
    for variant in ("", ".bf16", ".fp16"):
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            return _present(folder, _indexed(index))
        if (file := folder / f"{stem}{variant}.safetensors").is_file():
            return [file]
        if numbered := _numbered(folder, stem, variant):
            return _present(folder, numbered)
    return _present(folder, [f"{stem}.safetensors"])


def _indexed(index: Path) -> list[str]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    if outside := [name for name in shards.values() if Path(name).name != name or "\0" in name]:
        raise CheckpointError(f"{index} names {outside[0][:80]!r}, which is no file of its folder")
    return sorted(set(shards.values()))


def _numbered(folder: Path, stem: str, variant: str) -> list[str]:
    """The names of the whole set that files such as `model-00001-of-00003.safetensors` are of; none if there are none.
    The variant stands before the numbers or, of older saves, after them."""
    found = [path.name for path in folder.glob(f"{stem}*.safetensors")]
    for start, end in ((stem + variant, ""), (stem, variant)):
        numbers = re.compile(rf"{re.escape(start)}-(\d{{5}})-of-(\d{{5}}){re.escape(end)}\.safetensors")
        if counts := {int(match[2]) for match in map(numbers.fullmatch, found) if match}:
            count = max(counts)
            return [f"{start}-{number:05}-of-{count:05}{end}.safetensors" for number in range(1, count + 1)]
    return []


def _present(folder: Path, names: list[str]) -> list[Path]:
    """The files of these names; CheckpointError if there are not all of them."""
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing and names:
        return [folder / name for name in names]
    suffixes = {path.suffix for path in folder.glob("*")}
    if suffixes & set(PICKLES):
        raise CheckpointError(f"{folder} holds pickles, which could run code; fetch its .safetensors files")
    if ".gguf" in suffixes:
        refuse_quantized(folder, "in GGUF files")
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise CheckpointError(
        f"{folder} is incomplete: there is no {', '.join(missing[:3]) or 'weight file'}{more}; {COMPLETE}"
    )


def _quantized(tensors: dict[str, TensorInfo]) -> str | None:
    """How weights are quantized, by the names and dtypes that it leaves; None: they are not."""
    dtypes = {tensor.dtype for name, tensor in tensors.items() if name.endswith("weight") and len(tensor.shape) > 1}
    for how, ends in _MARKS.items():
        if any(name.endswith(ends) for name in tensors):
            return how
    if other := sorted(dtypes - set(FLOATS)):
        return "in fp8" if other[0].startswith("F8") else f"stored as {other[0]}"
    return None
