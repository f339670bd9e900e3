"""The Hub's cache on disk: a repo's blobs, named by their hash, and snapshots of links to them. Nothing is fetched."""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import CheckpointError, DownloadError
from ..json_files import read_json
from ..layout import INDEX, PICKLES, WEIGHTS
from ..staging import remove_abandoned, write
from .downloads import Blob

_NEEDED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}\.(?:json|safetensors|txt|jinja)")
_COMMIT = re.compile("[0-9a-f]{40}")
_QUICK = 100_000_000  # files up to this many bytes are hashed: a tenth of a second
_LISTINGS = ("flux2-mlx", "trees")  # folders of a repo that say what its commits have: ours, and the Hub's library's
PARTIAL = ".flux2-mlx.incomplete"  # ends as the Hub's own partial files do, so that its tools clear it away


def is_weight(name: str) -> bool:
    return name.endswith(WEIGHTS)


def described(names: Collection[str]) -> str:
    """What a repo without an index holds, by the names of its files, and what to do: the end of a sentence."""
    weights = sorted(filter(is_weight, names))
    if "transformer/config.json" in names:
        return "; give the repo of the model that it was made from"
    if adapter := next((name for name in weights if "lora" in name.lower() or "adapter" in name.lower()), None):
        what = f"an adapter (LoRA), which goes on top of a model ({adapter[:80]})"
        return f": it holds {what}; give the model that it was made for"
    if weights:
        return f": it holds files of weights; give one of them by its name behind a colon (:{weights[0][:80]})"
    if pickle := next((name for name in names if name.endswith(PICKLES)), None):
        return f": it holds pickles, which could run code ({pickle[:80]}); give a repo with .safetensors files"
    return " and holds no weights; give another repo id"


@dataclass(frozen=True)
class Folders:
    """What a conversion needs of a repo in the layout of diffusers: the small files of the folders called `names`, and
    of some of them the `weights`.

    Nothing else of the root: it also holds the transformer as a single file, which would double the download.
    """

    names: tuple[str, ...]
    weights: tuple[str, ...]

    def may_need(self, file: str) -> bool:
        """Whether a file, by its name in the repo, may be needed of a model; its weights may still be left out."""
        folder, _, name = file.partition("/")
        return file == INDEX or (folder in self.names and _NEEDED.fullmatch(name) is not None)

    def leaves_out(self, file: str) -> bool:
        """Whether a file is of weights that are not needed."""
        return is_weight(file) and file.partition("/")[0] not in self.weights

    def pickled(self, needed: Collection[str], others: Collection[str]) -> str | None:
        """A folder whose weights are there as pickles only; None: there is none."""
        for folder in self.weights:
            if not any(is_weight(name) and name.startswith(f"{folder}/") for name in needed) and any(
                name.startswith(f"{folder}/") and name.endswith(PICKLES) for name in others
            ):
                return folder
        return None

    def are_complete(self, snapshot: Path, shards: Callable[[Path], Collection[str]]) -> bool:
        """Whether a snapshot has every part, and each of the `shards` that an index names: other programs may have
        fetched single files of it."""
        kinds = [f"{name}/*.json" for name in self.names] + [f"{name}/*.safetensors" for name in self.weights]
        tables = [table for name in self.weights for table in snapshot.glob(f"{name}/*.safetensors.index.json")]
        named = [table.parent / shard for table in tables for shard in shards(table)]
        return all(any(snapshot.glob(kind)) for kind in kinds) and all(shard.exists() for shard in named)


def storage_of(cache: Path, repo_id: str) -> Path:
    """The folder of a repo in the cache."""
    return cache / f"models--{repo_id.replace('/', '--')}"


