"""The folder of an MLX checkpoint as it is written: layer by layer, all or nothing."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_mlx import staging
from flux2_mlx.checkpoint import (
    FILES,
    FORMAT_VERSION,
    LAST_USED,
    MANIFEST,
    TENSOR_HASHES,
    Component,
    is_checkpoint,
    sealed,
)
from flux2_mlx.components import COMPONENTS, by_group
from flux2_mlx.config import Variant
from flux2_mlx.copying import Copied, FileVersion
from flux2_mlx.device import failures
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.exclusion import MARK
from flux2_mlx.json_files import read_json
from flux2_mlx.staging import bring_back, remove_leftovers, staged
from flux2_mlx.text import TOKENIZER_FILES
from flux2_mlx.verification import Meter, check_hashes, hashed_bytes
from flux2_mlx.weights import TensorInfo, Tensors, Written, write_bytes, write_safetensors

from .blobs import check_blob

_SHARD_BYTES = 4 << 30
# What a checkpoint consists of, folder by folder.
_OWN = {
    ".": (
        MANIFEST,
        TENSOR_HASHES,
        LAST_USED,
        MARK,
        "verified.json",
        ".flux2-mlx-*.part",
        *COMPONENTS,
        "tokenizer",
        "scheduler",
    ),
    **dict.fromkeys(COMPONENTS, ("config.json", "model*.safetensors", "model.safetensors.index.json")),
    "tokenizer": TOKENIZER_FILES,
    "scheduler": ("scheduler_config.json",),
}
_METADATA = {"format": "mlx", "flux2-mlx": str(FORMAT_VERSION)}


@dataclass(frozen=True)
class Part:
    """A network as it is written, and its tensors as they are stored; those that are only `copied` are not read."""

    component: Component
    tensors: Tensors
    copied: Mapping[str, Copied] = field(default_factory=dict)

    def contents(self, names: Iterable[str]) -> Iterator[mx.array | Copied]:
        """What is written of each tensor, in this order."""
        names = list(names)
        made = iter(self.tensors.read([name for name in names if name not in self.copied]))
        for name in names:
            yield self.copied[name] if name in self.copied else next(made)


@dataclass(frozen=True)
class Inspection:
    """A look at all bytes that a checkpoint is made from.

    Attributes:
        stored: checkpoints of ours, each with the networks that are taken from it; None: all.
        blobs: files of the Hub's cache, each with its blob.
        files: those of weights, of which none may change until all is written.
    """

    stored: Sequence[tuple[Path, Sequence[str] | None]] = ()
    blobs: Mapping[Path, Path] = field(default_factory=dict)
    files: Sequence[FileVersion] = ()

    @property
    def nbytes(self) -> int:
        """How many bytes there are to be read."""
        hashed = sum(hashed_bytes(folder, names) for folder, names in self.stored)
        return hashed + sum(blob.stat().st_size for blob in self.blobs.values())

    def run(self, report: Callable[[int], None]) -> None:
        """Read them, of which `report` is told; CheckpointError if they are not what was recorded or stated."""
        for path, blob in self.blobs.items():
            check_blob(path, blob, report)
        for folder, names in self.stored:
            check_hashes(folder, report, names)

    def check(self) -> None:
        """CheckpointError if one of the files has changed."""
        for file in self.files:
            file.check()


def derived_source(source: Mapping[str, Any], made: Any) -> dict[str, Any]:
    """What a checkpoint says of its source, with the fingerprint of what is `made` of that as JSON can say."""
    text = json.dumps([source.get("fingerprint"), made], sort_keys=True)
    return {**source, "fingerprint": hashlib.sha256(text.encode()).hexdigest()}


def new_manifest(
    variant: Variant, components: Iterable[str], quants: tuple[str, str], source: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint says of itself, besides the record of its files.

    Args:
        variant: the model.
        components: the names of its networks.
        quants: how the transformer and the text encoder are stored.
        source: what they were made from.
    """
    return {
        "format_version": FORMAT_VERSION,
        "variant": variant.name,
        "components": list(components),
        "quantization": by_group(*quants),
        "source": source,
        "version": version("flux2-mlx"),
    }


