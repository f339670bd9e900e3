"""A repo of the Hub becomes a checkpoint: it is looked through first, then its weights are fetched and converted."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from .. import hub
from ..checkpoint import Checkpoint
from ..config import Variant
from ..convert import Source, check_folds, check_source, formats, write_checkpoint
from ..files import Claim
from ..hub import Download, is_weight
from .first_use import Fetching
from .parts import WHOLE, WRITING
from .sources import Wanted

_log = logging.getLogger(__name__)


def acquire(
    repo: str,
    target: Callable[[str, str], Path],
    wanted: Wanted,
    fetching: Fetching = Fetching(),  # noqa: B008 (it is frozen)
    *,
    known: Variant | None = None,
    force: bool = False,
) -> Path:
    """Fetch a repo and convert it. Before the first weight everything is checked that small files and headers tell.
    Gives the folder.

    Args:
        repo: `owner/name`.
        target: the folder to make, by the quantizations of transformer and text encoder.
        wanted: what of it, and how it is to be stored.
        fetching: how, and who hears of it.
        known: the row of the table that the repo belongs to.
        force: replace an MLX checkpoint at `target`.

    Raises:
        InputError, CheckpointError, DownloadError: the repo is no such model, can't be fetched, or does not fit on the
            disk.
    """
    fetched: list[Download] = []
    claims = ExitStack()  # nobody removes the source before it is converted

    def look(outline: Path, download: Download) -> Download:
        claims.enter_context(Claim(download.storage))
        source = Source.open(outline, wanted.variant, text_only=wanted.text_only)
        quants = source.quants(wanted.quant, wanted.text_quant)
        components = check_source(source, *quants)
        check_folds(source, wanted.folds)
        download = download.without_weights(_unread(source, download))
        if known:
            download = replace(download, licence=known.licence)
        fetching.begin(repo, (download,), target(*quants), Checkpoint.outline(source.variant, *quants, components))
        fetched[:] = [download]
        return download

    with claims:
        pieces = formats.outline.pieces
        folders = WRITING if wanted.text_only else WHOLE
        folder = hub.fetch(repo, folders=folders, check=look, progress=fetching.report("download"), pieces=pieces)
        claims.enter_context(Claim(folder.parent.parent))
        source = Source.open(folder, wanted.variant, text_only=wanted.text_only)
        made = target(*source.quants(wanted.quant, wanted.text_quant))
        called = partial(_called, folder, repo)
        progress = fetching.report("convert")
        convert_source(source, made, wanted, name=repo, force=force, progress=progress, called=called)
    fetching.end(fetched)
    return made


def convert_source(
    source: Source,
    target: Path,
    wanted: Wanted,
    *,
    name: str,
    force: bool = False,
    progress: Callable[[int, int], object] | None = None,
    called: Callable[[str], str] = str,
) -> None:
    """Convert an opened source, and say what a user should know of it.

    Args:
        source: the opened source.
        target: the folder to make, with the folders that it is in.
        wanted: how it is to be stored, and what is folded in.
        name: what the checkpoint says that it was made from.
        force: replace an MLX checkpoint at `target`.
        progress: called with bytes done and bytes in all.
        called: gives a text with the names in it that a user knows files by; what is odd about a file is said with its
            path, where one can look.
    """
    for notice in source.notices(wanted.quant, wanted.text_quant):
        _log.warning("%s", notice if notice in source.notes else called(notice))
    target.parent.mkdir(parents=True, exist_ok=True)
    quants = source.quants(wanted.quant, wanted.text_quant)
    write_checkpoint(source, target, *quants, name=name, folds=wanted.folds, force=force, progress=progress)


def _called(folder: Path, repo: str, text: str) -> str:
    return text.replace(f"{folder}/", f"{repo}:").replace(str(folder), repo)


def _unread(source: Source, download: Download) -> set[str]:
    """The weights that a conversion does not read, such as those of a second format."""
    read = {path.relative_to(source.place).as_posix() for paths in source.files.values() for path in paths}
    return {name for name in download.files if is_weight(name) and name not in read}
