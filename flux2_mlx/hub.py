"""Downloads from the Hugging Face Hub into its standard cache, checked on arrival.

`huggingface_hub` is imported inside the functions: it is slow, and reads its environment variables then.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DownloadError

_logger = logging.getLogger(__name__)

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?!.*(?:--|\.\.|\.(?:git|gguf|safetensors)$)){_NAME}/{_NAME}")
_INDEX = "model_index.json"
_WEIGHTS = ("transformer", "vae", "text_encoder")
_FOLDERS = (*_WEIGHTS, "tokenizer", "scheduler")
# Nothing else of the root: it also holds the transformer as a single file, which would double the download.
_NEEDED = re.compile(rf"{_INDEX}|(?:{'|'.join(_FOLDERS)})/[^/]+\.(?:json|safetensors|txt|jinja)")
_SMALL = 10_000_000  # files below this many bytes get no progress bar, and start anew after an interruption


def is_repo_id(text: str) -> bool:
    """Whether `text` has the shape `owner/name` of a Hugging Face repo and is no existing path."""
    return _REPO_ID.fullmatch(text) is not None and not os.path.exists(text)


def fetch(
    repo_id: str,
    *,
    text_only: bool = False,
    quiet: bool = False,
) -> Path:
    """Fetch what a conversion of a diffusers-layout repo needs, check it, and return its folder in the cache.

    What the cache already holds is not fetched again, and a big file goes on where an earlier call was stopped.
    Without a connection, or with `HF_HUB_OFFLINE=1`, a complete copy in the cache is used.

    Args:
        repo_id: `owner/name`.
        text_only: leave out the weights of the transformer and the VAE.
        quiet: show no progress bars.

    Raises:
        DownloadError: unknown or gated repo, refused token, no connection, full disk, or a damaged file.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise DownloadError(f"{repo_id!r} is no Hugging Face repo id; give it as owner/name")
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        if folder := _find_cached(repo_id, text_only):
            return folder
        absent = f"{repo_id} is not complete in the cache {constants.HF_HUB_CACHE} and offline mode is on"
        raise DownloadError(f"{absent}; download it once with a connection, or give a folder")
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(repo_id, files_metadata=True, timeout=timeout)
    except Exception as error:  # the HTTP client, and so the class of its errors, depends on the version
        cause = f"cannot reach {constants.ENDPOINT} ({_first_line(error)})"
        reason = _explain(error, repo_id) or f"{cause}; check the connection, or give a folder"
        if folder := _find_cached(repo_id, text_only):
            _logger.warning("%s. Using the copy in the cache.", reason)
            return folder
        raise DownloadError(reason) from error
    return _download(repo_id, info, text_only, quiet)


def _is_needed(name: str, text_only: bool) -> bool:
    skipped = text_only and name.endswith(".safetensors") and not name.startswith("text_encoder/")
    return _NEEDED.fullmatch(name) is not None and not skipped


def _find_cached(repo_id: str, text_only: bool) -> Path | None:
    """Look up a snapshot with no part and no shard missing: other programs may have fetched single files of it."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(repo_id, _INDEX)
    if not isinstance(index, str):
        return None
    folder = Path(index).parent
    weights = ("text_encoder",) if text_only else _WEIGHTS
    kinds = [f"{name}/*.json" for name in _FOLDERS] + [f"{name}/*.safetensors" for name in weights]
    shards = (
        table.parent / shard
        for name in weights
        for table in folder.glob(f"{name}/*.safetensors.index.json")
        for shard in json.loads(table.read_bytes())["weight_map"].values()
    )
    complete = all(any(folder.glob(kind)) for kind in kinds) and all(shard.exists() for shard in shards)
    return folder if complete else None


def _download(repo_id: str, info: Any, text_only: bool, quiet: bool) -> Path:
    from huggingface_hub import constants, hf_hub_download, hf_hub_url

    # Small ones first, so that what goes wrong goes wrong early.
    files = sorted((f for f in info.siblings if _is_needed(f.rfilename, text_only)), key=lambda file: file.size or 0)
    if all(file.rfilename != _INDEX for file in files):
        raise DownloadError(f"{repo_id} has no {_INDEX}, so it is no diffusers-layout model; give another repo id")
    cache = Path(constants.HF_HUB_CACHE).absolute()
    storage = cache / f"models--{repo_id.replace('/', '--')}"
    missing = [file for file in files if not _is_cached(file, storage, info.sha)]
    # Files above MAX_HTTP_DOWNLOAD_SIZE only hf_xet can fetch.
    big = [file for file in missing if file.lfs and _SMALL <= file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE]
    partials = {file.rfilename: storage / "blobs" / f"{file.lfs.sha256}.incomplete" for file in big}
    kept = sum(partial.stat().st_size for partial in partials.values() if partial.exists())
    _check_space(repo_id, sum(file.size or 0 for file in missing) - kept, cache)
    try:
        # One by one in this thread: on Ctrl-C `snapshot_download` first completes every file it has open.
        for file in files:
            with _progress_bars(not quiet and (file.size or 0) >= _SMALL):
                if partial := partials.get(file.rfilename):
                    _fetch_resumably(hf_hub_url(repo_id, file.rfilename, revision=info.sha), file, partial)
                path = hf_hub_download(repo_id, file.rfilename, revision=info.sha)  # only links a blob that is there
            _verify(Path(path), file, fresh=file in missing and not partial)
        # Asking by branch records the branch in the cache, for offline look-ups; only now is everything there.
        hf_hub_download(repo_id, _INDEX)
    except DownloadError:
        raise
    except Exception as error:  # as above, and hf_xet raises RuntimeError
        broken = f"the download of {repo_id} broke off ({_first_line(error)}); start it again, it goes on from there"
        raise DownloadError(_explain(error, repo_id) or broken) from error
    return storage / "snapshots" / info.sha


def _fetch_resumably(url: str, file: Any, partial: Path) -> None:
    """Fetch a big file into `blobs` of the cache, on from the partial file that an earlier call left, and check it.

    Not left to hf_hub_download: newer versions (2.4 for one) delete their temporary file when they are stopped, and
    hf_xet takes up no partial file, so a broken connection or Ctrl-C would cost all gigabytes that had arrived.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    blob, storage = partial.with_suffix(""), partial.parent.parent
    lock = storage.parent / ".locks" / storage.name / f"{blob.name}.lock"  # hf_hub_download takes the same
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    # `url` is on the Hub: the signed address it redirects to expires, maybe before a retry. The HTTP client drops the
    # token on a redirect to another host.
    headers = build_hf_headers(headers={"Accept-Encoding": "identity"})  # compressed, a range could be ignored
    options = {"headers": headers, "expected_size": file.size, "displayed_filename": file.rfilename}
    with WeakFileLock(lock):
        while not blob.exists():  # it may have come from another process
            with partial.open("ab") as stream:
                start = stream.tell()
                if start > file.size:
                    start = stream.seek(0)
                    stream.truncate()
                http_get(url, stream, resume_size=start, **options)
            try:
                _verify(partial, file, fresh=True)
                os.replace(partial, blob)
            except DownloadError:  # `partial` is deleted by now
                if start == 0:
                    raise


