"""Downloads from the Hugging Face Hub into its standard cache, checked on arrival.

`huggingface_hub` is imported inside the functions: it is slow, and reads its environment variables then.
"""

import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .. import __version__
from ..errors import DownloadError, Flux2Error
from ..exclusion import exclude_from_backups
from ..files import Claim
from ..json_files import parse_json
from ..layout import INDEX, SHARD
from .cache import (
    Download,
    Folders,
    described,
    is_weight,
    latest_files,
    make_folder,
    storage_of,
)
from .downloads import (
    Blob,
    BrokenError,
    DamagedError,
    RefusedError,
    download,
    first_line,
    quoted,
    read,
)
from .errors import Hub, UnindexedError, explain_download, explain_listing
from .outline import Pieces, header_only, outline, url_of

_logger = logging.getLogger(__name__)

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?!.*(?:--|\.\.|\.(?:git|gguf|safetensors)$)){_NAME}/{_NAME}")
# A file of weights anywhere in a repo, and parts of such names.
_PART = r"[A-Za-z0-9_][ -.0-\[\]-~]{0,199}"
_SINGLE = re.compile(rf"(?:{_PART}/){{0,5}}{_PART}\.(?:safetensors|gguf)")
# What says how the weights beside it are to be read, and how much of one is fetched: more is read of none.
_BESIDE = re.compile(rf"(?:{_PART}/){{0,5}}(?:config|model_index|{_PART}\.safetensors\.index)\.json")
_MOST_BESIDE = 10_000_001
_BASES = 5  # at most, that a card names
UNLISTED = (RefusedError, BrokenError, DamagedError, ValueError)
_LISTING = 4_000_000  # bytes; the listing of FLUX.2-dev has some 50,000
_LARGEST = 10**15  # bytes
_LICENCE = 80  # characters
# Hears the folder of an outline and what is to be fetched, and gives what of it is needed.
Check = Callable[[Path, Download], Download]
Report = Callable[[int, int], object]
# Hears the names of a repo's files, and gives those that are wanted.
Choose = Callable[[Collection[str]], Collection[str]]


def is_repo_id(text: str) -> bool:
    """Whether `text` has the shape `owner/name` of a Hugging Face repo."""
    return _REPO_ID.fullmatch(text) is not None


