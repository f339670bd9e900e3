"""What is on the disk: converted models, their sources in the Hub's cache, and what runs leave; and removing it.

Links are never followed, and files that are not ours are never removed.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import LAST_USED, MANIFEST, is_checkpoint
from ..config import VARIANTS
from ..convert import is_own
from ..embedding_cache import FOLDER as PROMPTS
from ..embedding_cache import UNFINISHED, EmbeddingCache
from ..errors import CheckpointError, InputError
from ..files import Claim
from ..hub import (
    PARTIAL,
    cache_folder,
    remove_empty,
    remove_files,
    snapshot_files,
    storage_of,
)
from ..json_files import read_json
from ..layout import INDEX
from ..staging import bring_all_back, is_work, leftovers, remove_abandoned, remove_leftovers
from .adapter_sources import ADAPTERS
from .parts import WHOLE

_IGNORED = (".DS_Store",)
_REPOS = {variant.repo.lower(): variant.name for variant in VARIANTS.values() if variant.repo}


@dataclass(frozen=True)
class Item:
    """Something on the disk.

    `kind` is `converted`, `source`, `prompts`, `unfinished`, `leftover`, or `other`. `names` are those that it is known
    by, in lower case; `nbytes` what removing it gives back; `used` when it was last used, in seconds since 1970;
    `note` says more in a word or two. `remove` removes it, if it is `removable`, and gives the paths that stayed.
    """

    kind: str
    name: str
    path: Path
    nbytes: int
    used: float | None
    note: str
    names: frozenset[str]
    remove: Callable[[], list[Path]]
    removable: bool = True

    def claim(self) -> AbstractContextManager[object]:
        """Have it for oneself while it is removed; InputError if a download, conversion or run uses it."""
        is_used = self.kind in ("converted", "source") and self.path.exists()
        return Claim(self.path, alone=True) if is_used else nullcontext()


def inventory(models: Path, cache: Path | None = None) -> list[Item]:
    """What there is in a models folder and of FLUX.2 in the Hub's `cache`, by default that of the environment."""
    bring_all_back(models)
    return [*_models(models), *_sources(cache_folder() if cache is None else cache)]


def is_downloaded(repo: str) -> bool:
    """Whether there is any file of a repo in the Hub's cache."""
    return any(snapshot_files(storage_of(cache_folder(), repo)))


def _models(models: Path) -> Iterator[Item]:
    dead = dict(leftovers(models))
    for path in sorted(models.iterdir()) if models.is_dir() else ():
        if path.name in _IGNORED:
            continue
        if path.is_symlink():
            yield _other(path, "a link")
        elif path.name in (PROMPTS, UNFINISHED):
            yield from _entries(path)
        elif path.name == ADAPTERS:
            yield _other(path, "adapters")
        elif path in dead:
            yield Item(
                "leftover", path.name, path, _size(path), _changed(path), f"of {dead[path]}", frozenset(), _swept(path)
            )
        elif is_checkpoint(path):
            yield _converted(path)
        else:
            yield _other(path, "being written" if is_work(path) else "not ours")


def _other(path: Path, note: str) -> Item:
    names = frozenset({path.name.lower()})
    return Item("other", path.name, path, _size(path), _changed(path), note, names, lambda: [path], removable=False)


def _entries(folder: Path) -> Iterator[Item]:
    """Files of a cache, which several kinds of things are kept in."""
    kept = EmbeddingCache(folder, 0)
    if entries := kept.entries():
        kind, what = (PROMPTS, "encoded prompts") if folder.name == PROMPTS else (UNFINISHED, "images to be decoded")

        def remove() -> list[Path]:
            kept.clear()
            return []

        nbytes = sum(entry.size for entry in entries)
        used = entries[-1].used / 1e9
        yield Item(kind, folder.name, folder, nbytes, used, f"{len(entries)} {what}", frozenset(), remove)


def _swept(path: Path) -> Callable[[], list[Path]]:
    def remove() -> list[Path]:
        remove_leftovers(path.parent)
        return [path] if path.exists() else []

    return remove


