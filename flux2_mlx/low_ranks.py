"""Changes of low rank of one layer, at work together."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .adapters import LowRank
from .device import on_cuda
from .layers import cast

_Form = TypeVar("_Form")
_MOST_PADDED = 256  # ranks that are one product up, with zeros where outputs have none of them


@dataclass(frozen=True, eq=False)
class Change(Generic[_Form]):
    """A change of outputs of a `span` that the adapter of this number makes."""

    adapter: int
    span: slice
    form: _Form


class _Up:
    """One product up, from some of the ranks to outputs, for changes of these and no others.

    Changes of different outputs have zeros for those of each other in its matrix. The greatest scale is that of the
    whole product; where others differ, they are multiplied into the matrix, so that no step pays for them.

    Args:
        changes: what they are.
        start: the first of their ranks among all those of the layer.
    """

    def __init__(self, changes: Sequence[Change[LowRank]], start: int):
        self._changes = changes
        self.span = slice(min(one.span.start for one in changes), max(one.span.stop for one in changes))
        self.ranks = slice(start, start + _ranks(changes))
        self.scale = 1.0
        self.matrix: mx.array  # `[ranks, outputs]`, from `weigh` on
        self._factors: list[float] = []

    @property
    def copied_bytes(self) -> int:
        """Bytes of the matrix besides the factors of the changes; that of one alone is its factor."""
        return self.matrix.nbytes if len(self._changes) > 1 else 0

    def weigh(self, strengths: Sequence[float]) -> None:
        scales = [strengths[one.adapter] * one.form.scale for one in self._changes]
        self.scale = max(scales, key=abs)
        factors = [float(np.float32(scale / self.scale if self.scale else 1)) for scale in scales]
        if factors != self._factors:
            self._factors = factors
            self.matrix = self._weighed().T

    def _weighed(self) -> mx.array:
        """`[outputs, ranks]`."""
        weighed = zip(self._changes, self._factors, strict=True)
        return _joined([self._padded(one.span, _times(one.form.up, factor)) for one, factor in weighed], axis=1)

    def _padded(self, span: slice, block: mx.array) -> mx.array:
        """The block of outputs of a span among all, with zeros in those that are not its own."""
        before, behind = span.start - self.span.start, self.span.stop - span.stop
        return mx.pad(block, [(before, behind), (0, 0)]) if before or behind else block

    def of(self, inner: mx.array) -> mx.array:
        """The product, which is not scaled."""
        return inner[..., self.ranks] @ self.matrix.astype(inner.dtype)

    def added(self, inner: mx.array, y: mx.array) -> mx.array:
        """The product times its scale on top of outputs."""
        return mx.addmm(y, inner[..., self.ranks], self.matrix.astype(y.dtype), self.scale)


class LowRanks:
    """Changes of low rank as one product down, and as few up as are worth it."""

    def __init__(self, changes: Sequence[Change[LowRank]]):
        self._changes = sorted(changes, key=_span)
        self._down = _joined([one.form.down for one in self._changes], axis=0).T
        parts = [self._changes]
        if _ranks(self._changes) > _MOST_PADDED:
            parts = [[*group] for _, group in groupby(self._changes, key=_span)]
        self._ups: list[_Up] = []
        for part in parts:
            self._ups.append(_Up(part, self._ups[-1].ranks.stop if self._ups else 0))
        self._rows: list[list[_Up]] = []

    def copied(self) -> "LowRanks":
        other = copy(self)
        other._ups = [copy(up) for up in self._ups]
        return other

    @property
    def arrays(self) -> list[mx.array]:
        """All that is computed with, as views of the changes' own arrays where there is one alone."""
        return [self._down, *(up.matrix for up in self._ups)]

    @property
    def copied_bytes(self) -> int:
        """Bytes of what is no such view."""
        down = self._down.nbytes if len(self._changes) > 1 else 0
        return down + self.weighed_bytes

    @property
    def weighed_bytes(self) -> int:
        """Bytes of what other scales make anew."""
        return sum(up.copied_bytes for up in self._ups)

    def weigh(self, strengths: Sequence[float]) -> None:
        for up in self._ups:
            up.weigh(strengths)
        self._rows = _side_by_side([up for up in self._ups if up.scale])

    def beside(self, layer: nn.Module, x: mx.array) -> mx.array:
        """What the layer gives for `x`, with what is added to it."""
        flat = x.reshape(-1, x.shape[-1])  # `addmm` would take a batch apart
        return self._beside(layer, flat).reshape(*x.shape[:-1], -1)

    def _beside(self, layer: nn.Module, x: mx.array) -> mx.array:
        """Where one product adds to all outputs the layer's own goes on top of it, so that outputs, of which there are
        far more than ranks, are not read and written once more. Under float16 only their sum is sure to be in the
        range, and GPUs have a kernel of its own for a layer's product with a single token. CUDA's large products take
        longer on top of something: rank 32 makes klein-4b's layers 22 % slower on an H200, and 17 % the other way."""
        ups = [up for row in self._rows for up in row]
        is_worth_it = len(ups) == 1 and len(x) > 1 and x.dtype != mx.float16 and not on_cuda()
        if is_worth_it and _is_plain(layer, x.dtype) and ups[0].span == slice(0, len(layer.weight)):
            return mx.addmm(ups[0].of(x @ self._down.astype(x.dtype)), x, layer.weight.T, beta=ups[0].scale)
        return self.added(layer(x), x)

    def added(self, y: mx.array, x: mx.array) -> mx.array:
        """The output `y` for `x` and what is added to it."""
        if not self._rows:
            return y
        inner = cast(x @ self._down.astype(x.dtype), x.dtype)
        for row in self._rows:
            y = changed(y, [(up.span, partial(up.added, inner)) for up in row])
        return y


def _is_plain(layer: nn.Module, dtype: mx.Dtype) -> bool:
    """Whether the layer is nothing but a product of its weight and an input of this dtype."""
    return isinstance(layer, nn.Linear) and "bias" not in layer and layer.weight.dtype == dtype


def _ranks(changes: Sequence[Change[LowRank]]) -> int:
    return sum(len(one.form.down) for one in changes)


def _times(matrix: mx.array, factor: float) -> mx.array:
    return matrix if factor == 1 else (factor * matrix.astype(mx.float32)).astype(matrix.dtype)


def _span(change: Change[LowRank]) -> tuple[int, int]:
    return change.span.start, change.span.stop


def _side_by_side(ups: Sequence[_Up]) -> list[list[_Up]]:
    """The products in as few lists as may be. No two of a list have outputs in common; they are in the outputs'
    order."""
    lists: list[list[_Up]] = []
    for up in ups:
        free = next((some for some in lists if some[-1].span.stop <= up.span.start), None)
        if free is None:
            lists.append(free := [])
        free.append(up)
    return lists


def _joined(arrays: Sequence[mx.array], axis: int) -> mx.array:
    return mx.concatenate(list(arrays), axis) if len(arrays) > 1 else arrays[0]


def changed(y: mx.array, changes: Sequence[tuple[slice, Callable[[mx.array], mx.array]]]) -> mx.array:
    """`y` with what becomes of some of its outputs, from the first to the last."""
    parts = []
    end = 0
    for span, change in changes:
        parts += [y[..., end : span.start], change(y[..., span])]
        end = span.stop
    parts = [part for part in [*parts, y[..., end:]] if part.shape[-1]]
    return _joined(parts, axis=-1)
