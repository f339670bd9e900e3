"""Text states of prompts seen before, kept on disk, so that the text encoder need not run or even be loaded."""

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from . import __version__
from .checkpoint import FORMAT_VERSION, Checkpoint
from .errors import CheckpointError, InputError
from .text import TextEncoder
from .weights import read_header

FOLDER = "prompts"  # within the models folder
LIMIT_VARIABLE = "FLUX2_MLX_CACHE_BYTES"
_DEFAULT_LIMIT = 1_000_000_000
# Patterns that match nothing but our files, since the folder may have been the user's before.
_KEY = "[0-9a-f]" * 64
_ENTRIES, _PARTIALS = f"{_KEY}.safetensors", f"{_KEY}.*.partial"
_LEFTOVER_SECONDS = 3600  # writing takes far less, so an older partial file is that of a writer that was killed
_HEADER_BYTES = 512  # more than an entry's header takes
_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A file of the cache: when it was last used, in ns, and its size in bytes."""

    used: int
    size: int
    path: Path


class EmbeddingCache:
    """Text states by key, a safetensors file each, in a folder that several processes may use at once.

    Args:
        folder: made when there is something to keep.
        max_bytes: of all entries; the least recently used make room. None: `$FLUX2_MLX_CACHE_BYTES`, or 1 GB.

    Raises:
        InputError: the variable is not a number of bytes.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None):
        self.folder = folder
        self.max_bytes = _limit() if max_bytes is None else max_bytes
        self._warned = False

    def get(self, key: str) -> mx.array | None:
        """The states kept under `key`, bit for bit; a damaged entry is removed, and there are none."""
        path, states = self._path(key), None
        with suppress(OSError):
            path.open("rb").close()  # what another user keeps from us, say, is not damaged
            states = _read(path)
            if states is None:
                path.unlink()
            else:
                os.utime(path)
        return states

    def put(self, key: str, states: mx.array) -> None:
        """Keep `states`. Where that can't be done, the first failure is logged as a warning."""
        needed = states.nbytes + _HEADER_BYTES
        if needed > self.max_bytes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self._make_room(needed)
            self._write(key, states)
        except OSError as error:
            if not self._warned:
                _log.warning("can't keep encoded prompts in %s: %s", self.folder, error.strerror)
            self._warned = True

    def remove(self, key: str) -> None:
        """Forget what is kept under `key`, if anything is."""
        with suppress(OSError):
            self._path(key).unlink()

    def entries(self) -> list[Entry]:
        """What is kept, the least recently used first."""
        found = []
        for path in self.folder.glob(_ENTRIES):
            with suppress(FileNotFoundError):  # another process may have removed it
                status = path.stat()
                found.append(Entry(status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def clear(self) -> None:
        """Remove all entries; InputError if that can't be done."""
        for path in (*self.folder.glob(_ENTRIES), *self.folder.glob(_PARTIALS)):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"can't remove {path}: {error.strerror}") from error

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(_PARTIALS):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _LEFTOVER_SECONDS:
                    path.unlink()

    def _make_room(self, needed: int) -> None:
        entries = self.entries()
        excess = sum(entry.size for entry in entries) + needed - self.max_bytes
        for entry in entries:
            if excess <= 0:
                return
            entry.path.unlink(missing_ok=True)
            excess -= entry.size

    def _write(self, key: str, states: mx.array) -> None:
        """Write an entry that appears only when it is complete."""
        partial = self.folder / f"{key}.{secrets.token_hex(8)}.partial"
        try:
            with partial.open("xb") as file:
                mx.save_safetensors(file, {"states": states}, {"sha256": _digest(states)})
            partial.replace(self._path(key))
        finally:
            partial.unlink(missing_ok=True)


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
        self._checkpoint, self._quant, self._dtype = checkpoint, quant, dtype
        # Nothing else tells the weights of two checkpoints apart for certain.
        self._cache = cache if checkpoint.source.get("fingerprint") else None
        self._load = load

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> mx.array:
        """States `[L, C]` of one prompt's token ids and attention mask `[1, L]`, evaluated."""
        if self._cache is None:
            return self._encode(ids, mask)
        key = entry_key(self._checkpoint, self._quant, self._dtype, ids, mask)
        states = self._cache.get(key)
        if states is None:
            states = self._encode(ids, mask)
            self._cache.put(key, states)
        return states

    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> mx.array:
        states = self._encoder(mx.array(ids), mx.array(mask))[0]
        mx.eval(states)
        return states

    @cached_property
    def _encoder(self) -> TextEncoder:
        return self._load()


def entry_key(checkpoint: Checkpoint, quant: str, dtype: mx.Dtype, ids: np.ndarray, mask: np.ndarray) -> str:
    """SHA-256 of all that the states depend on. Ids and mask stand for prompt, template, tokenizer and length."""
    facts = {
        "format": FORMAT_VERSION,
        "versions": [__version__, mx.__version__],
        "device": str(mx.default_device()),
        "weights": checkpoint.source["fingerprint"],
        "variant": checkpoint.variant.name,
        "quant": quant,
        "dtype": str(dtype),
        "ids": ids.tolist(),
        "mask": mask.tolist(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _limit() -> int:
    text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_LIMIT)
    if not text.isdecimal():
        raise InputError(f"{LIMIT_VARIABLE} must be a number of bytes, got {text!r}")
    return int(text)


def _read(path: Path) -> mx.array | None:
    """The states in a file, or None if it is missing or damaged."""
    try:
        read_header(path)  # MLX reads lazily, and garbage from a file that is too short
        arrays, metadata = mx.load(str(path), return_metadata=True)
        return arrays["states"] if metadata["sha256"] == _digest(arrays["states"]) else None
    except (CheckpointError, RuntimeError, ValueError, KeyError):
        return None


def _digest(states: mx.array) -> str:
    """SHA-256 of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{states.dtype} {states.shape}".encode())
    digest.update(np.array(states.view(mx.uint8)).tobytes())
    return digest.hexdigest()
