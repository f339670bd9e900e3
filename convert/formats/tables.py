"""Codes of a few bits as the numbers that they stand for, looked up two at a time."""

import os
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from flux2_mlx.weights import READER

_CHUNK = 2**16  # pairs that a thread looks up at once, in the cache of its core
_THREADS = min(8, os.cpu_count() or 1)


def numbers(codes: mx.array, values: np.ndarray) -> mx.array:
    """The value, in float32 and in memory, that each byte stands for: `values` has 256 of them."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    found = pairs(flat.view(np.uint16), np.tile(values, 256), np.repeat(values, 256))
    with mx.stream(READER):
        return found[: codes.size].reshape(codes.shape)


def pairs(codes: np.ndarray, first: np.ndarray, second: np.ndarray) -> mx.array:
    """The `first` and the `second` value in float32 of each code, one after the other, in memory."""
    both = np.stack([first, second], axis=-1).astype(np.float32, copy=False).view(np.uint64)[:, 0]
    array = mx.zeros(2 * codes.size, stream=READER)
    mx.eval(array)
    out = np.array(array, copy=False).view(np.uint64)

    def fill(start: int) -> None:
        part = slice(start, start + _CHUNK)
        np.take(both, codes[part], out=out[part], mode="clip")

    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(fill, range(0, codes.size, _CHUNK)):
            pass
    return array
