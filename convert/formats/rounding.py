"""Unpacked weights in bfloat16, without a second copy of them."""

from collections.abc import Iterable, Iterator

import mlx.core as mx
import numpy as np

from flux2_mlx.weights import READER, Tensors

from .gguf import Gguf
from .packed import Unpacked

_STEP = 2**21  # values that are rounded at a time


class Rounded:
    """Tensors of which those that are made when they are read come in bfloat16, rounded in the memory that they were
    made in: beside the largest of a model, its embedding, there would be no room for half as much again."""

    def __init__(self, tensors: Unpacked | Gguf):
        self._tensors = tensors
        self.infos = tensors.infos

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        names = list(names)
        for name, array in zip(names, self._tensors.read(names), strict=True):
            yield array if self._tensors.range_of(name) else _rounded(array)


def rounded(tensors: Tensors) -> Tensors:
    """`tensors`, with those in bfloat16 that are made of packed ones; what they stand for is rounded once."""
    return Rounded(tensors) if isinstance(tensors, Unpacked | Gguf) else tensors


def _rounded(array: mx.array) -> mx.array:
    """Numbers as bfloat16, where they are, if they are float32 one after the other; nobody else may have them."""
    mx.eval(array)
    values = np.array(array, copy=False)
    if array.dtype != mx.float32 or not values.flags.c_contiguous:
        return array.astype(mx.bfloat16, stream=READER)
    flat = values.reshape(-1)
    bits = flat.view(np.uint16)
    with mx.stream(READER):
        for start in range(0, flat.size, _STEP):
            piece = mx.array(flat[start : start + _STEP]).astype(mx.bfloat16)
            bits[start : start + piece.size] = np.asarray(piece.view(mx.uint16))
        return array.reshape(-1).view(mx.bfloat16)[: flat.size].reshape(array.shape)
