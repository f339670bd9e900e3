"""A model of the Hub becomes a checkpoint: it is looked through first, then its weights are fetched and converted."""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from .. import hub
from ..checkpoint import Checkpoint
from ..config import Variant
from ..convert import Source, check_folds, check_source, formats, write_checkpoint
from ..convert.lora import Fold
from ..errors import InputError
from ..files import Claim
from ..hub import Download, is_weight

_log = logging.getLogger(__name__)

# Hears bytes done, bytes in all, and `download` or `convert`.
Progress = Callable[[int, int, str], object]


@dataclass(frozen=True)
class FirstUse:
    """What is about to be done to have a model that was not converted yet. Sizes are in bytes.

    `name` is the model's, `downloads` say what is fetched of each repo and what is known of its licence, `target` where
    the checkpoint of so many `converted` bytes goes, and `keep_source` whether what was fetched stays beside it.
    """

    name: str
    downloads: tuple[Download, ...]
    target: Path
    converted: int
    keep_source: bool

    @property
    def removed(self) -> int:
        """What will be removed again from the Hub's cache."""
        return 0 if self.keep_source else sum(download.fetched for download in self.downloads)

    @property
    def staying(self) -> int:
        """What will be on the disk in the end."""
        return self.converted + sum(download.size for download in self.downloads) - self.removed


Announce = Callable[[FirstUse], object]


def acquire(
    repo: str,
    target: Path,
    quant: str,
    text_quant: str,
    *,
    known: Variant | None = None,
    variant: str | None = None,
    text_only: bool = False,
    keep_source: bool = True,
    folds: Sequence[Fold] = (),
    force: bool = False,
    check: Callable[[Checkpoint], object] | None = None,
    announce: Announce | None = None,
    progress: Progress | None = None,
) -> None:
    """Fetch a repo and convert it. Before the first weight everything is checked that small files and headers tell.

    Args:
        repo: `owner/name`.
        target: the folder to make.
        quant: `bf16`, `qint8` or `qint4` for the transformer.
        text_quant: `bf16`, `qint8` or `qint4` for the text encoder.
        known: the row of the table that the repo belongs to.
        variant: the model's name where the repo can't tell.
        text_only: leave out the transformer and the VAE.
        keep_source: leave what was fetched in the Hub's cache. Otherwise it is removed after the conversion, but for
            what was there before and what another snapshot refers to.
        folds: adapters that are folded into its weights.
        force: replace an MLX checkpoint at `target`.
        check: called with the checkpoint that it will be, which has no files yet, and may raise what speaks against it.
        announce: called before the first weight.
        progress: see `Progress`.

    Raises:
        InputError, CheckpointError, DownloadError: the repo is no such model, can't be fetched, or does not fit on the
            disk.
    """
    fetched: Download | None = None
    claims = ExitStack()  # nobody removes the source before it is converted

    def look(outline: Path, download: Download) -> Download:
        nonlocal fetched
        claims.enter_context(Claim(download.storage))
        source = Source.open(outline, variant, text_only=text_only)
        components = check_source(source, quant, text_quant)
        check_folds(source, folds)
        download = download.without_weights(_unread(source, download))
        converted = sum(component.nbytes for component in components.values())
        if known:
            download = replace(download, licence=known.licence)
        check_space([download], target, converted)
        if check:
            check(Checkpoint.outline(source.variant, quant, text_quant, components))
        if announce:
            announce(FirstUse(repo, (download,), target, converted, keep_source))
        fetched = download
        return download

    with claims:
        fetching = labelled(progress, "download")
        folder = hub.fetch(repo, text_only=text_only, check=look, progress=fetching, pieces=formats.outline.pieces)
        claims.enter_context(Claim(folder.parent.parent))
        source = Source.open(folder, variant, text_only=text_only)
        converting = labelled(progress, "convert")
        convert_source(source, target, quant, text_quant, name=repo, folds=folds, force=force, progress=converting)
    if fetched and not keep_source:
        discard(fetched)


def convert_source(
    source: Source,
    target: Path,
    quant: str | None,
    text_quant: str | None,
    *,
    name: str,
    folds: Sequence[Fold] = (),
    force: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Convert an opened source, and say what a user should know of it.

    Args:
        source: the opened source.
        target: the folder to make, with those that it is in.
        quant: `bf16`, `qint8` or `qint4`; None: as stored.
        text_quant: the same for the text encoder; None: as stored, 8 bit, or 4 bit with `qint4`.
        name: what the checkpoint says that it was made from.
        folds: adapters that are folded into its weights.
        force: replace an MLX checkpoint at `target`.
        progress: called with bytes done and bytes in all.
    """
    for notice in source.notices(quant):
        _log.warning("%s", notice)
    target.parent.mkdir(parents=True, exist_ok=True)
    quants = source.quants(quant, text_quant)
    write_checkpoint(source, target, *quants, name=name, folds=folds, force=force, progress=progress)


def discard(download: Download) -> None:
    """Remove what a download has brought, unless another process is just using it."""
    try:
        with Claim(download.storage, alone=True):
            download.discard()
    except InputError as error:
        _log.warning("the download stays: %s", error)


def labelled(progress: Progress | None, what: str) -> Callable[[int, int], object] | None:
    """What hears how much of `what` is done, and passes it on to `progress`."""
    return None if progress is None else lambda done, total: progress(done, total, what)


def _unread(source: Source, download: Download) -> set[str]:
    """The weights that a conversion does not read, such as those of a second format."""
    read = {path.relative_to(source.place).as_posix() for paths in source.files.values() for path in paths}
    return {name for name in download.files if is_weight(name) and name not in read}


def check_space(downloads: Sequence[Download], target: Path, converted: int) -> None:
    """InputError if what is still to be fetched and what is converted from it do not fit on their disks."""
    if not downloads:
        return
    remaining, storage = sum(download.remaining for download in downloads), downloads[0].storage
    cache, models = _existing(storage), _existing(target)
    shared = _disk(cache) == _disk(models)
    repos = " and ".join(dict.fromkeys(download.repo_id for download in downloads))
    fetching = f"fetching the rest of {repos} takes {_gb(remaining)}"
    converting = f"converting it {_gb(converted)} in {target.parent}"
    if shared and shutil.disk_usage(cache).free < remaining + converted:
        taken, free, place = f"{fetching} and {converting}", shutil.disk_usage(cache).free, storage.parent
    elif shutil.disk_usage(cache).free < remaining:
        taken, free, place = fetching, shutil.disk_usage(cache).free, storage.parent
    elif shutil.disk_usage(models).free < converted:
        taken, free, place = converting, shutil.disk_usage(models).free, target.parent
    else:
        return
    advice = "make room, or set HF_HOME or FLUX2_MLX_HOME to a folder on another disk"
    raise InputError(f"no space: {taken}, the disk of {place} has {_gb(free)} free; {advice}")


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _disk(folder: Path) -> int:
    return os.stat(folder).st_dev


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"