def fetch(
    repo_id: str,
    *,
    folders: Folders,
    check: Check | None = None,
    progress: Report | None = None,
    pieces: Pieces = header_only,
) -> Path:
    """Fetch what a conversion of a diffusers-layout repo needs, check it, and return its folder in the cache.

    What the cache already holds is not fetched again, and a file goes on where an earlier call was stopped.
    Without a connection, or with `HF_HUB_OFFLINE=1`, a complete copy in the cache is used.

    Args:
        repo_id: `owner/name`.
        folders: those that are needed of it.
        check: called before the first weight, unless nobody can be asked. Its folder is an outline of the model:
            small files as they are, and weights of the right size with nothing in them but these `pieces`.
        progress: called with the bytes that are there and those in all.
        pieces: the pieces of a file of weights that tell what it holds.

    Raises:
        UnindexedError: it is no whole model.
        DownloadError: unknown or gated repo, refused token, no or a slow connection, full disk, or a damaged file.
        Flux2Error: what `check` raises.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise DownloadError(f"{repo_id!r} is no Hugging Face repo id; give it as owner/name")
    hub, offline = open_hub()
    if offline:
        if folder := _find_cached(repo_id, folders):
            return folder
        absent = f"{repo_id} is not complete in the cache {hub.cache} and offline mode is on"
        raise _absent(hub, repo_id, f"{absent}; download it once with a connection, or give a folder")
    try:
        listed = list_files(hub, repo_id, folders.may_need)
    except UNLISTED as error:
        reason = explain_listing(error, hub, repo_id)
        if folder := _find_cached(repo_id, folders):
            _logger.warning("%s. Using the copy in the cache.", reason)
            return folder
        raise _absent(hub, repo_id, reason) from error
    if INDEX not in listed.files:
        names = [*listed.files, *listed.others]
        wrong = f"{repo_id} has no {INDEX}, so it is no model in the diffusers layout{described(names)}"
        raise UnindexedError(wrong, names)
    if pickled := folders.pickled(listed.files, listed.others):
        raise DownloadError(
            f"{repo_id}/{pickled} holds pickles, which could run code; give a repo with .safetensors files"
        )
    try:
        with Claim(storage_of(hub.cache, repo_id), make=True):
            return _download(hub, _planned(hub, repo_id, listed, folders), check, progress, pieces)
    except (RefusedError, BrokenError, DamagedError, OSError) as error:
        raise DownloadError(explain_download(error, hub, repo_id)) from error


@contextmanager
def header(
    repo_id: str, file: str | None, choose: Choose, pieces: Pieces = header_only
) -> Iterator[tuple[Path, list[str]]]:
    """Files of weights of a repo as they are in the cache, or else files of their names and sizes that take no space
    and hold nothing but these pieces, which alone are fetched, and the small ones that say how they are to be read.
    Gives the folder that stands for the repo, and what of it they are.

    Args:
        repo_id: `owner/name`.
        file: the one that is meant, by its name in the repo; None: what there is.
        choose: says which files that is; DownloadError if they are not there.
        pieces: the pieces of a file of weights that tell what it holds.

    Raises:
        DownloadError: they can't be fetched or are of a whole model, or what `choose` raises.
    """
    if file is not None and not is_single(file):
        wrong = f"{repo_id}:{file:.200} is no .safetensors or .gguf file, of which the header could be fetched alone"
        raise DownloadError(f"{wrong}; download it and give its path")
    hub, offline = open_hub()
    if file and (cached := _cached_file(repo_id, file)) and _is_whole(cached):
        yield cached.parents[file.count("/")], [file]
        return
    if offline:
        raise DownloadError(f"{file or repo_id} is not in the cache {hub.cache} and offline mode is on")
    try:
        listed = list_files(hub, repo_id, lambda name: is_single(name) or _BESIDE.fullmatch(name) is not None)
    except UNLISTED as error:
        raise DownloadError(explain_listing(error, hub, repo_id)) from error
    if file is None and INDEX in listed.files:
        raise DownloadError(f"{repo_id} is not converted yet, so nothing is known of it; download it first")
    if not file and not any(map(is_single, listed.files)):
        raise DownloadError(f"{repo_id} has no file of weights{described([*listed.files, *listed.others])}")
    names = [*choose(listed.files)]
    files = {name: listed.files[name] for name in names}
    page = f"{hub.shown}/{repo_id}"
    storage = storage_of(hub.cache, repo_id)
    wanted = Download(repo_id, page, None, listed.commit, storage, files, tuple(names), {}, None)
    with ExitStack() as held:
        try:
            folder = held.enter_context(outline(hub, wanted, partial(_pieces, pieces)))
        except (RefusedError, BrokenError, DamagedError, OSError) as error:
            raise DownloadError(explain_download(error, hub, repo_id)) from error
        yield folder, names


def _pieces(pieces: Pieces, name: str, start: bytes, size: int) -> list[tuple[int, int]]:
    """These `pieces` of a file of weights, and all of a small one."""
    return pieces(name, start, size) if is_single(name) else [(0, min(size, _MOST_BESIDE))]


def _is_whole(file: Path) -> bool:
    """Whether the others of the numbered set that a file is of, if it is of one, are beside it."""
    match = SHARD.fullmatch(file.name)
    if match is None:
        return True
    numbers = range(1, int(match["count"]) + 1)
    return all((file.parent / f"{match['stem']}-{n:05}-of-{match['count']}{match['end']}").exists() for n in numbers)


def _cached_file(repo_id: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo_id, file)
    except (OSError, ValueError):
        return None
    return Path(found) if isinstance(found, str) else None


def is_single(name: str) -> bool:
    return _SINGLE.fullmatch(name) is not None


def cache_folder() -> Path:
    """The Hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute()


