"""From stored tensors to a network in memory, and what it takes there."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .weights import CODES, FLOATS, READER, TensorInfo, Tensors, evaluated

_FLOAT_DTYPES = {code: dtype for dtype, code in FLOATS.items()}


@dataclass(frozen=True)
class Footprint:
    """Bytes of a network's weights in memory.

    Attributes:
        rest: what belongs to no block. It always stays in memory.
        blocks: each block, in the order that they run in. The last ones may be read from disk at every pass instead.
        reading: what such a block takes more while it is read, if its weights are cast.
        widened: the most that weights take more at one time while the network computes, in a wider dtype.
        loading: the most that a weight takes more while the network is loaded, as it is cast or quantized.
    """

    rest: int
    blocks: tuple[int, ...] = ()
    reading: int = 0
    widened: int = 0
    loading: int = 0

    def __add__(self, other: "Footprint") -> "Footprint":
        """Two networks in memory together, the other's blocks being run after this one's."""
        pairs = (self.reading, other.reading), (self.widened, other.widened), (self.loading, other.loading)
        return Footprint(self.rest + other.rest, self.blocks + other.blocks, *map(max, pairs))

    @property
    def all(self) -> int:
        return self.rest + sum(self.blocks)

    def held(self, resident: int) -> int:
        """Bytes in memory if so many blocks stay and the others are streamed: one at work, the next one being read."""
        streamed = self.blocks[resident:]
        if not streamed:
            return self.all
        return self.rest + sum(self.blocks[:resident]) + min(2 * max(streamed), sum(streamed)) + self.reading

    def resident(self, budget: int) -> int:
        """How many blocks can stay within `budget` bytes; 0 also if not even the least fits."""
        return max((count for count in range(len(self.blocks) + 1) if self.held(count) <= budget), default=0)


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
