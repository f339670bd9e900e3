"""From stored tensors to a network in memory."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .weights import CODES, FLOATS, READER, TensorInfo, Tensors, evaluated

_FLOAT_DTYPES = {code: dtype for dtype, code in FLOATS.items()}


def module_tensors(module: nn.Module) -> dict[str, TensorInfo]:
    """The tensors that `module` loads, as it holds them; none is evaluated."""
    arrays = dict(tree_flatten(module.parameters()))
    return {name: TensorInfo(CODES[array.dtype], array.shape) for name, array in arrays.items()}


def memory_dtype(name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.Dtype:
    """What a weight that is not packed is kept in while activations are in `dtype`.

    Under float32 matrices stay in bfloat16, as they are stored, and are widened where they are used, which changes no
    result. Rows that are looked up in a packed embedding would keep the dtype of its scales, so these are widened.
    """
    looked_up = name in ("embed_tokens.scales", "embed_tokens.biases")
    return mx.bfloat16 if dtype == mx.float32 and len(shape) == 2 and not looked_up else dtype


def in_memory(infos: Mapping[str, TensorInfo], dtype: mx.Dtype) -> dict[str, TensorInfo]:
    """What stored tensors are in memory while activations are in `dtype`."""
    return {
        name: replace(x, dtype=FLOATS[memory_dtype(name, x.shape, dtype)]) if x.dtype in FLOATS.values() else x
        for name, x in infos.items()
    }


class InMemory:
    """Stored tensors as they are kept in memory while activations are in `dtype`."""

    def __init__(self, tensors: Tensors, dtype: mx.Dtype):
        self._tensors = tensors
        self._dtype = dtype

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        return in_memory(self._tensors.infos, self._dtype)

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        names = list(names)
        dtypes = [_FLOAT_DTYPES.get(self.infos[name].dtype) for name in names]
        return map(cast, self._tensors.read(names), dtypes)


def cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """An array, still unread, in a dtype if it is to have another. It is cast on the stream that files are read on."""
    return array if dtype is None else array.astype(dtype, stream=READER)


def fill(module: nn.Module, tensors: Tensors) -> None:
    """Load `tensors`, which are all that `module` has, one after the other."""
    names = list(tensors.infos)
    module.load_weights(list(zip(names, evaluated(tensors.read(names)), strict=True)))
