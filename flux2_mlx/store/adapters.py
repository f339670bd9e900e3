"""Adapters by their names, and those that are on the disk."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..convert import adapter
from ..convert.lora import AdapterFile, Inspection, inspect, save_adapter, saving_notes
from ..errors import CheckpointError, InputError
from ..weights import read_header
from .adapter_sources import ADAPTERS, cached_files, cached_origin, find_adapter, own_files, read_here
from .first_use import Progress, labelled
from .folder import models_folder


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on the disk: what it is asked for as, where it is and its bytes, and what it is, or what is wrong."""

    source: str
    path: Path
    nbytes: int
    found: Inspection | None
    problem: str | None = None


def open_adapter(
    source: str | os.PathLike[str], weight_name: str | None = None, *, progress: Progress | None = None
) -> AdapterFile:
    """The adapter in a file, a folder, or a repo of the Hub, from where it is fetched after a look at its header.

    Args:
        source, weight_name: see `find_adapter`.
        progress: called with bytes done, bytes in all, and `download`.

    Raises:
        InputError, DownloadError, CheckpointError: as `find_adapter` and `FoundAdapter.fetch` have it.
    """
    with find_adapter(source, weight_name) as found:
        found.fetch(progress)
        return found.file


def inspect_adapter(source: str | os.PathLike[str]) -> Inspection:
    """What an adapter is, of which nothing but the header and single numbers is read or fetched; see `find_adapter`."""
    with find_adapter(source) as found:
        return inspect(found.file, found.source)


def convert_adapter(
    source: str | os.PathLike[str], target: Path, *, force: bool = False, progress: Progress | None = None
) -> tuple[Path, list[str]]:
    """Write an adapter in the layout of diffusers; gives the file, and what a user should know of it.

    Args:
        source: see `find_adapter`.
        target, force: see `save_adapter`.
        progress: called with bytes done, bytes in all, and `download` or `convert`.
    """
    found = open_adapter(source, progress=progress)
    path = save_adapter(found, target, force=force, progress=labelled(progress, "convert"))
    return path, saving_notes(found)


def adapters_folder(models_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where a user keeps adapters."""
    return models_folder(models_dir) / ADAPTERS


def stored_adapters(models_dir: str | os.PathLike[str] | None = None) -> Iterator[StoredAdapter]:
    """The adapters in the folder `loras` of the models folder, and those in the Hub's cache, by their headers."""
    for path in own_files(models_dir):
        yield _stored(path, str(path))
    for path, _ in cached_files():
        if _is_adapter(path):
            yield _stored(path, cached_origin(path) or str(path))


def _stored(path: Path, source: str) -> StoredAdapter:
    nbytes = path.stat().st_size if path.is_file() else 0
    try:
        return StoredAdapter(source, path, nbytes, inspect(read_here(path), source))
    except (CheckpointError, InputError) as error:
        return StoredAdapter(source, path, nbytes, None, str(error).removeprefix(f"{path}: "))


def _is_adapter(path: Path) -> bool:
    try:
        return adapter(read_header(path)) is not None
    except CheckpointError:
        return False
