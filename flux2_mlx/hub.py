"""Downloads from the Hugging Face Hub into its standard cache, checked on arrival.

`huggingface_hub` is imported inside the functions: it is slow, and reads its environment variables then.
"""

import errno
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .downloads import (
    Blob,
    BrokenError,
    DamagedError,
    RefusedError,
    download,
    first_line,
    quoted,
    read,
    redacted,
    remove_partial,
)
from .errors import DownloadError

_logger = logging.getLogger(__name__)

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?!.*(?:--|\.\.|\.(?:git|gguf|safetensors)$)){_NAME}/{_NAME}")
_INDEX = "model_index.json"
_WEIGHTS = ("transformer", "vae", "text_encoder")
_FOLDERS = (*_WEIGHTS, "tokenizer", "scheduler")
# Nothing else of the root: it also holds the transformer as a single file, which would double the download.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}\.(?:json|safetensors|txt|jinja)"
_NEEDED = re.compile(rf"{_INDEX}|(?:{'|'.join(_FOLDERS)})/{_PART}")
_SMALL = 10_000_000  # files below this many bytes get no progress bar
_QUICK = 100_000_000  # files of the cache up to this many bytes are hashed: a tenth of a second
_LISTING = 4_000_000  # bytes; that of FLUX.2-dev has some 50,000
_LARGEST = 10**15  # bytes
_PARTIAL = ".flux2-mlx.incomplete"  # the end of the name is that of the Hub's own, which its tools clear away


@dataclass(frozen=True)
class _Hub:
    """Whom to ask, with which headers, and the folder of the cache."""

    endpoint: str
    headers: Mapping[str, str]
    cache: Path

    @property
    def shown(self) -> str:
        return redacted(self.endpoint, self.headers, self.endpoint)

    def quote(self, text: str) -> str:
        return quoted(text, self.headers, self.endpoint)


def is_repo_id(text: str) -> bool:
    """Whether `text` has the shape `owner/name` of a Hugging Face repo."""
    return _REPO_ID.fullmatch(text) is not None


