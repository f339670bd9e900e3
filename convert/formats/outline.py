"""What must be there of a file of weights, of all its bytes, for it to be told what it holds."""

import struct
from collections.abc import Iterable, Iterator
from typing import Any

from flux2_mlx.errors import CheckpointError
from flux2_mlx.json_files import parse_json
from flux2_mlx.weights import HEADER_LIMIT

from . import bitsandbytes, gguf

_MAX_BYTES = 64 << 20
_MAX_PIECES = 5_000


def pieces(name: str, start: bytes, size: int, early: Iterable[str] = ()) -> list[tuple[int, int]]:
    """Where the pieces of a file begin and end that tell what it holds: its header, and small tensors.

    Args:
        name: of the file.
        start: its first bytes. If the first piece goes on behind them, the others are found when it is there.
        size: of the whole file.
        early: the last parts of the names of tensors that are read with the header.

    Raises:
        CheckpointError: there are more of these tensors, or larger ones, than in any model.
    """
    if name.lower().endswith(".gguf"):
        return [(0, min(gguf.header_length(start, size), size))]
    length = 8 + struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if not len(start) >= length > 8:
        return [(0, length if length <= min(size, HEADER_LIMIT) else len(start))]
    found = [piece for piece in _tensors(start[8:length], length, frozenset(early)) if piece[1] <= size]
    if len(found) > _MAX_PIECES or sum(end - begin for begin, end in found) > _MAX_BYTES:
        raise CheckpointError(f"{name} is of more than {_MAX_PIECES} quantized weights, or says too much of them")
    return [(0, length), *found]


def _tensors(header: bytes, start: int, early: frozenset[str]) -> Iterator[tuple[int, int]]:
    """Where the tensors lie that are read early; a damaged header has none, which is said by who reads it."""
    try:
        entries: dict[str, Any] = parse_json(header)
        for name, entry in entries.items():
            if bitsandbytes.STATE in name or name.rpartition(".")[2] in early:
                begin, end = entry["data_offsets"]
                if type(begin) is type(end) is int and 0 <= begin < end:
                    yield start + begin, start + end
    except (ValueError, KeyError, TypeError, AttributeError):
        return