@dataclass(frozen=True)
class Download:
    """Files of a repo at a commit, and what the cache lacks of them. Sizes are in bytes.

    `page` is the repo's address, `licence` what it says of its licence, if anything, and `is_gated` whether the
    licence must be accepted to have the files. `missing` are the files that are not in the cache, `arrived` what an
    earlier call left of each, and `branch` the commit that the cache knew before. `brought` are the files that this
    process has fetched by now, `linked` those that it has taken from another snapshot.
    """

    repo_id: str
    page: str
    licence: str | None
    commit: str
    storage: Path
    files: Mapping[str, Blob]
    missing: tuple[str, ...]
    arrived: Mapping[str, int]
    branch: str | None
    is_gated: bool = False
    brought: set[str] = field(default_factory=set)
    linked: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        repo_id: str,
        page: str,
        licence: str | None,
        commit: str,
        storage: Path,
        files: Mapping[str, Blob],
        *,
        is_gated: bool = False,
    ) -> "Download":
        """Compare the `files` of a repo with what its `storage` holds; what is there in a file's place is deleted."""
        snapshot = storage / "snapshots" / commit
        missing = tuple(name for name in files if not _is_cached(files[name], storage, snapshot / name))
        partials = {name: _partial(storage, files[name]) for name in missing}
        arrived = {name: min(path.stat().st_size, files[name].size) for name, path in partials.items() if path.exists()}
        branch = read_branch(storage)
        return cls(repo_id, page, licence, commit, storage, files, missing, arrived, branch, is_gated)

    def without_weights(self, unused: Collection[str]) -> "Download":
        """This download without the files that are `unused`."""
        files = {name: blob for name, blob in self.files.items() if name not in unused}
        return replace(self, files=files, missing=tuple(name for name in self.missing if name in files))

    @property
    def size(self) -> int:
        return sum(blob.size for blob in self.files.values())

    @property
    def remaining(self) -> int:
        """Bytes that are still to be fetched."""
        return sum(self.files[name].size - self.arrived.get(name, 0) for name in self.missing)

    @property
    def present(self) -> int:
        """Bytes that are there already."""
        return self.size - self.remaining

    @property
    def fetched(self) -> int:
        """The size of the files that this download completes."""
        return sum(self.files[name].size for name in self.missing)

    @property
    def snapshot(self) -> Path:
        return self.storage / "snapshots" / self.commit

    def partial(self, name: str) -> Path:
        """Where a file is written to until it is complete."""
        return _partial(self.storage, self.files[name])

    def blob(self, name: str) -> Path:
        return self.storage / "blobs" / self.files[name].digest

    def link(self, name: str) -> None:
        """Let the snapshot have a file whose blob is there."""
        path = self.snapshot / name
        if path.exists():
            return
        make_folder(path.parent, self.storage)
        path.unlink(missing_ok=True)
        if name not in self.missing:
            self.linked.add(name)
        try:
            path.symlink_to(os.path.relpath(self.blob(name), path.parent))
        except FileExistsError:  # another process was faster
            pass
        except OSError:  # as the Hub's library does it on a disk without links
            os.replace(self.blob(name), path)

    def record(self, *, all_wanted: bool) -> None:
        """Note that the branch is at this commit, for offline look-ups. If these files are all that is wanted of the
        repo, drop what was fetched in part of older ones."""
        if read_branch(self.storage) != self.commit:
            _write_branch(self.storage, self.commit)
        if not all_wanted:
            return
        listed = {blob.digest for blob in self.files.values()}
        for partial in (self.storage / "blobs").glob(f"*{PARTIAL}"):
            if partial.name.removesuffix(PARTIAL) not in listed:
                remove_abandoned(partial)

    def note_listing(self, names: Collection[str]) -> None:
        """Note the `names` of all files that the repo has at this commit, of which the cache may hold but some."""
        note = _note(self.storage, self.commit)
        if not note.exists():  # a commit never changes
            make_folder(note.parent, self.storage)
            write(note, json.dumps({"files": dict.fromkeys(names)}).encode(), replace=True)

    def discard(self) -> int:
        """Remove what this download has brought, unless something else refers to it; gives the bytes removed."""
        removed = remove_files(self.storage, [self.snapshot / name for name in sorted(self.brought)])
        for name in self.linked:
            if (self.snapshot / name).is_symlink():
                (self.snapshot / name).unlink()
        if _is_inside(self.snapshot, os.path.realpath(self.storage)):
            _prune(self.snapshot)
        if not self.snapshot.exists() and read_branch(self.storage) == self.commit:
            if self.branch is None:
                (self.storage / "refs" / "main").unlink()
            else:
                _write_branch(self.storage, self.branch)
        remove_empty(self.storage)
        return removed


