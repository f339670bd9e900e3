"""Files of the Hub's cache: a blob's name is the hash that the Hub states for its content."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from flux2_mlx.errors import CheckpointError
from flux2_mlx.json_files import open_model_file

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CHUNK = 1 << 19  # so few that a core's cache holds them


def blobs(paths: Iterable[Path]) -> dict[Path, Path]:
    """The blob of each of `paths` that is a link to one."""
    found = {path: Path(os.path.realpath(path)) for path in paths if path.is_symlink()}
    return {path: x for path, x in found.items() if x.parent.name == "blobs" and _HASH.fullmatch(x.name)}


def check_blob(path: Path, blob: Path, report: Callable[[int], None]) -> None:
    """Read all of `blob`, to which `path` leads, and raise CheckpointError if it is not what its name says.

    Large files are named by their SHA-256, small ones by git's SHA-1. `report` is called with bytes read.
    """
    with open_model_file(blob) as file:
        size = os.fstat(file.fileno()).st_size
        if len(blob.name) == 64:
            digest = hashlib.sha256()
        else:
            digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        for data in _chunks(file, path):
            digest.update(data)
            report(len(data))
    if digest.hexdigest() != blob.name:
        raise CheckpointError(
            f"{path} is damaged: its hash is {digest.hexdigest()}, the Hub states {blob.name}; delete {blob} and "
            "download the model again"
        )


def _chunks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        while data := file.read(_CHUNK):
            yield data
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
