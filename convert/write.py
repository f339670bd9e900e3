"""Writing an MLX checkpoint: tensor by tensor, all or nothing."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_mlx import files
from flux2_mlx.checkpoint import (
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    TENSOR_HASHES,
    Component,
    is_checkpoint,
    module_tensors,
    sealed,
)
from flux2_mlx.config import Config
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.quantization import BITS, DEFAULT_TEXT_QUANT, check_quant, quantize_array
from flux2_mlx.staging import bring_back, remove_leftovers, staged
from flux2_mlx.text import TOKENIZERS
from flux2_mlx.weights import (
    TensorInfo,
    Written,
    mismatches,
    raise_problems,
    read_json,
    write_bytes,
    write_safetensors,
)

from . import text, transformer, vae
from .blobs import blobs, check_blob
from .rules import Rule, Shape
from .sources import FLOATS, Source

# The part of the source that each component is made from.
_READS = {
    "transformer": "transformer",
    "text_encoder": "text_encoder",
    "language_model": "text_encoder",
    "vision": "text_encoder",
    "vae": "vae",
}
_DROPPED = {"transformer": transformer.is_dropped, "text_encoder": text.is_dropped, "vae": vae.is_dropped}
_SHARD_BYTES = 4 << 30
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)
# What a checkpoint consists of, folder by folder.
_OWN = {
    ".": (MANIFEST, TENSOR_HASHES, "verified.json", ".flux2-mlx-*.part", *_READS, "tokenizer", "scheduler"),
    **dict.fromkeys(_READS, ("config.json", "model*.safetensors", "model.safetensors.index.json")),
    "tokenizer": _TOKENIZER_FILES,
    "scheduler": ("scheduler_config.json",),
}
_METADATA = {"format": "mlx", "flux2-mlx": str(FORMAT_VERSION)}


@dataclass(frozen=True)
class _Layer:
    """A tensor of ours before quantization: how it is made, and the tensors that it is stored as."""

    plain: TensorInfo
    rule: Rule
    stored: dict[str, TensorInfo]


@dataclass(frozen=True)
class _Plan:
    """What is written for one component."""

    component: Component
    bits: int | None
    layers: list[_Layer]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.stored.values())


def write_checkpoint(
    source: Source,
    target: Path,
    quant: str = "bf16",
    text_quant: str | None = None,
    *,
    name: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Convert `source` into a new MLX checkpoint folder.

    Args:
        source: the opened source.
        target: the folder to make; it appears only when it is complete.
        quant: `bf16`, `qint8` or `qint4` for the transformer.
        text_quant: the same for the text encoder; None: 8 bit, or 4 bit with `qint4`.
        name: what the manifest calls the source; its folder's name if None.
        force: replace an MLX checkpoint at `target`.
        progress: called with bytes done and bytes in all: those that are written, and of a source in the Hub's cache
            also those that are compared with the hashes which the Hub states.

    Raises:
        InputError: `target` exists or can't be written, the disk is too small, an unknown quantization.
        CheckpointError: names, shapes or dtypes are not those of the model, weights are not finite, or a file of the
            source is not what the Hub states.
    """
    text_quant = text_quant or DEFAULT_TEXT_QUANT[check_quant(quant)]
    quants = {"transformer": check_quant(quant), "text_encoder": check_quant(text_quant), "vae": "bf16"}
    source.check()
    plans = [_plan(source, name, quants[_READS[name]]) for name in _READS if name in source.configs]
    _check_source(source, plans)
    _check_tokenizer(source)
    check_target(target, force)
    place = Path(os.path.realpath(target))  # where a link leads to
    needed = sum(plan.nbytes for plan in plans)
    stated = blobs([*_small_files(source.folder), *chain(*source.files.values())])
    meter = _Progress(needed + sum(blob.stat().st_size for blob in stated.values()), progress)
    manifest = {
        "format_version": FORMAT_VERSION,
        "variant": source.variant.name,
        "components": [plan.component.name for plan in plans],
        "quantization": {"transformer": quant, "text_encoder": text_quant},
        "source": {"name": name or source.folder.name, "fingerprint": source.fingerprint},
        "version": version("flux2-mlx"),
    }
    try:
        remove_leftovers(place.parent)
        _check_space(place.parent, needed)
        for path, blob in stated.items():
            check_blob(path, blob, meter.add)
        with staged(place, lambda: check_target(target, force), replace=force) as folder:
            _fill(_Folder(folder), source, plans, manifest, meter)
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror or error}") from error


