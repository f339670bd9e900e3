"""What is done to have a model that was not converted yet: how it is fetched, and who hears of it."""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import Checkpoint
from ..errors import InputError
from ..files import Claim
from ..mixture import Calibration

if TYPE_CHECKING:
    from ..hub import Download

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstUse:
    """What is about to be fetched and converted. Sizes are in bytes.

    `name` is the model's, `downloads` say what is fetched of each repo and what is known of its licence, `target` where
    the checkpoint of so many `converted` bytes goes, and `keep_source` whether what was fetched stays beside it.
    """

    name: str
    downloads: "tuple[Download, ...]"
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


# Hears bytes done, bytes in all, and `download` or `convert`.
Progress = Callable[[int, int, str], object]
Announce = Callable[[FirstUse], object]
Check = Callable[[Checkpoint], object]
Calibrate = Callable[[Checkpoint], Calibration]


@dataclass(frozen=True)
class Fetching:
    """How models are fetched, and who hears of that and of their conversion.

    Attributes:
        keep_source: leave what was fetched in the Hub's cache. Otherwise it is removed after the conversion, but for
            what was there before and what another snapshot refers to.
        check: called with the checkpoint that will be made, which has no files yet, and may raise what speaks against
            it.
        announce: called before the first weight is fetched.
        progress: see `Progress`.
    """

    keep_source: bool = True
    check: Check | None = None
    announce: Announce | None = None
    progress: Progress | None = None

    def begin(self, name: str, downloads: "tuple[Download, ...]", target: Path, outline: Checkpoint) -> None:
        """Have all checked and announced that is known before the first weight of the model `name` is fetched.

        Raises:
            InputError: it does not fit on the disk. And what `check` raises.
        """
        converted = sum(component.nbytes for component in outline.components.values())
        _check_space(downloads, target, converted)
        if self.check:
            self.check(outline)
        if self.announce:
            self.announce(FirstUse(name, downloads, target, converted, self.keep_source))

    def report(self, what: str) -> Callable[[int, int], object] | None:
        """See `labelled`."""
        return labelled(self.progress, what)

    def end(self, downloads: "Sequence[Download]") -> None:
        """Remove what was fetched if it is not to be kept, unless another process is just using it."""
        for download in downloads if not self.keep_source else ():
            try:
                with Claim(download.storage, alone=True):
                    download.discard()
            except InputError as error:
                _log.warning("the download stays: %s", error)


def labelled(progress: Progress | None, what: str) -> Callable[[int, int], object] | None:
    """A function that passes bytes done and bytes in all of `what`, `download` or `convert`, on to `progress`."""
    return None if progress is None else lambda done, total: progress(done, total, what)


def _check_space(downloads: "Sequence[Download]", target: Path, converted: int) -> None:
    """InputError if what is still to be fetched and what is converted from it do not fit on their disks."""
    remaining = sum(download.remaining for download in downloads)
    storage = downloads[0].storage
    cache, models = _existing(storage), _existing(target)
    in_cache = shutil.disk_usage(cache).free
    in_models = shutil.disk_usage(models).free
    repos = " and ".join(dict.fromkeys(download.repo_id for download in downloads))
    fetching = f"fetching the rest of {repos} takes {_gb(remaining)}"
    converting = f"converting it {_gb(converted)} in {target.parent}"
    if _disk(cache) == _disk(models) and in_cache < remaining + converted:
        raise _no_space(f"{fetching} and {converting}", storage.parent, in_cache)
    if in_cache < remaining:
        raise _no_space(fetching, storage.parent, in_cache)
    if in_models < converted:
        raise _no_space(converting, target.parent, in_models)


def _no_space(taken: str, place: Path, free: int) -> InputError:
    advice = "make room, or set HF_HOME or FLUX2_MLX_HOME to a folder on another disk"
    return InputError(f"no space: {taken}, the disk of {place} has {_gb(free)} free; {advice}")


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _disk(folder: Path) -> int:
    return os.stat(folder).st_dev


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"
