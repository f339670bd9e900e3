"""Where adapters come from: files and folders here, and repos of the Hub, of which one file is fetched."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

from .. import hub
from ..adapters import Adapter
from ..checkpoint import Checkpoint
from ..config import Config
from ..convert import formats
from ..convert.lora import PEFT_CONFIG, USUAL_FILES, AdapterFile, is_adapter, is_config_of, names_beside, read_adapter
from ..errors import CheckpointError, DownloadError, InputError
from ..files import sha256_if_there
from ..hub import Download, Selection, snapshot_files
from ..layout import PICKLES, SAFETENSORS
from ..wording import some
from .first_use import Progress, labelled
from .folder import models_folder
from .names import cached_repo
from .parts import Remote, located

ADAPTERS = "loras"  # in the models folder
_ALPHAS = ("alpha",)  # single numbers, which are read with the header


class FoundAdapter:
    """An adapter of which no more than its header has been read or fetched. Build it with `find_adapter`.

    Attributes:
        source: as it was asked for.
        file: what it is. Where it lies on the Hub only, its path lasts no longer than the context of `find_adapter`.
    """

    def __init__(self, source: str, file: AdapterFile, selection: Selection | None = None, others: int = 0):
        self.source = source
        self.file = file
        self._selection = selection
        self._others = others  # files that might have been meant
        self._is_here = selection is None

    @property
    def origin(self) -> str | None:
        """The repo and file of the Hub, also of one that was found in its cache; None: it is of neither."""
        if self._selection is None:
            return cached_origin(Path(os.path.abspath(self.file.path)))
        return f"{self._selection.repo}:{_weights(self._selection)}"

    @property
    def download(self) -> Download | None:
        """What `fetch` is to bring; None: nothing."""
        download = None if self._is_here or self._selection is None else self._selection.download
        return download if download is not None and download.missing else None

    def check(self, checkpoint: Checkpoint) -> list[str]:
        """What a user should know who has it at work in a model: sentences without a full stop.

        Raises:
            CheckpointError: it is for another model.
        """
        with self.named():
            self.file.check(_configs(checkpoint), checkpoint.variant.name)
        chosen = [f"{self.origin} is taken, one of {self._others + 1} files"] if self._others else []
        return [*chosen, *self.file.notes(_configs(checkpoint), checkpoint.variant.name)]

    def outline(self, checkpoint: Checkpoint, name: str) -> Adapter:
        """The adapter for a model that `check` has seen, without values: what memory it takes can be asked of it."""
        return self.file.outline(_configs(checkpoint), name)

    def fetch(self, progress: Progress | None = None) -> None:
        """Bring it here; `progress` hears bytes done, bytes in all, and `download`.

        Raises:
            DownloadError: it can't be fetched; what has arrived is kept. CheckpointError: it is damaged.
        """
        if self._selection is not None and not self._is_here:
            self._selection.fetch(labelled(progress, "download"))
            self._is_here = True
            with self.named():
                self.file = _read(self._selection)

    def fetched(self, progress: Progress | None = None) -> AdapterFile:
        """What it is once it is here; see `fetch`."""
        self.fetch(progress)
        return self.file

    def load(self, checkpoint: Checkpoint, name: str) -> Adapter:
        """The adapter for a model that `check` has seen, once it is here; raises as `AdapterFile.load` does."""
        with self.named():
            return self.file.load(_configs(checkpoint), name, self.source, self.origin)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let errors say the repo in place of the folder that its files lie in."""
        with _named(self._selection):
            yield