def fetch(
    repo_id: str,
    *,
    text_only: bool = False,
    quiet: bool = False,
) -> Path:
    """Fetch what a conversion of a diffusers-layout repo needs, check it, and return its folder in the cache.

    What the cache already holds is not fetched again, and a file goes on where an earlier call was stopped.
    Without a connection, or with `HF_HUB_OFFLINE=1`, a complete copy in the cache is used.

    Args:
        repo_id: `owner/name`.
        text_only: leave out the weights of the transformer and the VAE.
        quiet: show no progress bars.

    Raises:
        DownloadError: unknown or gated repo, refused token, no or a slow connection, full disk, or a damaged file.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise DownloadError(f"{repo_id!r} is no Hugging Face repo id; give it as owner/name")
    hub, offline = _open()
    if offline:
        if folder := _find_cached(repo_id, text_only):
            return folder
        absent = f"{repo_id} is not complete in the cache {hub.cache} and offline mode is on"
        raise DownloadError(f"{absent}; download it once with a connection, or give a folder")
    try:
        commit, files = _parse(read(f"{hub.endpoint}/api/models/{repo_id}?blobs=true", hub.headers, _LISTING))
    except (RefusedError, BrokenError, DamagedError, ValueError, RecursionError) as error:
        reason = _explain_listing(error, hub, repo_id)
        if folder := _find_cached(repo_id, text_only):
            _logger.warning("%s. Using the copy in the cache.", reason)
            return folder
        raise DownloadError(reason) from error
    if _INDEX not in files:
        raise DownloadError(f"{repo_id} has no {_INDEX}, so it is no diffusers-layout model; give another repo id")
    try:
        return _download(hub, repo_id, commit, files, text_only, quiet)
    except (RefusedError, BrokenError, OSError) as error:
        raise DownloadError(_explain_download(error, hub, repo_id)) from error


def _open() -> tuple[_Hub, bool]:
    """Return the hub that the environment names, and whether it must not be asked."""
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers

        parts = urlsplit(constants.ENDPOINT)
        if parts.scheme not in ("http", "https") or not parts.hostname or (parts.port or 1) < 1:
            raise ValueError
    except ValueError:  # without its text, which may hold a part of a password
        wrong = "HF_ENDPOINT, or another variable HF_HUB_…, has a value that can't be read"
        raise DownloadError(f"{wrong}; unset it, or give an endpoint as https://host") from None
    cache = Path(constants.HF_HUB_CACHE).absolute()
    if constants.HF_HUB_OFFLINE:
        return _Hub(constants.ENDPOINT, {}, cache), True
    try:
        headers = build_hf_headers()
    except Exception as error:  # it may read a file, or ask a server for a token
        reason = quoted(first_line(error), {}, constants.ENDPOINT)
        raise DownloadError(f"can't read the token ({reason}); log in again with `hf auth login`") from error
    return _Hub(constants.ENDPOINT, headers, cache), False


def _parse(listing: bytes) -> tuple[str, dict[str, Blob]]:
    """Return the commit and the needed files of a repo; raise ValueError for whatever no hub would list."""
    info = json.loads(listing)
    commit, siblings = _get(info, "sha", str), _get(info, "siblings", list)
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise ValueError(f"commit {commit!r}")
    files: dict[str, Blob] = {}
    names = set()
    for entry in siblings:
        name = _get(entry, "rfilename", str)
        if not _NEEDED.fullmatch(name):
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
    return commit, files


def _get(entry: Any, key: str, kind: type) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind:
        raise ValueError(f"{key} is {str(value)[:80]!r}")
    return value


def _is_needed(name: str, text_only: bool) -> bool:
    return not text_only or not name.endswith(".safetensors") or name.startswith("text_encoder/")


def _find_cached(repo_id: str, text_only: bool) -> Path | None:
    """Look up a snapshot with no part and no shard missing: other programs may have fetched single files of it."""
    from huggingface_hub import try_to_load_from_cache

    try:
        index = try_to_load_from_cache(repo_id, _INDEX)
        folder = Path(index).parent if isinstance(index, str) else None
        return folder if folder and _is_complete(folder, text_only) else None
    except (OSError, ValueError, RecursionError):  # a damaged ref or index
        return None


def _is_complete(folder: Path, text_only: bool) -> bool:
    weights = ("text_encoder",) if text_only else _WEIGHTS
    kinds = [f"{name}/*.json" for name in _FOLDERS] + [f"{name}/*.safetensors" for name in weights]
    tables = [table for name in weights for table in folder.glob(f"{name}/*.safetensors.index.json")]
    shards = [
        table.parent / str(shard)
        for table in tables
        for shard in _get(json.loads(table.read_bytes()), "weight_map", dict).values()
    ]
    return all(any(folder.glob(kind)) for kind in kinds) and all(shard.exists() for shard in shards)


def _download(hub: _Hub, repo_id: str, commit: str, files: dict[str, Blob], text_only: bool, quiet: bool) -> Path:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import tqdm

    storage = hub.cache / f"models--{repo_id.replace('/', '--')}"
    blobs, snapshot = storage / "blobs", storage / "snapshots" / commit
    # Small ones first, so that what goes wrong goes wrong early.
    needed = sorted((name for name in files if _is_needed(name, text_only)), key=lambda name: files[name].size)
    missing = [name for name in needed if not _is_cached(files[name], storage, snapshot / name)]
    partials = {name: blobs / f"{files[name].digest}{_PARTIAL}" for name in missing}
    kept = sum(partial.stat().st_size for partial in partials.values() if partial.exists())
    _check_space(repo_id, sum(files[name].size for name in missing) - kept, hub.cache)
    _folder(blobs, storage)
    for name in needed:
        blob = files[name]
        if name in partials:
            hidden = True if quiet or blob.size < _SMALL else None  # None: where stderr is no terminal
            url = hf_hub_url(repo_id, name, revision=commit)
            with tqdm(total=blob.size, unit="B", unit_scale=True, desc=Path(name).name, disable=hidden) as bar:
                try:
                    download(url, hub.headers, blob, partials[name], blobs / blob.digest, bar)
                except DamagedError as error:
                    problem = f"{name} arrived damaged ({error}) and was deleted; start the download again"
                    raise DownloadError(problem) from error
        _link(storage, snapshot / name, blobs / blob.digest)
    _record(storage, commit)  # only now is everything there
    listed = {blob.digest for blob in files.values()}
    for partial in blobs.glob(f"*{_PARTIAL}"):
        if partial.name.removesuffix(_PARTIAL) not in listed:  # of an older commit
            remove_partial(partial)
    return snapshot


def _is_cached(blob: Blob, storage: Path, link: Path) -> bool:
    """Whether the file is in the cache; what is there in its place is deleted."""
    for path in (link, storage / "blobs" / blob.digest):
        if path.is_file() and _is_intact(path, blob):
            return True
        if os.path.lexists(path):
            _folder(path.parent, storage)
            path.unlink()
    return False


def _is_intact(path: Path, blob: Blob) -> bool:
    if path.stat().st_size != blob.size or blob.size > _QUICK:
        return path.stat().st_size == blob.size
    hasher = blob.hasher()
    hasher.update(path.read_bytes())
    return hasher.hexdigest() == blob.digest


def _folder(folder: Path, storage: Path) -> None:
    """Make a folder of the repo's part of the cache, unless a link leads out of that."""
    home = os.path.realpath(storage)
    if os.path.commonpath([home, os.path.realpath(folder)]) != home:
        raise DownloadError(f"{folder} is a link out of {storage}; delete the link and start the download again")
    folder.mkdir(parents=True, exist_ok=True)


