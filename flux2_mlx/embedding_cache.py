"""Text states of prompts seen before, kept on disk, so that the text encoder need not run or even be loaded."""

import hashlib
import json
import logging
import math
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from . import __version__
from .checkpoint import FORMAT_VERSION, Checkpoint, Component
from .device import MLX_VERSION
from .errors import CheckpointError, InputError
from .files import read_bytes
from .staging import remove_leftovers, write
from .text import TextEncoder

# Within the models folder.
FOLDER = "prompts"
UNFINISHED = "unfinished"  # denoised images
LIMIT_VARIABLE = "FLUX2_MLX_CACHE_BYTES"
_DEFAULT_LIMIT = 1_000_000_000  # bytes
_MAX_DIGITS = 18  # of the variable
# It matches nothing but our files, since the folder may have been the user's before.
_ENTRIES = "[0-9a-f]" * 64 + ".safetensors"
_HEADER_BYTES = 512  # more than an entry's header takes
_CODES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16"}  # of the safetensors format
# An encoder is known by this many pieces of this many bytes from each of its files, among other things.
_SAMPLES = 256
_SAMPLE_BYTES = 4096
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


class CachedEncoder:
    """The text encoder of a checkpoint; `load` is called for the first prompt that `cache` does not hold."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        quant: str,
        dtype: mx.Dtype,
        cache: EmbeddingCache | None,
        load: Callable[[], TextEncoder],
    ):
        self._checkpoint = checkpoint
        self._quant = quant
        self._dtype = dtype
        self._cache = cache
        self._load = load

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> mx.array:
        """States `[L, C]` of one prompt's token ids and attention mask `[1, L]`, evaluated."""
        if self._cache is None:
            return self._encode(ids, mask)
        key = entry_key(self._checkpoint, self._fingerprint, self._quant, self._dtype, ids, mask)
        features = self._checkpoint.components["text_encoder"].config.output_size
        states = self._cache.get(key, Form((ids.shape[1], features), self._dtype))
        if states is None:
            states = self._encode(ids, mask)
            self._cache.put(key, states)
        return states

    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> mx.array:
        states = self._encoder(mx.array(ids), mx.array(mask))[0]
        mx.eval(states)
        return states

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._checkpoint.components["text_encoder"])

    @cached_property
    def _encoder(self) -> TextEncoder:
        return self._load()


def entry_key(
    checkpoint: Checkpoint, fingerprint: str, quant: str, dtype: mx.Dtype, ids: np.ndarray, mask: np.ndarray
) -> str:
    """SHA-256 of all that the states depend on. Ids and mask stand for prompt, template, tokenizer and length."""
    facts = {
        "format": FORMAT_VERSION,
        "versions": [__version__, MLX_VERSION],
        "device": str(mx.default_device()),
        "weights": fingerprint,
        "variant": checkpoint.variant.name,
        "quant": quant,
        "dtype": str(dtype),
        "ids": ids.tolist(),
        "mask": mask.tolist(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def default_limit() -> int:
    """Bytes that a cache may take; InputError if the variable is no number of them."""
    text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_LIMIT)
    if not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise InputError(f"{LIMIT_VARIABLE} must be a number of bytes, got {text[:40]!r}")
    return int(text)


def fingerprint(network: Component) -> str:
    """SHA-256 of what tells a network from all others, and its files from a copy: its adapters, and of each file its
    place, its size, when it was last changed, and pieces of its content. What a folder says about itself would be a
    claim."""
    adapters = [network.adapters.identity] if network.adapters else []
    digest = hashlib.sha256(repr((network.config, network.quantization, *adapters)).encode())
    for path in network.files:
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                changed = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
                digest.update(repr((os.path.realpath(path), changed)).encode())
                for start in range(0, status.st_size, max(_SAMPLE_BYTES, status.st_size // _SAMPLES)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _read(path: Path, most: int) -> bytes:
    """The bytes of a regular file; none if it is something else, or larger than `most`."""
    try:
        return read_bytes(path, most)
    except InputError:
        return b""


def _header(key: str, payload: bytes, form: Form) -> bytes:
    """What stands before the `payload` of an entry: the header of a safetensors file, with a hash."""
    info = {"dtype": _CODES[form.dtype], "shape": list(form.shape), "data_offsets": [0, len(payload)]}
    digest = hashlib.sha256(key.encode() + payload).hexdigest()
    header = json.dumps({"__metadata__": {"sha256": digest}, "states": info}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def _is_finite(states: mx.array) -> bool:
    return bool(mx.isfinite(states).all())
