"""The hub that downloads ask, and errors that say what went wrong there."""

import errno
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DownloadError
from .downloads import BrokenError, DamagedError, RefusedError, first_line, quoted, redacted


class UnindexedError(DownloadError):
    """A repo holds no whole model in the layout of diffusers, but files of these `names`."""

    def __init__(self, message: str, names: Collection[str]):
        super().__init__(message)
        self.names = names


@dataclass(frozen=True)
class Hub:
    """The hub to ask, the headers to send, and the folder of the cache."""

    endpoint: str
    headers: Mapping[str, str]
    cache: Path

    @property
    def shown(self) -> str:
        return redacted(self.endpoint, self.headers, self.endpoint)

    def quote(self, text: str) -> str:
        return quoted(text, self.headers, self.endpoint)


def explain_listing(error: Exception, hub: Hub, repo_id: str) -> str:
    if isinstance(error, RefusedError):
        return _explain_refusal(error, hub, repo_id)
    if isinstance(error, BrokenError):
        return f"cannot reach {hub.shown} ({error}); check the connection, or give a folder"
    return f"{hub.shown} lists {repo_id} as no hub does ({hub.quote(first_line(error))}); check HF_ENDPOINT"


def explain_download(error: RefusedError | BrokenError | DamagedError | OSError, hub: Hub, repo_id: str) -> str:
    if isinstance(error, RefusedError):
        return _explain_refusal(error, hub, repo_id)
    if isinstance(error, BrokenError):
        return f"the download of {repo_id} broke off ({error}); start it again, it goes on from there"
    if isinstance(error, DamagedError):
        return f"{hub.shown} sends {repo_id} as no hub does ({error}); check HF_ENDPOINT, then start again"
    elsewhere = "set HF_HOME to a folder on another disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left in {hub.cache}; make room, or {elsewhere}"
    return f"can't write {error.filename or 'a file'} in {hub.cache} ({error.strerror}); check it, or {elsewhere}"


def _explain_refusal(error: RefusedError, hub: Hub, repo_id: str) -> str:
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
