"""Adapters by their names."""

import os

from ..convert.lora import AdapterFile
from .acquisition import Progress
from .adapter_sources import find_adapter


def open_adapter(
    source: str | os.PathLike[str], weight_name: str | None = None, *, progress: Progress | None = None
) -> AdapterFile:
    """The adapter in a file, a folder, or a repo of the Hub, from where it is fetched after a look at its header.

    Args:
        source, weight_name: see `find_adapter`.
        progress: called with bytes done, bytes in all, and `download`.

    Raises:
        InputError, DownloadError, CheckpointError: as `find_adapter` and `FoundAdapter.fetch` have it.
    """
    with find_adapter(source, weight_name) as found:
        found.fetch(progress)
        return found.file