def _link(storage: Path, link: Path, target: Path) -> None:
    if link.exists():
        return
    _folder(link.parent, storage)
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(os.path.relpath(target, link.parent))
    except FileExistsError:  # another process was faster
        pass
    except OSError:  # as the Hub's library does it on a disk without links
        os.replace(target, link)


def _record(storage: Path, commit: str) -> None:
    """Note that the branch is at this commit, for offline look-ups."""
    ref, scratch = storage / "refs" / "main", storage / f".main-{os.getpid()}-{threading.get_ident()}"
    if ref.is_file() and ref.read_bytes() == commit.encode():
        return
    _folder(ref.parent, storage)
    scratch.write_text(commit)
    os.replace(scratch, ref)


def _check_space(repo_id: str, needed: int, cache: Path) -> None:
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if needed > free:
        sizes = f"{repo_id} needs {needed / 1e9:.1f} GB, the disk of {cache} has {free / 1e9:.1f} GB free"
        raise DownloadError(f"{sizes}; make room, or set HF_HOME to a folder on another disk")


def _explain_listing(error: Exception, hub: _Hub, repo_id: str) -> str:
    if isinstance(error, RefusedError):
        return _explain_refusal(error, hub, repo_id)
    if isinstance(error, BrokenError):
        return f"cannot reach {hub.shown} ({error}); check the connection, or give a folder"
    return f"{hub.shown} lists {repo_id} as no hub does ({hub.quote(first_line(error))}); check HF_ENDPOINT"


def _explain_download(error: Exception, hub: _Hub, repo_id: str) -> str:
    if isinstance(error, RefusedError):
        return _explain_refusal(error, hub, repo_id)
    if isinstance(error, BrokenError):
        return f"the download of {repo_id} broke off ({error}); start it again, it goes on from there"
    elsewhere = "set HF_HOME to a folder on another disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left in {hub.cache}; make room, or {elsewhere}"
    return f"can't write {error.filename or 'a file'} in {hub.cache} ({error.strerror}); check it, or {elsewhere}"


def _explain_refusal(error: RefusedError, hub: _Hub, repo_id: str) -> str:
    page = f"{hub.shown}/{repo_id}"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    has_token = "authorization" in hub.headers
    if error.code == "GatedRepo":
        token = " and your token has no access (a fine-grained one must allow gated repos)" if has_token else ""
        return f"{repo_id} is gated{token}: accept its licence at {page}, then {log_in}"
    if error.status == 403 or (error.status == 401 and has_token):
        return f"no access to {page} ({error}); {log_in}"
    # Who has no token gets 401 for a repo that does not exist.
    if error.status == 401 or error.code == "RepoNotFound":
        return f"unknown repo id {repo_id!r} at {hub.shown}; check the spelling; if it is private, {log_in}"
    return f"{hub.shown} answers HTTP {error.status} for {repo_id}; try again later"