@contextmanager
def find_adapter(
    source: str | os.PathLike[str], weight_name: str | None = None, subfolder: str | None = None
) -> Iterator[FoundAdapter]:
    """The adapter in a file, a folder, or a repo of the Hub, of which only the header is fetched.

    Args:
        source: a path, `owner/name`, `owner/name:file`, or the address of one of these.
        weight_name: the file's name in the folder or repo, where that holds several.
        subfolder: the folder in that one that it is in.

    Raises:
        InputError: no such address. DownloadError: it is not there, or can't be asked for. CheckpointError: it is
            damaged, or no adapter for FLUX.2.
    """
    told = os.fspath(source)
    if not told:
        raise InputError("an adapter's name is empty; give a file, a folder, a repo id or REPO:FILE")
    where = located(source)
    inside = "/".join(filter(None, (subfolder, weight_name)))
    if isinstance(where, Path):
        folder = where if subfolder is None else where / _within(where, subfolder)
        yield FoundAdapter(told, read_here(folder, weight_name))
        return
    wanted = Remote(where.repo, "/".join(filter(None, (where.path, inside))))
    with ExitStack() as held:
        try:
            selection = held.enter_context(_selected(wanted))
        except DownloadError as error:
            if told != where.repo:
                raise
            raise DownloadError(f"there is no file or folder {told} here, and as a repo: {error}") from error
        with _named(selection):
            file = _read(selection)
        is_named = wanted.path.lower().endswith(SAFETENSORS)
        yield FoundAdapter(told, file, selection, 0 if is_named else len(_files_of_weights(selection.listed)) - 1)


def _selected(wanted: Remote) -> AbstractContextManager[Selection]:
    """The files of an adapter in a repo."""
    return hub.select(wanted.repo, partial(adapter_files, wanted), partial(formats.outline.pieces, early=_ALPHAS))


def adapter_files(wanted: Remote, names: Collection[str]) -> list[str]:
    """The file of an adapter among the `names` of all files of a repo, behind the small ones that say more of it.

    Raises:
        InputError: it is a pickle. DownloadError: there is none, or there are several.
    """
    if wanted.path.lower().endswith(PICKLES):
        raise InputError(f"{wanted} is a pickle, which could run code; give a {SAFETENSORS} file")
    weights = _files_of_weights(names)
    chosen = [wanted.path] if wanted.path in weights else [x for x in weights if os.path.dirname(x) == wanted.path]
    chosen = chosen if chosen or wanted.path else weights
    usual = [name for name in chosen if os.path.basename(name) in USUAL_FILES]
    chosen = usual if len(usual) == 1 else chosen
    if len(chosen) != 1:
        raise DownloadError(_several(wanted, chosen, weights))
    stem = chosen[0].removesuffix(SAFETENSORS)
    beside = (os.path.join(os.path.dirname(chosen[0]), PEFT_CONFIG), f"{stem}.json")
    return [*(name for name in beside if name in names), *chosen]


def _files_of_weights(names: Collection[str]) -> list[str]:
    return sorted(name for name in names if is_adapter(os.path.basename(name)))


def _several(wanted: Remote, chosen: list[str], weights: list[str]) -> str:
    """What is there in place of one adapter, and what to write."""
    what = f"{len(chosen)} adapters" if chosen else f"no {SAFETENSORS} file" + " there" * bool(wanted.path and weights)
    names = [f"{wanted.repo}:{name}" for name in chosen or weights]
    way = f"give one as {some(names)}" if names else "give another repo"
    return f"{wanted} has {what}; {way}"


