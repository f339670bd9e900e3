"""From stored tensors to a network in memory."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .weights import CODES, FLOATS, READER, TensorInfo, Tensors, evaluated


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


def in_memory(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    """A stored tensor as it is kept in memory, still unread. It is cast on the stream that files are read on."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array.astype(memory_dtype(name, array.shape, dtype), stream=READER)


def in_memory_info(name: str, tensor: TensorInfo, dtype: mx.Dtype) -> TensorInfo:
    """What a stored tensor is in memory while activations are in `dtype`."""
    if tensor.dtype not in FLOATS.values():
        return tensor
    return replace(tensor, dtype=FLOATS[memory_dtype(name, tensor.shape, dtype)])


def tensor_bytes(name: str, tensor: TensorInfo, dtype: mx.Dtype) -> int:
    """Bytes of a stored tensor in memory while activations are in `dtype`."""
    return in_memory_info(name, tensor, dtype).nbytes


class InMemory:
    """Stored tensors as they are kept in memory while activations are in `dtype`."""

    def __init__(self, tensors: Tensors, dtype: mx.Dtype):
        self._tensors = tensors
        self._dtype = dtype

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: in_memory_info(name, x, self._dtype) for name, x in self._tensors.infos.items()}

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        names = list(names)
        arrays = self._tensors.read(names)
        return (in_memory(name, array, self._dtype) for name, array in zip(names, arrays, strict=True))


def fill(module: nn.Module, tensors: Tensors) -> None:
    """Load `tensors`, which are all that `module` has, one after the other."""
    names = list(tensors.infos)
    module.load_weights(list(zip(names, evaluated(tensors.read(names)), strict=True)))