def remove_files(storage: Path, paths: Collection[Path]) -> int:
    """Remove `paths` of a repo's snapshots, and their blobs unless another path refers to them; gives the bytes.

    What leads out of the repo's folder is left alone.
    """
    home = os.path.realpath(storage)
    blobs = set()
    removed = 0
    for path in paths:
        if not _is_inside(path.parent, home) or not os.path.lexists(path):
            continue
        target = Path(os.path.realpath(path))
        if path.is_symlink() and target.parent == Path(home) / "blobs":
            blobs.add(target)
        elif path.is_file() and not path.is_symlink():  # on a disk without links
            removed += path.stat().st_size
        else:
            continue
        path.unlink()
    kept = {os.path.realpath(path) for path in snapshot_files(storage)}
    for blob in blobs:
        if str(blob) not in kept:
            with suppress(FileNotFoundError):
                size = blob.stat().st_size
                blob.unlink()
                removed += size
    return removed


def remove_empty(storage: Path) -> None:
    """Remove the folders of a repo that have become empty."""
    if not storage.is_symlink():
        _prune(storage)
        for note in (storage / _LISTINGS[0]).glob("*.json"):
            if not (storage / "snapshots" / note.stem).exists():
                note.unlink()
        _prune(storage)
    if not os.path.lexists(storage):
        with suppress(OSError):  # the Hub's library makes one beside each repo
            os.rmdir(storage.parent / ".locks" / storage.name)


def _prune(folder: Path) -> None:
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(path)


def snapshot_files(storage: Path) -> Iterator[Path]:
    """Every file of all snapshots of a repo."""
    for folder, _, names in os.walk(storage / "snapshots"):
        yield from (Path(folder) / name for name in names)


def latest_files(storage: Path) -> tuple[Path, list[str]]:
    """The latest snapshot of a repo, and the names of its files."""
    snapshot = storage / "snapshots" / (read_branch(storage) or "")
    files = (path for path in snapshot_files(storage) if path.is_relative_to(snapshot))
    return snapshot, [path.relative_to(snapshot).as_posix() for path in files]


def read_branch(storage: Path) -> str | None:
    """The commit that the cache has noted for the main branch."""
    try:
        commit = (storage / "refs" / "main").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def noted_listing(storage: Path, commit: str) -> list[str] | None:
    """The names of all files that a repo has at a commit, those that the cache lacks included; None: not noted."""
    for folder in _LISTINGS:
        try:
            files = read_json(_note(storage, commit, folder)).get("files")
        except CheckpointError:
            continue
        if isinstance(files, dict):
            return [*files]
    return None


def _note(storage: Path, commit: str, folder: str = _LISTINGS[0]) -> Path:
    return storage / folder / f"{commit}.json"


def _write_branch(storage: Path, commit: str) -> None:
    ref = storage / "refs" / "main"
    make_folder(ref.parent, storage)
    write(ref, commit.encode(), replace=True)


def make_folder(folder: Path, storage: Path) -> None:
    """Make a folder inside the repo's folder in the cache; DownloadError if a link leads out of that."""
    if not _is_inside(folder, os.path.realpath(storage)):
        raise DownloadError(f"{folder} is a link out of {storage}; delete the link and start the download again")
    folder.mkdir(parents=True, exist_ok=True)


def _is_inside(folder: Path, home: str) -> bool:
    return os.path.commonpath([home, os.path.realpath(folder)]) == home


def _partial(storage: Path, blob: Blob) -> Path:
    return storage / "blobs" / f"{blob.digest}{PARTIAL}"


def _is_cached(blob: Blob, storage: Path, link: Path) -> bool:
    """Whether the file is in the cache; what is there in its place is deleted."""
    for path in (link, storage / "blobs" / blob.digest):
        if path.is_file() and _is_intact(path, blob):
            return True
        if os.path.lexists(path):
            make_folder(path.parent, storage)
            path.unlink()
    return False


def _is_intact(path: Path, blob: Blob) -> bool:
    if path.stat().st_size != blob.size or blob.size > _QUICK:
        return path.stat().st_size == blob.size
    hasher = blob.hasher()
    hasher.update(path.read_bytes())
    return hasher.hexdigest() == blob.digest