def _converted(folder: Path) -> Item:
    names = {folder.name.lower()}
    note = "damaged"
    try:
        manifest = read_json(folder / MANIFEST)
        source, bits = (_table(manifest.get(key)) for key in ("source", "quantization"))
        names |= _names(str(source.get("name", "")))
        note = f"{bits.get('transformer')}, text {bits.get('text_encoder')}"
    except CheckpointError:
        pass
    used = max((_changed(folder / name) or 0 for name in (LAST_USED, MANIFEST)), default=0) or None
    own = sum(_size(path) for path in _own(folder))
    return Item("converted", folder.name, folder, own, used, note, frozenset(names), lambda: _remove(folder))


def _names(source: str) -> set[str]:
    """The names that a model made from `source` goes by; one that only resembles a model of the table lacks its
    name."""
    name = source.lower()
    variant = _REPOS.get(name, name)
    return {name, variant, *(repo for repo, known in _REPOS.items() if known == variant)} - {""}


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _own(folder: Path) -> list[Path]:
    """The files of a checkpoint, the manifest last, so that what is half removed is still known."""
    found = []
    for place, _, names in os.walk(folder):
        paths = [Path(place, name) for name in names]
        found += [path for path in paths if not path.is_symlink() and is_own(path.relative_to(folder))]
    return sorted(found, key=lambda path: (path == folder / MANIFEST, path))


def _remove(folder: Path) -> list[Path]:
    try:
        for path in _own(folder):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"can't remove {error.filename}: {error.strerror}") from error
    for place, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(place)
    return sorted(folder.rglob("*")) or ([folder] if folder.exists() else [])


def _sources(cache: Path) -> Iterator[Item]:
    for storage in sorted(cache.glob("models--*--*")):
        repo = storage.name.removeprefix("models--").replace("--", "/", 1)
        files = [path for path in snapshot_files(storage) if WHOLE.may_need(_within_snapshot(path, storage))]
        partials = list((storage / "blobs").glob(f"*{PARTIAL}"))
        if not partials and not (repo.lower() in _REPOS and files) and not any(map(_is_flux2, files)):
            continue
        blobs = {os.path.realpath(path) for path in files if path.exists()} | {str(path) for path in partials}
        status = [os.stat(blob) for blob in blobs]
        yield Item(
            "source",
            repo,
            storage,
            sum(found.st_size for found in status),
            max((found.st_atime for found in status), default=None),
            "a link" if storage.is_symlink() else "incomplete" if partials else "download",
            frozenset(_names(repo)),
            _removed_source(storage, files, partials),
            removable=not storage.is_symlink(),
        )


def _within_snapshot(path: Path, storage: Path) -> str:
    return "/".join(path.relative_to(storage / "snapshots").parts[1:])


def _is_flux2(path: Path) -> bool:
    if path.name != INDEX:
        return False
    try:
        return str(read_json(path).get("_class_name")).startswith("Flux2")
    except CheckpointError:
        return False


def _removed_source(storage: Path, files: list[Path], partials: list[Path]) -> Callable[[], list[Path]]:
    def remove() -> list[Path]:
        try:
            remove_files(storage, files)
        except OSError as error:
            raise InputError(f"can't remove {error.filename}: {error.strerror}") from error
        for partial in partials:
            remove_abandoned(partial)
        remove_empty(storage / "snapshots")
        if not (storage / "snapshots").exists():  # what the Hub's library notes of them
            with suppress(OSError):
                (storage / "refs" / "main").unlink()
        remove_empty(storage)
        return sorted(snapshot_files(storage))

    return remove


def _size(path: Path) -> int:
    """Bytes of a file or of all in a folder; a link counts nothing."""
    if path.is_symlink():
        return 0
    if not path.is_dir():
        return path.lstat().st_size
    return sum(os.lstat(Path(place, name)).st_size for place, _, names in os.walk(path) for name in names)


def _changed(path: Path) -> float | None:
    try:
        return path.lstat().st_mtime
    except OSError:
        return None
