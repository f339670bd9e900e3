"""Outlines: files of weights of a repo that have the right size, but hold only what tells what they are."""

import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ..errors import DownloadError
from ..weights import HEADER_LIMIT, POINTER
from .cache import Download
from .downloads import read_range
from .errors import Hub

# Given a file's name, its first bytes and its size, where the pieces begin and end that tell what is in it. The first
# one is at its beginning; where that goes on behind the bytes that are given, it is asked again with more of them.
Pieces = Callable[[str, bytes, int], list[tuple[int, int]]]
_START = 1 << 16  # bytes; the header of a file of FLUX.2 has at most 50,000
_CONNECTIONS = 8  # at a time, for pieces of a file of which there can be hundreds


def header_only(name: str, start: bytes, size: int) -> list[tuple[int, int]]:
    """The header of a safetensors file."""
    length = 8 + struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    return [(0, length if length <= min(size, HEADER_LIMIT) else len(start))]


@contextmanager
def outline(hub: Hub, wanted: Download, pieces: Pieces) -> Iterator[Path]:
    """A folder that looks like the whole snapshot as long as no weights are read: files that are there, and in place of
    missing weights files of their size that take no space but for these pieces."""
    with tempfile.TemporaryDirectory(prefix="flux2-mlx-") as made:
        folder = os.path.realpath(made)  # as messages name it
        for name in wanted.files:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if (wanted.snapshot / name).exists():
                path.symlink_to(wanted.snapshot / name)
            else:
                write_outline(hub, wanted, name, path, pieces)
        yield Path(folder)


def write_outline(hub: Hub, wanted: Download, name: str, path: Path, pieces: Pieces) -> None:
    """Make a file of the size of `name`, a file of weights, that takes no space but for its `pieces`."""
    size = wanted.files[name].size
    url = url_of(wanted, name)
    start = read_range(url, hub.headers, 0, min(size, _START)) if size else b""
    if start.startswith(POINTER):
        raise DownloadError(
            f"{wanted.repo_id} has a Git LFS pointer in place of {name}; its owner must upload the file"
        )
    first, *others = pieces(name, start, size)
    while len(start) < min(first[1], HEADER_LIMIT):
        end = min(max(first[1], 2 * len(start)), size, HEADER_LIMIT)
        more = read_range(url, hub.headers, len(start), end)
        if not more:  # the file is shorter than its repo says, which is seen by who reads it
            break
        start += more
        first, *others = pieces(name, start, size)
    with path.open("wb") as file, ThreadPoolExecutor(_CONNECTIONS) as threads:
        file.write(start)
        file.truncate(size)
        behind = [piece for piece in others if piece[1] > len(start)]
        for (begin, _), data in zip(
            behind, threads.map(lambda piece: read_range(url, hub.headers, *piece), behind), strict=True
        ):
            file.seek(begin)
            file.write(data)


def url_of(wanted: Download, name: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(wanted.repo_id, name, revision=wanted.commit)
