"""Some files of a repo, of which at first only as much is fetched as tells what they hold."""

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import DownloadError
from ..files import Claim
from .cache import Download, latest_files, noted_listing, storage_of
from .downloads import BrokenError, DamagedError, RefusedError
from .errors import Hub, explain_download, explain_listing
from .outline import Pieces, outline
from .repo import UNLISTED, Choose, Listing, Report, bring_weights, download_of, list_files, open_hub, prepare

_logger = logging.getLogger(__name__)
# What can be of use of a repo, in whatever folder of it.
_NAME = r"[A-Za-z0-9_][ -.0-\[\]-~]{0,199}"
_USEFUL = re.compile(rf"(?:{_NAME}/){{0,5}}{_NAME}\.(?:safetensors|gguf|json|txt|jinja)")


class Selection:
    """Files of a repo, in the folder `folder`, which is an outline until they are fetched.

    Attributes:
        repo: `owner/name`.
        names: the names of the files, relative to the repo.
        folder: holds them; small ones as they are, and weights with nothing in them but the pieces asked for.
        download: what of them is in the Hub's cache and what is not; None where nobody could be asked.
        listed: the names of all files of the repo, as far as they are known.
        bases: the repos of what it was made from, as far as it says so and could be asked.
    """

    def __init__(
        self,
        repo: str,
        names: Collection[str],
        folder: Path,
        hub: Hub,
        listed: Collection[str],
        download: Download | None = None,
        bases: Sequence[str] = (),
    ):
        self.repo = repo
        self.names = names
        self.folder = folder
        self._hub = hub
        self.listed = listed
        self.download = download
        self.bases = bases

    def fetch(self, progress: Report | None) -> None:
        """Bring the weights; `progress` hears the bytes that are there and those in all. `folder` lasts from then on.

        Raises:
            DownloadError: a file can't be fetched; what has arrived is kept, and the next call goes on from there.
        """
        if self.download is None:
            return
        with _explained(self._hub, self.repo):
            self.download.note_listing(self.listed)
            bring_weights(self._hub, self.download, progress)
            self.download.record(all_wanted=False)
        self.folder = self.download.snapshot

    def leave_out(self, unused: Collection[str]) -> None:
        """Fetch none of these files."""
        if self.download is not None:
            self.download = self.download.without_weights(unused)

    def called(self, text: str) -> str:
        """A message with the repo in place of the folder."""
        return text.replace(f"{self.folder}/", f"{self.repo}:").replace(str(self.folder), self.repo)


@contextmanager
def select(repo_id: str, choose: Choose, pieces: Pieces) -> Iterator[Selection]:
    """Files of a repo at its latest commit, or as they are in the cache where nobody can be asked.

    Args:
        repo_id: `owner/name`.
        choose: says which; DownloadError if they are not there.
        pieces: the pieces of a file of weights that tell what it holds.

    Raises:
        DownloadError: as `fetch` has it, or what `choose` raises.
    """
    hub, listed, reason = _asked(repo_id)
    with ExitStack() as held:
        if listed is None:
            yield _cached(repo_id, hub, choose, reason, held)
        else:
            yield _listed(repo_id, hub, listed, choose, pieces, held)


def names_of(repo_id: str) -> list[str]:
    """The names of the files of a repo that can be of use, as `select` has them, or as the cache has them."""
    hub, listed, _ = _asked(repo_id)
    return latest_files(storage_of(hub.cache, repo_id))[1] if listed is None else [*listed.files]


def _asked(repo_id: str) -> tuple[Hub, Listing | None, str]:
    """The hub and what it lists of a repo; None, and for what reason, where nobody can be asked."""
    hub, offline = open_hub()
    if offline:
        absent = f"{repo_id} is not in the cache {hub.cache} and offline mode is on; fetch it once with a connection"
        return hub, None, absent
    try:
        return hub, list_files(hub, repo_id, lambda name: _USEFUL.fullmatch(name) is not None), ""
    except UNLISTED as error:
        return hub, None, explain_listing(error, hub, repo_id)


def _listed(repo_id: str, hub: Hub, listed: Listing, choose: Choose, pieces: Pieces, held: ExitStack) -> Selection:
    names = choose(listed.files)
    with _explained(hub, repo_id):
        held.enter_context(Claim(storage_of(hub.cache, repo_id), make=True))
        wanted = download_of(hub, repo_id, listed, {name: listed.files[name] for name in names})
        prepare(hub, wanted)
        folder = held.enter_context(outline(hub, wanted, pieces))
        return Selection(repo_id, names, folder, hub, [*listed.files, *listed.others], wanted, listed.bases)


def _cached(repo_id: str, hub: Hub, choose: Choose, reason: str, held: ExitStack) -> Selection:
    """The files as the cache has them; DownloadError for that `reason` if they are not there."""
    snapshot, there = latest_files(storage_of(hub.cache, repo_id))
    try:
        names = choose(there)
    except DownloadError as error:
        raise DownloadError(reason) from error
    held.enter_context(Claim(storage_of(hub.cache, repo_id)))
    listed = noted_listing(snapshot.parent.parent, snapshot.name) or there
    return Selection(repo_id, names, snapshot, hub, listed)


@contextmanager
def _explained(hub: Hub, repo_id: str) -> Iterator[None]:
    """Turn whatever goes wrong in a transfer into a DownloadError."""
    try:
        yield
    except (RefusedError, BrokenError, DamagedError, OSError) as error:
        raise DownloadError(explain_download(error, hub, repo_id)) from error