def _small_files(folder: Path) -> list[Path]:
    return [path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.suffix in (".json", ".jinja")]


def _plan(source: Source, name: str, quant: str) -> _Plan:
    bare = Component(name, source.configs[name], None, ())
    component = bare.quantized(quant)
    plain, stored = module_tensors(bare.build()), module_tensors(component.build())
    layers = []
    for key, tensor in plain.items():
        base = key.removesuffix(".weight")
        keys = [key, f"{base}.scales", f"{base}.biases"] if f"{base}.scales" in stored else [key]
        layers.append(_Layer(tensor, _rule(name, key, tensor.shape, bare.config), {k: stored[k] for k in keys}))
    return _Plan(component, BITS[quant], layers)


def _rule(component: str, name: str, shape: Shape, config: Config) -> Rule:
    if component == "language_model":
        return text.later_rule_for(name, shape, config.num_hidden_layers)
    rules = {
        "transformer": transformer.rule_for,
        "text_encoder": text.rule_for,
        "vision": text.vision_rule_for,
        "vae": vae.rule_for,
    }
    return rules[component](name, shape)


def _check_source(source: Source, plans: list[_Plan]) -> None:
    """Compare the source with what the rules read, before anything is written."""
    for part, tensors in source.tensors.items():
        found = {k: x for k, x in tensors.items() if not _DROPPED[part](k, source.configs[part])}
        expected = {
            key: TensorInfo(
                found[key].dtype if key in found and found[key].dtype in FLOATS else "BF16",
                layer.rule.source_shape(layer.plain.shape),
            )
            for plan in plans
            if _READS[plan.component.name] == part
            for layer in plan.layers
            for key in layer.rule.sources
        }
        raise_problems(f"{source.folder / part} is not a {source.variant.name} {part}", mismatches(expected, found))


def _check_tokenizer(source: Source) -> None:
    file = source.folder / "tokenizer" / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{source.folder} is incomplete: there is no tokenizer/tokenizer.json")
    text = source.configs["text_encoder"]
    TOKENIZERS[text.model_type](file, text.vocab_size)


def check_target(target: Path, force: bool) -> None:
    """Raise InputError if a checkpoint can't be written at `target`."""
    bring_back(target)
    if target.exists() and not force:
        raise InputError(f"{target} exists; choose another folder or pass --force to replace it")
    if target.exists():
        _check_replaceable(target)
    if not target.parent.is_dir():
        raise InputError(f"can't write {target}: there is no folder {target.parent}")
    check_writable(target)


def _check_replaceable(target: Path) -> None:
    """Raise InputError if more would be lost with `target` than a checkpoint of ours."""
    try:
        ours = is_checkpoint(target) and "format_version" in read_json(target / MANIFEST)
    except CheckpointError:
        ours = False
    if not ours:
        raise InputError(f"{target} is not an MLX checkpoint, so --force does not replace it; remove it yourself")
    if foreign := next((path for path in sorted(target.rglob("*")) if not _is_own(path.relative_to(target))), None):
        raise InputError(f"{target} also holds {foreign.relative_to(target)}, which --force would remove; move it away")


def _is_own(path: Path) -> bool:
    """Whether a checkpoint may hold `path`, relative to it."""
    folder, name = path.parent.as_posix(), path.name
    return name == ".DS_Store" or any(fnmatch(name, pattern) for pattern in _OWN.get(folder, ()))


