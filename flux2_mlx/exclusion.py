"""Keeping what can be made again out of a Mac's backups and of its index."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

MARK = ".metadata_never_index"  # Spotlight leaves a folder with such a file alone
_PATIENCE = 10  # seconds that a run waits for the system at most


def exclude(folder: Path) -> None:
    """Have Time Machine and Spotlight leave `folder` alone, on a Mac. Done once, so that a user may undo it.

    It needs no rights, and where it can't be done nothing happens.
    """
    if sys.platform == "darwin":
        with suppress(OSError):
            (folder / MARK).touch(exist_ok=False)
            exclude_from_backups(folder)


def exclude_from_backups(folder: Path) -> None:
    """The same of Time Machine alone, and each time. It leaves no file, so that a cache of others stays what it is."""
    if sys.platform != "darwin":
        return
    command = ["tmutil", "addexclusion", str(folder.absolute())]
    silent = subprocess.DEVNULL
    with suppress(OSError, subprocess.TimeoutExpired):
        # The attribute that this sets is not all that it does, so that setting it alone need not be enough.
        subprocess.run(command, check=False, timeout=_PATIENCE, stdin=silent, stdout=silent, stderr=silent)
