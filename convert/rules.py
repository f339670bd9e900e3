"""How our tensors are made from those of the source."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import READER, TensorInfo, Tensors, evaluated

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """Names in the source, what is done with their arrays, and the shape each must have given ours."""

    sources: tuple[str, ...]
    apply: Callable[..., mx.array]
    source_shape: Callable[[Shape], Shape]


def copy(source: str) -> Rule:
    return Rule((source,), lambda x: x, lambda shape: shape)


def join_rows(*sources: str) -> Rule:
    """Stack projections that the source keeps apart, such as q, k and v."""
    count = len(sources)
    return Rule(sources, lambda *parts: mx.concatenate(list(parts)), lambda shape: (shape[0] // count, *shape[1:]))


def swap_halves(source: str) -> Rule:
    """Exchange the upper and the lower half of the rows: [scale; shift] to [shift; scale]."""
    return Rule((source,), _halves_swapped, lambda shape: shape)


def _halves_swapped(x: mx.array) -> mx.array:
    upper, lower = mx.split(x, 2)
    return mx.concatenate([lower, upper])


def channels_last(source: str) -> Rule:
    """A PyTorch convolution weight, out·in·height·width, to out·height·width·in."""
    return Rule((source,), lambda x: x.transpose(0, 2, 3, 1), lambda shape: (shape[0], shape[3], shape[1], shape[2]))


def same(name: str, shape: Shape) -> Rule:
    """The rule for our tensor `name` where the source has it in our form."""
    return copy(name)


def kernels_last(name: str, shape: Shape) -> Rule:
    """The rule for our tensor `name` where the source has it in our form, but kernels' axes in PyTorch's order."""
    return channels_last(name) if len(shape) == 4 else copy(name)


class Converted:
    """Our tensors, in bfloat16, made by `rules` from those of a source; `infos` says what they are to be."""

    def __init__(self, source: Tensors, rules: Mapping[str, Rule], infos: Mapping[str, TensorInfo]):
        self._source = source
        self._rules = rules
        self.infos = infos

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        rules = [self._rules[name] for name in names]
        theirs = self._source.read(source for rule in rules for source in rule.sources)
        for rule in rules:
            yield rule.apply(*evaluated(islice(theirs, len(rule.sources)))).astype(mx.bfloat16)


class Placed:
    """Tensors of a file or folder `place`, which errors name when they are read."""

    def __init__(self, tensors: Tensors, place: Path):
        self._tensors = tensors
        self._place = place
        self.infos = tensors.infos

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        try:
            yield from self._tensors.read(names)
        except CheckpointError as error:
            if str(self._place) in str(error):
                raise
            raise CheckpointError(f"{self._place}: {error}") from error


class Finite:
    """Tensors that have to be finite. Reading one that is not raises a CheckpointError with the `complaint` of its
    name."""

    def __init__(self, tensors: Tensors, complaint: Callable[[str], str]):
        self._tensors = tensors
        self._complaint = complaint
        self.infos = tensors.infos

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        names = list(names)
        for name, array in zip(names, evaluated(self._tensors.read(names)), strict=True):
            if not _is_finite(array):
                raise CheckpointError(self._complaint(name))
            yield array


def _is_finite(array: mx.array) -> bool:
    """Whether all numbers are finite. Of bfloat16 the bits tell, by far the fastest: infinity and what is no number lie
    above all others of their sign."""
    if array.dtype != mx.bfloat16 or not array.size:
        return bool(mx.isfinite(array).all().item())
    bits = np.asarray(array.view(mx.uint16, stream=READER))
    return bool(bits.max() < 0xFF80 and bits.view(np.int16).max() < 0x7F80)