def check_writable(target: Path) -> None:
    """Raise InputError if nothing can be made where `target` would be; what is missing on the way to it may be."""
    try:
        # A link whose disk is not there counts as existing.
        existing = next(path for path in target.absolute().parents if path.exists() or path.is_symlink())
        files.check_writable(existing)
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror}; choose another folder") from error


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"no space: the model takes {needed / 1e9:.3g} GB, {folder} has {free / 1e9:.3g} GB free")


class _Progress:
    def __init__(self, total: int, report: Callable[[int, int], None] | None):
        self._done, self._total, self._report = 0, total, report

    def add(self, count: int) -> None:
        self._done += count
        if self._report:
            self._report(self._done, self._total)


class _Folder:
    """Writes the files of a checkpoint and records what they hold, as it is written."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._written: dict[str, Written] = {}

    def put(self, name: str, data: bytes) -> None:
        self._written[name] = write_bytes(self._path(name), data)

    def put_json(self, name: str, value: dict[str, Any]) -> None:
        self.put(name, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def put_weights(self, name: str, *args: Any) -> None:
        """`args` are those of `write_safetensors`."""
        self._written[name] = write_safetensors(self._path(name), *args)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the record of the tensors and the manifest, with that of all files and its own digest."""
        self.put_json(TENSOR_HASHES, {name: x.tensors for name, x in self._written.items() if x.tensors})
        files = {name: {"bytes": x.nbytes, "sha256": x.sha256} for name, x in self._written.items()}
        self.put_json(MANIFEST, sealed(manifest | {FILES: files}))

    def _path(self, name: str) -> Path:
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)
        return path


def _fill(folder: _Folder, source: Source, plans: list[_Plan], manifest: dict[str, Any], progress: _Progress) -> None:
    for plan in plans:
        _write_component(folder, source, plan, progress)
    copies = [f"tokenizer/{file}" for file in _TOKENIZER_FILES if (source.folder / "tokenizer" / file).is_file()]
    for name in (*copies, "scheduler/scheduler_config.json"):
        folder.put(name, (source.folder / name).read_bytes())
    folder.finish(manifest)


def _write_component(folder: _Folder, source: Source, plan: _Plan, progress: _Progress) -> None:
    config, part = plan.component.config.to_dict(), plan.component.name
    if plan.component.quantization:
        config["quantization"] = plan.component.quantization
    folder.put_json(f"{part}/config.json", config)
    shards = list(_shards(plan.layers))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, layers in zip(names, shards, strict=True):
        stored = {key: tensor for layer in layers for key, tensor in layer.stored.items()}
        arrays = (array for layer in layers for array in _arrays(source, plan, layer))
        folder.put_weights(f"{part}/{name}", stored, arrays, _METADATA, progress.add)
    if len(shards) > 1:
        weight_map = {key: name for name, layers in zip(names, shards, strict=True) for x in layers for key in x.stored}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        folder.put_json(f"{part}/model.safetensors.index.json", index)


def _shards(layers: list[_Layer]) -> Iterator[list[_Layer]]:
    shard, size = [], 0
    for layer in layers:
        nbytes = sum(tensor.nbytes for tensor in layer.stored.values())
        if shard and size + nbytes > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(layer)
        size += nbytes
    yield shard


def _arrays(source: Source, plan: _Plan, layer: _Layer) -> Iterator[mx.array]:
    """The stored arrays of a layer in the order of `layer.stored`, evaluated."""
    parts = [source.take(_READS[plan.component.name], key) for key in layer.rule.sources]
    mx.eval(parts)  # or the device would wait for the file
    array = layer.rule.apply(*parts).astype(mx.bfloat16)
    parts.clear()
    if not mx.isfinite(array).all().item():
        raise CheckpointError(
            f"{source.folder / _READS[plan.component.name]}: {', '.join(layer.rule.sources)} is not finite"
        )
    if len(layer.stored) == 1:
        yield array
    else:
        quantized = quantize_array(array, plan.bits)
        yield from (quantized[key.rpartition(".")[2]] for key in layer.stored)