def open_hub() -> tuple[Hub, bool]:
    """Return the hub that the environment names, and whether to stay offline."""
    try:
        from huggingface_hub import constants, get_token

        parts = urlsplit(constants.ENDPOINT)
        if parts.scheme not in ("http", "https") or not parts.hostname or (parts.port or 1) < 1:
            raise ValueError
    except ValueError:  # without its text, which may hold a part of a password
        wrong = "HF_ENDPOINT, or another variable HF_HUB_…, has a value that can't be read"
        raise DownloadError(f"{wrong}; unset it, or give an endpoint as https://host") from None
    cache = cache_folder()
    if constants.HF_HUB_OFFLINE:
        return Hub(constants.ENDPOINT, {}, cache), True
    # Its own headers name the agent that runs a program, by a list from the endpoint that it reads without a limit.
    headers = {"user-agent": f"flux2-mlx/{__version__}"}
    try:
        if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
            headers["authorization"] = f"Bearer {token}"
    except Exception as error:  # it may read a file, or ask a server for a token
        reason = quoted(first_line(error), {}, constants.ENDPOINT)
        raise DownloadError(f"can't read the token ({reason}); log in again with `hf auth login`") from error
    return Hub(constants.ENDPOINT, headers, cache), False


@dataclass(frozen=True)
class Listing:
    """What a repo holds at a commit: the wanted files, and the names of the others."""

    commit: str
    licence: str | None
    is_gated: bool
    files: dict[str, Blob]
    others: list[str]
    bases: tuple[str, ...] = ()  # what its card says that it was made from


def list_files(hub: Hub, repo_id: str, is_wanted: Callable[[str], bool]) -> Listing:
    """The wanted files of a repo, of which there may be none; raises one of `UNLISTED`."""
    return _parse(read(f"{hub.endpoint}/api/models/{repo_id}?blobs=true", hub.headers, _LISTING), is_wanted)


def _parse(listing: bytes, is_wanted: Callable[[str], bool]) -> Listing:
    """Return the commit and the wanted files of a repo; raise ValueError for whatever no hub would list."""
    info = parse_json(listing)
    commit = _get(info, "sha", str)
    siblings = _get(info, "siblings", list)
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise ValueError(f"commit {commit!r}")
    files: dict[str, Blob] = {}
    names = set()
    others = []
    for entry in siblings:
        name = _get(entry, "rfilename", str)
        if not is_wanted(name):
            others.append(name)
            continue
        if name.lower() in names:  # on many disks these are one file
            raise ValueError(f"{name} twice")
        names.add(name.lower())
        lfs = entry.get("lfs") is not None and _get(entry, "lfs", dict)
        size = _get(entry, "size", int)
        digest, digits = (_get(lfs, "sha256", str), 64) if lfs is not False else (_get(entry, "blobId", str), 40)
        if not 0 <= size < _LARGEST or (lfs and lfs.get("size", size) != size):
            raise ValueError(f"{name} of {size} bytes")
        if not re.fullmatch(f"[0-9a-f]{{{digits}}}", digest):
            raise ValueError(f"{name} with hash {digest!r}")
        files[name] = Blob(size, digest)
    card = info.get("cardData")
    return Listing(commit, _licence(card), bool(info.get("gated")), files, others, _bases(card))


def _licence(card: Any) -> str | None:
    """Return the licence that a model's card names, if it does."""
    values = [card.get(key) for key in ("license_name", "license")] if isinstance(card, dict) else []
    return next((value[:_LICENCE] for value in values if isinstance(value, str) and value.strip()), None)


def _bases(card: Any) -> tuple[str, ...]:
    """The models that a model's card says it was made from."""
    value = card.get("base_model") if isinstance(card, dict) else None
    names = value if isinstance(value, list) else [value]
    return tuple(name for name in names[:_BASES] if isinstance(name, str) and is_repo_id(name))


def _get(entry: Any, key: str, kind: type) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind:
        raise ValueError(f"{key} is {str(value)[:80]!r}")
    return value