@failures(smaller=None)
def write_folder(
    target: Path,
    parts: list[Part],
    manifest: dict[str, Any],
    *,
    tokenizer: Path,
    schedule: Path,
    inspection: Inspection,
    force: bool,
    progress: Callable[[int, int], object] | None,
) -> None:
    """Write a checkpoint of these networks, with copies of a tokenizer and a schedule.

    Args:
        target: the folder to make; it appears only when it is complete.
        parts: the networks.
        manifest: what it says besides the record of its files; see `new_manifest`.
        tokenizer: the folder that its tokenizer is in.
        schedule: the file of its schedule.
        inspection: made before anything is written.
        force: replace an MLX checkpoint at `target`.
        progress: called with bytes inspected and written, and those in all.

    Raises:
        InputError: `target` exists or can't be written, or the disk is too small.
        CheckpointError: a file that it is made from was changed meanwhile.
    """
    check_target(target, force)
    place = Path(os.path.realpath(target))  # where a link leads to
    needed = sum(part.component.nbytes for part in parts)
    meter = Meter(needed + inspection.nbytes, progress)
    try:
        remove_leftovers(place.parent)
        check_space(place.parent, needed, "the model")
        inspection.run(meter.add)
        with staged(place, lambda: check_target(target, force), replace=force) as folder:
            written = _Folder(folder)
            for part in parts:
                _write_part(written, part, meter)
            for path in (tokenizer / name for name in TOKENIZER_FILES):
                if path.is_file():
                    written.put(f"tokenizer/{path.name}", path.read_bytes())
            written.put("scheduler/scheduler_config.json", schedule.read_bytes())
            inspection.check()
            written.finish(manifest)
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror or error}") from error


def check_target(target: Path, force: bool) -> None:
    """Raise InputError if a checkpoint can't be written at `target`."""
    bring_back(target)
    if target.exists() and not force:
        raise InputError(f"{target} exists; choose another folder or pass force=True to replace it")
    if target.exists():
        _check_replaceable(target)
    if not target.parent.is_dir():
        raise InputError(f"can't write {target}: there is no folder {target.parent}")
    check_writable(target)


def _check_replaceable(target: Path) -> None:
    """Raise InputError if `target` is no checkpoint of ours, or holds other files that would be lost with it."""
    try:
        ours = is_checkpoint(target) and "format_version" in read_json(target / MANIFEST)
    except CheckpointError:
        ours = False
    if not ours:
        raise InputError(f"{target} is not an MLX checkpoint, so force=True does not replace it; remove it yourself")
    if foreign := next((path for path in sorted(target.rglob("*")) if not is_own(path.relative_to(target))), None):
        raise InputError(
            f"{target} also holds {foreign.relative_to(target)}, which force=True would remove; move it away"
        )


def is_own(path: Path) -> bool:
    """Whether `path`, relative to a checkpoint's folder, is a file that a checkpoint may hold."""
    folder, name = path.parent.as_posix(), path.name
    return name == ".DS_Store" or any(fnmatch(name, pattern) for pattern in _OWN.get(folder, ()))


def check_writable(target: Path) -> None:
    """Raise InputError if nothing can be made where `target` would be. Its parent folders need not exist yet."""
    try:
        # A link whose disk is not there counts as existing.
        existing = next(path for path in target.absolute().parents if path.exists() or path.is_symlink())
        staging.check_writable(existing)
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror}; choose another folder") from error


def check_space(folder: Path, needed: int, what: str) -> None:
    """InputError if so many bytes of `what` don't fit on the disk."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"no space: {what} takes {needed / 1e9:.3g} GB, {folder} has {free / 1e9:.3g} GB free")


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
        """Write a safetensors file; `args` follow the path in `write_safetensors`."""
        self._written[name] = write_safetensors(self._path(name), *args)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the record of the tensors, then the manifest with the record of all files and its own digest."""
        self.put_json(TENSOR_HASHES, {name: x.tensors for name, x in self._written.items() if x.tensors})
        record = {name: {"bytes": x.nbytes, "sha256": x.sha256} for name, x in self._written.items()}
        self.put_json(MANIFEST, sealed(manifest | {FILES: record}))

    def _path(self, name: str) -> Path:
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)
        return path


def _write_part(folder: _Folder, part: Part, progress: Meter) -> None:
    config = part.component.config.to_dict()
    place = part.component.name
    if part.component.quantization:
        config["quantization"] = part.component.quantization
    folder.put_json(f"{place}/config.json", config)
    stored = part.component.infos
    shards = list(_shards(stored))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        folder.put_weights(f"{place}/{name}", shard, part.contents(shard), _METADATA, progress.add)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": part.component.nbytes}, "weight_map": weight_map}
        folder.put_json(f"{place}/model.safetensors.index.json", index)


def _shards(tensors: dict[str, TensorInfo]) -> Iterator[dict[str, TensorInfo]]:
    """The tensors file by file; those of a layer stay together."""
    shard: dict[str, TensorInfo] = {}
    size = 0
    for _, names in groupby(tensors, key=lambda name: name.rpartition(".")[0]):
        layer = {name: tensors[name] for name in names}
        nbytes = sum(tensor.nbytes for tensor in layer.values())
        if shard and size + nbytes > _SHARD_BYTES:
            yield shard
            shard = {}
            size = 0
        shard |= layer
        size += nbytes
    yield shard
