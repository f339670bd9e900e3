"""A folder of states, such as those of prompts seen before, each a file under a key that stands for what it is of."""

import hashlib
import json
import logging
import math
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .errors import InputError
from .files import read_bytes
from .staging import remove_leftovers, write
from .weights import FLOATS

# Within the models folder.
FOLDER = "prompts"
UNFINISHED = "unfinished"  # denoised images
LIMIT_VARIABLE = "FLUX2_MLX_CACHE_BYTES"
_DEFAULT_LIMIT = 1_000_000_000  # bytes: of klein-4b, whose 512 tokens of 7,680 features take 8 MB, 127 prompts
_MAX_DIGITS = 18  # of the variable
# It matches nothing but our files, since the folder may have been the user's before.
_ENTRIES = "[0-9a-f]" * 64 + ".safetensors"
_HEADER_BYTES = 512  # more than an entry's header takes, of which a prompt of klein-4b has 168
_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A file of the cache: when it was last used, in ns, and its size in bytes."""

    used: int
    size: int
    path: Path


class Form(NamedTuple):
    """The shape and the dtype that all states of a kind have."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


class EmbeddingCache:
    """Text states by key, a safetensors file each, in a folder that several processes may use at once.

    Args:
        folder: made when there is something to keep.
        max_bytes: of all entries; the least recently used make room. None: `$FLUX2_MLX_CACHE_BYTES`, or 1 GB.
        what: the name of what is kept, for warnings.

    Raises:
        InputError: the variable is not a number of bytes.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None, what: str = "encoded prompts"):
        self.folder = folder
        self._what = what
        self.max_bytes = default_limit() if max_bytes is None else max_bytes
        self._warned = False

    def get(self, key: str, form: Form) -> mx.array | None:
        """The states of `form` kept under `key`, bit for bit; None if there are none. An entry that is anything else is
        removed."""
        path = self._path(key)
        states = None
        with suppress(OSError):  # what another user keeps from us, say, is not damaged
            data = _read(path, _HEADER_BYTES + form.nbytes)
            payload = data[-form.nbytes :]
            if data == _header(key, payload, form) + payload:
                states = mx.array(np.frombuffer(payload, np.uint8)).view(form.dtype).reshape(form.shape)
                states = states if _is_finite(states) else None
            if states is None:
                path.unlink()
            else:
                os.utime(path)
        return states

    def put(self, key: str, states: mx.array) -> None:
        """Keep `states` if they are finite. Where that can't be done, the first failure is logged as a warning."""
        needed = states.nbytes + _HEADER_BYTES
        if needed > self.max_bytes or not _is_finite(states):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(needed)
            payload = np.array(states.view(mx.uint8)).tobytes()
            write(self._path(key), _header(key, payload, Form(states.shape, states.dtype)) + payload, replace=True)
        except OSError as error:
            if not self._warned:
                _log.warning("can't keep %s in %s: %s", self._what, self.folder, error.strerror)
            self._warned = True

    def remove(self, key: str) -> None:
        """Forget what is kept under `key`, if anything is."""
        with suppress(OSError):
            self._path(key).unlink()

    def entries(self) -> list[Entry]:
        """What is kept, the least recently used first."""
        found = []
        for path in self._found(_ENTRIES):
            with suppress(OSError):  # another process may have removed it, or it is a link to nowhere
                status = path.stat()
                found.append(Entry(status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def clear(self) -> None:
        """Remove all entries; InputError if that can't be done."""
        remove_leftovers(self.folder)
        for path in self._found(_ENTRIES):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"can't remove {path}: {error.strerror}") from error

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _found(self, pattern: str) -> list[Path]:
        try:
            return list(self.folder.glob(pattern))
        except OSError:  # a folder that can't be looked into holds nothing for us
            return []

    def _make_room(self, needed: int) -> None:
        entries = self.entries()
        excess = sum(entry.size for entry in entries) + needed - self.max_bytes
        for entry in entries:
            if excess <= 0:
                return
            with suppress(OSError):  # another process has removed it, or it is a folder
                entry.path.unlink()
            excess -= entry.size


def default_limit() -> int:
    """Bytes that a cache may take; InputError if the variable is no number of them."""
    text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_LIMIT)
    if not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise InputError(f"{LIMIT_VARIABLE} must be a number of bytes, got {text[:40]!r}")
    return int(text)


def _read(path: Path, most: int) -> bytes:
    """The bytes of a regular file; none if it is something else, or larger than `most`."""
    try:
        return read_bytes(path, most)
    except InputError:
        return b""


def _header(key: str, payload: bytes, form: Form) -> bytes:
    """What stands before the `payload` of an entry: the header of a safetensors file, with a hash."""
    info = {"dtype": FLOATS[form.dtype], "shape": list(form.shape), "data_offsets": [0, len(payload)]}
    digest = hashlib.sha256(key.encode() + payload).hexdigest()
    header = json.dumps({"__metadata__": {"sha256": digest}, "states": info}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def _is_finite(states: mx.array) -> bool:
    return bool(mx.isfinite(states).all())