def _find_cached(repo_id: str, folders: Folders) -> Path | None:
    """Look up a snapshot with no part and no shard missing: other programs may have fetched single files of it."""
    from huggingface_hub import try_to_load_from_cache

    try:
        index = try_to_load_from_cache(repo_id, INDEX)
        folder = Path(index).parent if isinstance(index, str) else None
        return folder if folder and folders.are_complete(folder, _shards) else None
    except (OSError, ValueError):  # a damaged ref or index
        return None


def _absent(hub: Hub, repo_id: str, message: str) -> DownloadError:
    """The error that says that a repo can't be had, which tells where the cache has other files of weights of it."""
    _, names = latest_files(storage_of(hub.cache, repo_id))
    is_other = INDEX not in names and any(map(is_weight, names))
    return UnindexedError(message, names) if is_other else DownloadError(message)


def _shards(table: Path) -> list[str]:
    return [str(shard) for shard in _get(parse_json(table.read_bytes()), "weight_map", dict).values()]


def _planned(hub: Hub, repo_id: str, listed: Listing, folders: Folders) -> Download:
    read = (name for name in listed.files if not folders.leaves_out(name))
    # Small ones first, so that what goes wrong goes wrong early.
    names = sorted(read, key=lambda name: (is_weight(name), listed.files[name].size))
    files = {name: listed.files[name] for name in names}
    return download_of(hub, repo_id, listed, files)


def download_of(hub: Hub, repo_id: str, listed: Listing, files: Mapping[str, Blob]) -> Download:
    """The download of some `files` of a repo."""
    storage = storage_of(hub.cache, repo_id)
    return Download.of(
        repo_id, f"{hub.shown}/{repo_id}", listed.licence, listed.commit, storage, files, is_gated=listed.is_gated
    )


def _download(hub: Hub, wanted: Download, check: Check | None, progress: Report | None, pieces: Pieces) -> Path:
    prepare(hub, wanted)
    if check:
        with outline(hub, wanted, pieces) as folder:
            try:
                wanted = check(folder, wanted)
            except Flux2Error as error:
                raise type(error)(str(error).replace(str(folder), wanted.repo_id)) from error
    bring_weights(hub, wanted, progress)
    wanted.record(all_wanted=True)  # only now is everything there
    return wanted.snapshot


def prepare(hub: Hub, wanted: Download) -> None:
    """Check the room on the disk, make the folders, bring the small files, and link what is there already."""
    check_space(wanted.repo_id, wanted.remaining, hub.cache)
    is_new = not (wanted.storage / "blobs").exists()
    make_folder(wanted.storage / "blobs", wanted.storage)
    if is_new:  # what others have fetched is theirs
        exclude_from_backups(wanted.storage)
    for name in wanted.files:
        if not is_weight(name) or name not in wanted.missing:
            bring(hub, wanted, name, lambda _: None)


def bring_weights(hub: Hub, wanted: Download, progress: Report | None) -> None:
    """Bring the weights that are still missing; `progress` hears the bytes that are there and those in all."""
    absent = [name for name in wanted.missing if is_weight(name)]
    done = wanted.size - sum(wanted.files[name].size for name in absent)

    def report(count: int) -> None:
        if progress:
            progress(done + count, wanted.size)

    for name in absent:
        bring(hub, wanted, name, report)
        done += wanted.files[name].size


def bring(hub: Hub, wanted: Download, name: str, report: Callable[[int], object]) -> None:
    """Bring a file into the cache, unless it is there already."""
    if name in wanted.missing:
        try:
            arguments = (hub.headers, wanted.files[name], wanted.partial(name), wanted.blob(name))
            if download(url_of(wanted, name), *arguments, report):
                wanted.brought.add(name)
        except DamagedError as error:
            problem = f"{name} arrived damaged ({error}) and was deleted; start the download again"
            raise DownloadError(problem) from error
    wanted.link(name)


def check_space(repo_id: str, needed: int, cache: Path) -> None:
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if needed > free:
        sizes = f"{repo_id} needs {needed / 1e9:.1f} GB, the disk of {cache} has {free / 1e9:.1f} GB free"
        raise DownloadError(f"{sizes}; make room, or set HF_HOME to a folder on another disk")