def adapters_with(
    sha256: str, name: str, folders: Collection[Path], models_dir: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """All adapters whose files have this hash, looked for by their name first.

    Args:
        sha256: the hash.
        name: of the file, or of the folder that holds it.
        folders: where something of that name may be, besides the folder `loras` of the models folder.
        models_dir: see `models_folder`.
    """
    home = models_folder(models_dir) / ADAPTERS
    named = dict.fromkeys(file for folder in (*folders, home) for file in _named_files(folder / name))
    yield from (file for file in named if sha256_if_there(file) == sha256)
    yield from (file for file, blob in cached_files() if blob.name == sha256 and file.is_file())
    yield from (file for file in own_files(models_dir) if file not in named and sha256_if_there(file) == sha256)


def _named_files(place: Path) -> list[Path]:
    """The file, or all that may be adapters in the folder, at a place; none where nothing can have such a name."""
    try:
        return [place] if place.is_file() else _files_in(place, recursive=False)
    except (OSError, ValueError):
        return []


def own_files(models_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """All files that may be adapters in the folder `loras` of the models folder."""
    return _files_in(models_folder(models_dir) / ADAPTERS)


def _files_in(folder: Path, *, recursive: bool = True) -> list[Path]:
    """All files that may be adapters in a folder."""
    return sorted(path for path in (folder.rglob("*") if recursive else folder.glob("*")) if is_adapter(path.name))


def cached_files() -> Iterator[tuple[Path, Path]]:
    """All files that may be adapters in the Hub's cache, each once with the same config, and its blob, which its hash
    names."""
    seen: set[tuple[str, str | None]] = set()
    for storage in sorted(hub.cache_folder().glob("models--*--*")):
        for file in sorted(path for path in snapshot_files(storage) if is_adapter(path.name)):
            has_config = is_config_of(file.name, _names_beside(file))
            own = os.path.realpath(file), os.path.realpath(file.with_name(PEFT_CONFIG)) if has_config else None
            if own not in seen:
                seen.add(own)
                yield file, Path(own[0])


def adapter_hashes(source: str | os.PathLike[str]) -> tuple[str | None, str | None]:
    """The hash of an adapter's file here, and that of its config (`AdapterFile.config_hash`). None also where they
    can't be known, which is told when it is used.

    Args:
        source: a path, or the folder that holds it.
    """
    path = Path(os.path.expanduser(source))
    try:
        file = read_here(path)
        return file.sha256, file.config_hash
    except (CheckpointError, InputError):
        return sha256_if_there(path), None


def read_here(source: Path, weight_name: str | None = None) -> AdapterFile:
    """What the adapter in a file or folder here is; see `read_adapter`."""
    return read_adapter(source, weight_name, beside=_names_beside)


def _names_beside(path: Path) -> Collection[str]:
    """The names of all files in an adapter's folder. The Hub's cache may lack some of those that the repo has there."""
    if place := _cached(Path(os.path.abspath(path))):
        storage, commit, name = place
        if names := hub.noted_listing(storage, commit):
            return _within_folder(os.path.dirname(name), names)
    return names_beside(path)


def _within_folder(folder: str, names: Collection[str]) -> list[str]:
    """The names there of the files that are directly in a folder of a repo."""
    return [os.path.basename(name) for name in names if os.path.dirname(name) == folder]


def cached_origin(path: Path) -> str | None:
    """The repo and file whose copy in the Hub's cache is at a path; None: it is none."""
    place = _cached(path)
    return None if place is None else f"{cached_repo(place[0].name)}:{place[2]}"


def _cached(path: Path) -> tuple[Path, str, str] | None:
    """The folder of a repo in the Hub's cache that a path leads into, the commit, and the name in the repo."""
    for folder in path.parents:
        if folder.name == "snapshots" and cached_repo(folder.parent.name):
            commit, *parts = path.relative_to(folder).parts
            return folder.parent, commit, "/".join(parts)
    return None


def _within(folder: Path, subfolder: str) -> str:
    if os.path.isabs(subfolder) or ".." in Path(subfolder).parts or not (folder / subfolder).is_dir():
        raise CheckpointError(f"{folder} holds no folder {subfolder!r:.80}")
    return subfolder


def _read(selection: Selection) -> AdapterFile:
    weights = _weights(selection)
    beside = _within_folder(os.path.dirname(weights), selection.listed)
    return read_adapter(selection.folder / weights, bases=selection.bases, beside=lambda _: beside)


def _weights(selection: Selection) -> str:
    return [*selection.names][-1]


def _configs(checkpoint: Checkpoint) -> Mapping[str, Config]:
    return {name: component.config for name, component in checkpoint.components.items()}


@contextmanager
def _named(selection: Selection | None) -> Iterator[None]:
    """Let errors say the repo in place of the folder of an outline, or of the cache."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error) if selection is None else selection.called(str(error))) from error