def _is_cached(file: Any, storage: Path, commit: str) -> bool:
    etag = file.lfs.sha256 if file.lfs else file.blob_id
    for path in (storage / "snapshots" / commit / file.rfilename, storage / "blobs" / etag):
        if path.exists():
            if file.size in (None, path.stat().st_size):
                return True
            _discard(path)
    return False


def _check_space(repo_id: str, needed: int, cache: Path) -> None:
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if needed > free:
        sizes = f"{repo_id} needs {needed / 1e9:.1f} GB, the disk of {cache} has {free / 1e9:.1f} GB free"
        raise DownloadError(f"{sizes}; make room, or set HF_HOME to a folder on another disk")


def _verify(path: Path, file: Any, fresh: bool) -> None:
    """Delete the file and raise if it is not what the Hub lists; hash it only if it was fetched just now."""
    from huggingface_hub.utils.sha import sha_fileobj

    facts = [("bytes", file.size, path.stat().st_size)]
    if fresh and file.lfs:
        with path.open("rb") as stream:
            facts.append(("sha256", file.lfs.sha256, sha_fileobj(stream).hex()))
    for name, listed, found in facts:
        if listed not in (None, found):
            _discard(path)
            problem = f"{file.rfilename} arrived damaged ({name}: {found}, not {listed})"
            raise DownloadError(f"{problem} and was deleted; start the download again")


def _discard(path: Path) -> None:
    """Delete a file of the cache and every link on the way from `path` to it."""
    while path.is_symlink():
        link, path = path, path.parent / path.readlink()
        link.unlink()
    path.unlink(missing_ok=True)


def _explain(error: BaseException, repo_id: str) -> str | None:
    """Say what `error` means for the user, unless it is just a failed connection."""
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"{constants.ENDPOINT}/{repo_id}"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    has_token = get_token() is not None
    if isinstance(error, errors.GatedRepoError):
        token = " and your token has no access (a fine-grained one must allow gated repos)" if has_token else ""
        return f"{repo_id} is gated{token}: accept its licence at {page}, then {log_in}"
    if status == 403 or (status == 401 and has_token):
        said = " ".join(str(getattr(error, "server_message", None)).split())
        return f"no access to {page} (HTTP {status}: {said}); {log_in}"
    # Who has no token gets 401 for a repo that does not exist.
    if status == 401 or isinstance(error, errors.RepositoryNotFoundError):
        return f"unknown repo id {repo_id!r} at {constants.ENDPOINT}; check the spelling; if it is private, {log_in}"
    if status is not None:
        return f"{constants.ENDPOINT} answers HTTP {status} for {repo_id}; try again later"
    if os.strerror(errno.ENOSPC).lower() in str(error).lower():  # hf_xet gives no errno
        return f"no space left in {constants.HF_HUB_CACHE}; make room, or set HF_HOME to a folder on another disk"
    return None


def _first_line(error: BaseException) -> str:
    return next((line.strip(" .") for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    from huggingface_hub import utils

    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()
