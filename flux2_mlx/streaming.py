"""Networks whose blocks are read from disk each time they are needed, for models larger than the memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .checkpoint import Component
from .components import COMPONENTS
from .device import is_failure
from .errors import CheckpointError
from .layers import Adapters, adapted
from .loading import InMemory, fill
from .weights import Renamed, Tensors, part

Weights = list[tuple[str, mx.array]]


@dataclass
class Reading:
    """What streaming has read so far: `nbytes`, and those of them that were read `beside` a computation.

    A block that is waited for is counted by the time since its reading began that nobody waited, as bytes.
    """

    nbytes: int = 0
    beside: float = 0.0

    def add(self, nbytes: int, beside: float) -> None:
        self.nbytes += nbytes
        self.beside += beside

    def since(self, before: "Reading") -> "Reading":
        return Reading(self.nbytes - before.nbytes, self.beside - before.beside)

    @property
    def overlap(self) -> float | None:
        """The share of the reading that the computation did not wait for; None if nothing was read."""
        return self.beside / self.nbytes if self.nbytes else None


class Blocks:
    """A list of blocks of which the first are in memory; the others are read while one iterates over them.

    One block at a time is at work and the next one is being read, which after the last one is the first of the list
    that follows, so each must be evaluated before the next is asked for.

    Args:
        name: of the list in its network.
        blocks: as they are built.
        resident: how many of them stay in memory.
        tensors: of the network.
        adapters: what runs beside its layers.
        reading: counts what is read.
    """

    following: "Blocks | None" = None

    def __init__(
        self,
        name: str,
        blocks: list[nn.Module],
        resident: int,
        tensors: Tensors,
        adapters: Adapters | None,
        reading: Reading,
    ):
        self._name = name
        self._tensors = tensors
        self._adapters = adapters
        self._reading = reading
        for number, block in enumerate(blocks[:resident]):
            fill(block, self._part(number))
        self._resident = [self._adapted(number, block) for number, block in enumerate(blocks[:resident])]
        self._blocks = blocks  # each by itself, as layers of one may have other bits than those of the next
        self._count = len(blocks)
        # By their numbers. There may be two: who stops early leaves the next one on its way, for the next time.
        self._coming: dict[int, _Coming] = {}

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[nn.Module]:
        first = len(self._resident)
        self._ask(first)
        yield from self._resident
        for number in range(first, self._count):
            try:
                self._take(number)
                self._ask(number + 1)
                yield self._adapted(number, self._blocks[number])
            finally:
                self._empty(number)

    def _ask(self, number: int) -> None:
        """Have a block read, or the first one of the list that follows, unless that is on its way already."""
        if number < self._count:
            self._asked(number)
        elif self.following is not None:
            self.following._ask(len(self.following._resident))

    def _asked(self, number: int) -> "_Coming":
        """A block on its way."""
        if number not in self._coming:
            self._coming[number] = _Coming(self._read(number))
        return self._coming[number]

    def _read(self, number: int) -> Weights:
        """A block's weights, still unread."""
        tensors = self._part(number)
        with _readable():
            return list(zip(tensors.infos, tensors.read(tensors.infos), strict=True))

    def _part(self, number: int) -> Tensors:
        return part(self._tensors, f"{self._name}.{number}.")

    def _adapted(self, number: int, block: nn.Module) -> nn.Module:
        return adapted(block, self._adapters, f"{self._name}.{number}")

    def _take(self, number: int) -> None:
        """Put a block's weights into its place when all are there."""
        needed = time.perf_counter()
        coming = self._asked(number)
        del self._coming[number]
        self._blocks[number].load_weights(coming.weights)
        with _readable():
            mx.eval(self._blocks[number].parameters())  # or two blocks would be on their way at once
        there = time.perf_counter()
        nbytes = sum(x.nbytes for _, x in coming.weights)
        self._reading.add(nbytes, nbytes * max(0.0, needed - coming.asked) / (there - coming.asked))

    def _empty(self, number: int) -> None:
        """Let go of a block's weights. What it holds in their place is never evaluated, so it takes no memory."""
        block = self._blocks[number]
        weights = dict(tree_flatten(block.parameters()))
        block.load_weights([(name, mx.zeros(x.shape, x.dtype)) for name, x in weights.items()])


class _Coming:
    """The weights of a block on their way into memory, and since when."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self.asked = time.perf_counter()
        # One at a time, so that a tensor and its cast never wait beside all others.
        for _, array in weights:
            mx.async_eval(array)


def load_streamed(component: Component, dtype: mx.Dtype, resident: int, reading: Reading) -> nn.Module:
    """The network with its first `resident` blocks in memory and the others read at every use, which `reading` counts.

    It computes bit for bit what the one in memory does. Its files must stay where they are.
    """
    module = component.build()
    tensors = InMemory(component.tensors, dtype)
    before = None
    for name in COMPONENTS[component.name].streamed:
        blocks = module.pop(name)
        stay = min(resident, len(blocks))
        resident -= stay
        streamed = Blocks(name, blocks, stay, tensors, component.adapters, reading)
        setattr(module, name, streamed)
        if before is not None:
            before.following = streamed
        before = streamed
    fill(module, Renamed(tensors, {name: name for name in dict(tree_flatten(module.parameters()))}))
    return adapted(module, component.adapters)


@contextmanager
def _readable() -> Iterator[None]:
    """Turn what MLX raises for a file that can't be read into a CheckpointError."""
    try:
        yield
    except (RuntimeError, CheckpointError) as error:
        if is_failure(error):  # of work that went on meanwhile
            raise
        raise CheckpointError(
            f"can't read weights any more: {str(error).splitlines()[0]}; put the files back"
        ) from error
