"""Text states of prompts seen before, so that the text encoder need not run or even be loaded."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import cached_property

import mlx.core as mx
import numpy as np

from .checkpoint import FORMAT_VERSION, Checkpoint, Component
from .device import MLX_VERSION
from .embedding_cache import EmbeddingCache, Form
from .errors import CheckpointError
from .text import TextEncoder

# A network is known by this many pieces of this many bytes from each of its files, among other things: 1 MB, which
# takes a disk some milliseconds.
_SAMPLES = 256
_SAMPLE_BYTES = 4096


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
    from . import __version__  # which takes a while to be read

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
