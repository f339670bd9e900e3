"""How our tensors are made from those of the source."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux2_mlx.copying import Copied, Range
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import READER, TensorInfo, Tensors, evaluated

Shape = tuple[int, ...]
_Ranges = tuple[Range, ...]


@dataclass(frozen=True)
class Rule:
    """Names in the source, what is done with their arrays, and the shape each must have given ours.

    `moved` does the same with the places of their bytes, where these become ours as they are.
    """

    sources: tuple[str, ...]
    apply: Callable[..., mx.array]
    source_shape: Callable[[Shape], Shape]
    moved: Callable[[_Ranges], _Ranges] | None = None


def copy(source: str) -> Rule:
    return Rule((source,), lambda x: x, lambda shape: shape, _unmoved)


def _unmoved(ranges: _Ranges) -> _Ranges:
    return ranges


def join_rows(*sources: str) -> Rule:
    """Stack projections that the source keeps apart, such as q, k and v."""
    count = len(sources)
    return Rule(
        sources, lambda *parts: mx.concatenate(list(parts)), lambda shape: (shape[0] // count, *shape[1:]), _unmoved
    )


def swap_halves(source: str) -> Rule:
    """Exchange the upper and the lower half of the rows: [scale; shift] to [shift; scale]."""
    return Rule((source,), _halves_swapped, lambda shape: shape, lambda ranges: ranges[0].halves[::-1])


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


def moved(first: Rule, then: Rule) -> Callable[[_Ranges], _Ranges] | None:
    """How two rules one after the other move bytes, if both leave them as they are."""
    before, after = first.moved, then.moved
    return None if before is None or after is None else lambda ranges: after(before(ranges))


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
            if not is_finite(array):
                raise CheckpointError(self._complaint(name))
            yield array


def is_finite(array: mx.array) -> bool:
    """Whether all numbers are finite."""
    if array.dtype != mx.bfloat16 or not array.size:
        return bool(mx.isfinite(array).all().item())
    return _are_finite(np.asarray(array.view(mx.uint16, stream=READER)))


def _are_finite(bits: np.ndarray) -> bool:
    """Whether all numbers in bfloat16 of these `bits` are finite. Infinity and what is no number lie above all others
    of their sign, which is by far the fastest to tell."""
    return bool(bits.max() < 0xFF80 and bits.view(np.int16).max() < 0x7F80)


def copied(
    names: Iterable[str],
    rules: Mapping[str, Rule],
    place: Callable[[str], Range | None],
    complaint: Callable[[str], str],
) -> dict[str, Copied]:
    """Those of our tensors whose bytes are some of the source's as they are, so that nothing needs to be computed.

    Args:
        names: of tensors that are bfloat16 in the source too.
        rules: how each is made.
        place: where the bytes of a tensor of the source are, or None.
        complaint: what the CheckpointError says if one that is read is not finite, given its name.
    """
    found = {}
    for name in names:
        rule = rules[name]
        places = [place(source) for source in rule.sources]
        ranges = tuple(one for one in places if one is not None)
        if rule.moved and len(ranges) == len(places):
            found[name] = Copied(rule.moved(ranges), partial(_check, name, complaint))
    return found


def _check(name: str, complaint: Callable[[str], str], piece: memoryview) -> None:
    if not _are_finite(np.frombuffer(piece, np.uint16)):
        raise CheckpointError(complaint(name))
