"""Where adapters come from."""

import os
from pathlib import Path

from ..convert.lora import AdapterFile, read_adapter
from ..errors import InputError
from ..hub import is_repo_id


def open_adapter(source: str | os.PathLike[str], weight_name: str | None = None) -> AdapterFile:
    """The adapter that a file holds, or a folder, of which only headers are read.

    Args:
        source: its path.
        weight_name: the file's name in the folder, where that holds several.

    Raises:
        InputError: there is nothing, or what is only on the Hub. CheckpointError: it is no adapter for FLUX.2.
    """
    path = Path(source).expanduser()
    if not os.path.lexists(path) and is_repo_id(str(source).partition(":")[0]):
        raise InputError(
            f"there is no file or folder {os.fspath(source)!r}; of a repo of the Hub fetch the adapter's file, with "
            "`hf download`, and give its path"
        )
    return read_adapter(path, weight_name)
