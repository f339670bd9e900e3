"""Adapters at work: side branches of the layers of a network, whose weights stay as they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .adapters import Adapter, BiasDifference, Decomposed, Difference, Hadamard, Kronecker, LowRank, Placed
from .errors import InputError, RangeError
from .layers import cast, dense
from .low_ranks import Change, LowRanks, changed
from .transformer.headroom import output_unit

_Other = Kronecker | Hadamard | Difference | Decomposed | BiasDifference


@dataclass(frozen=True)
class AtWork:
    """An adapter, the `scale` of what it changes, and the first and the last of the `steps` that it works in, counted
    from 1; None: in all. Texts are encoded before the first step, with adapters of all steps."""

    adapter: Adapter
    scale: float = 1.0
    steps: tuple[int, int] | None = None

    def in_step(self, step: int) -> bool:
        return self.steps is None or self.steps[0] <= step <= self.steps[1]

    @property
    def identity(self) -> tuple[Any, ...]:
        """All that its effect depends on, as JSON can hold it."""
        return self.adapter.identity, self.scale, self.steps

    @property
    def title(self) -> str:
        """The adapter as a user knows it."""
        return self.adapter.source or self.adapter.name


def check_steps(adapters: Sequence[AtWork], steps: int) -> None:
    """InputError if an adapter of the transformer would work in none of a run's `steps`."""
    for one in adapters:
        if one.steps is not None and one.steps[0] > steps and one.adapter.layers.get("transformer"):
            first, last = one.steps
            raise InputError(
                f"steps {first}-{last} of {one.title} begin after the run's {steps} steps; give earlier ones"
            )


@contextmanager
def range_errors(adapters: Sequence[AtWork]) -> Iterator[None]:
    """Have a RangeError name the adapters that were at work: they, not damaged weights, are its likely reason."""
    try:
        yield
    except RangeError as error:
        titles = ", ".join(dict.fromkeys(one.title for one in adapters if one.scale))
        if not titles:
            raise
        what, _, way = str(error).partition("; ")
        other = f", or {way}" if way.startswith("use ") else ""  # of float16, which may overflow without them
        raise RangeError(f"{what} with the adapters {titles} at work; give a smaller scale{other}") from error


class Branches:
    """The changes that adapters make to one network, each times its scale; a scale of 0 changes nothing, DoRA's lengths
    of rows included. Build it with `of`.

    Args:
        network: its name.
        adapters: the adapters at work.
    """

    def __init__(self, network: str, adapters: Sequence[AtWork]):
        layers = [one.adapter.layers.get(network, {}) for one in adapters]
        names = dict.fromkeys(name for some in layers for name in some)
        self._branches = {name: _Branch(name, [some.get(name, ()) for some in layers]) for name in names}
        self._adapters = adapters
        self._scales = [one.scale for one in adapters]
        self._weigh(self._scales)

    @classmethod
    def of(cls, network: str, adapters: Sequence[AtWork]) -> "Branches | None":
        """The branches of the network; None if no adapter changes it."""
        changing = [one for one in adapters if one.adapter.layers.get(network)]
        return cls(network, changing) if changing else None

    @property
    def has_steps(self) -> bool:
        return any(one.steps is not None for one in self._adapters)

    def at(self, step: int) -> bool:
        scales = [one.scale if one.in_step(step) else 0.0 for one in self._adapters]
        changed = scales != self._scales
        self._scales = scales
        if changed:
            self._weigh(scales)
            mx.eval(self.arrays)  # what is made in this thread, another one may go on with
        return changed

    def _weigh(self, scales: Sequence[float]) -> None:
        for branch in self._branches.values():
            branch.weigh(scales)

    @property
    def identity(self) -> str:
        return repr([one.identity for one in self._adapters])

    def scaled(self, factor: float) -> "Branches":
        """These branches with all scales times a factor. The arrays are shared."""
        changed = copy(self)
        changed._branches = {name: branch.copied() for name, branch in self._branches.items()}
        changed._adapters = [replace(one, scale=factor * one.scale) for one in self._adapters]
        changed._scales = [one.scale for one in changed._adapters]
        changed._weigh(changed._scales)
        return changed

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, those of the adapters themselves included; some are views of others."""
        return [array for branch in self._branches.values() for array in branch.arrays]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, of which those of the adapters count once, and of those that a run with steps makes."""
        own = {id(array): array.nbytes for branch in self._branches.values() for array in branch.own}
        copied = sum(branch.copied_bytes for branch in self._branches.values())
        return sum(own.values()) + copied + self.has_steps * sum(x.weighed_bytes for x in self._branches.values())

    def beside(self, name: str, layer: nn.Module) -> nn.Module:
        """The layer of this name with its branch; itself if no adapter changes it."""
        if name not in self._branches:
            return layer
        self._branches[name].measure(layer, [one.scale for one in self._adapters])
        return _Branched(layer, self._branches[name])


class _Branched(nn.Module):
    """A layer with a branch."""

    def __init__(self, layer: nn.Module, branch: "_Branch"):
        super().__init__()
        self.layer = layer
        self._branch = branch

    def __call__(self, x: mx.array) -> mx.array:
        return self._branch(x, self.layer)


class _Branch:
    """All changes of one layer: those of low rank together, and each of the others by itself."""

    def __init__(self, name: str, adapters: Sequence[Sequence[Placed]]):
        self._name = name
        placed = [(number, x.span, x.change) for number, some in enumerate(adapters) for x in some]
        low = [Change(number, span, form) for number, span, form in placed if isinstance(form, LowRank)]
        self._low = LowRanks(low) if low else None
        self._others = [Change(number, span, form) for number, span, form in placed if not isinstance(form, LowRank)]
        self._changes: list[Change[Any]] = [*low, *self._others]
        self._strengths: Sequence[float] = ()
        self._working: list[Change[_Other]] = []
        self._ratios: dict[Change[_Other], tuple[float, mx.array]] = {}  # and the strengths that they are for

    def copied(self) -> "_Branch":
        """A copy that shares the arrays, to be weighed otherwise."""
        other = copy(self)
        other._ratios = {**self._ratios}
        other._low = self._low and self._low.copied()
        return other

    def weigh(self, strengths: Sequence[float]) -> None:
        self._strengths = strengths
        self._working = [other for other in self._others if strengths[other.adapter]]
        if self._low is not None:
            self._low.weigh(strengths)

    @property
    def own(self) -> list[mx.array]:
        """The arrays of the changes themselves."""
        return [array for change in self._changes for array in change.form.arrays]

    @property
    def arrays(self) -> list[mx.array]:
        """All that are computed with, or kept to be."""
        return [*self.own, *(self._low.arrays if self._low is not None else ())]

    @property
    def copied_bytes(self) -> int:
        """Bytes of the arrays besides those of the changes themselves."""
        return 0 if self._low is None else self._low.copied_bytes

    @property
    def weighed_bytes(self) -> int:
        """Bytes of those of them that other scales make anew."""
        return 0 if self._low is None else self._low.weighed_bytes

    def measure(self, layer: nn.Module, strengths: Sequence[float]) -> None:
        """Work out what needs the weight of the layer, the first time that it is in memory, for steps in which all
        adapters work."""
        for other in self._others:
            strength = strengths[other.adapter]
            if isinstance(other.form, Decomposed) and strength and self._ratios.get(other, (0.0,))[0] != strength:
                self._ratios[other] = strength, other.form.ratio(partial(_weight, layer, other.span), strength)

    def __call__(self, x: mx.array, layer: nn.Module) -> mx.array:
        if self._low is not None and not self._working:
            return self._low.beside(layer, x)
        own = y = layer(x)
        if self._low is not None:
            y = self._low.added(y, x)
        for other in self._working:
            addition = cast(self._addition(other, x, own, layer), x.dtype)
            y = changed(y, [(other.span, partial(mx.add, addition))])
        return y

    def _addition(self, other: Change[_Other], x: mx.array, own: mx.array, layer: nn.Module) -> mx.array:
        """What a change adds to the outputs of its span; `own` is the output of the layer without any change."""
        form = other.form
        span = other.span
        strength = self._strengths[other.adapter]
        if not isinstance(form, Decomposed):
            addition = replace(form, scale=strength * form.scale).delta(x)
            return addition / output_unit(self._name, x.dtype) if isinstance(form, BiasDifference) else addition
        ratio = self._ratios[other][1].flatten()
        if form.by_row:
            more = (ratio - 1).astype(x.dtype) * _without_bias(own, layer)[..., span]
            return more + (strength * ratio).astype(x.dtype) * form.change.delta(x)
        longer, whole = (cast(by * x.astype(mx.float32), x.dtype) for by in (ratio - 1, strength * ratio))
        return _without_bias(layer(longer), layer)[..., span] + form.change.delta(whole)


def _without_bias(y: mx.array, layer: nn.Module) -> mx.array:
    return y - layer.bias if "bias" in layer else y


def _weight(layer: nn.Module, span: slice, rows: slice) -> mx.array:
    """The `rows` of a `span` of a layer's weight, counted within it, in float32."""
    chosen = slice(span.start + rows.start, min(span.stop, span.start + rows.stop))
    if isinstance(layer, nn.QuantizedLinear):
        return dense(layer, mx.float32, chosen)
    return layer.weight[chosen].astype(mx.float32)
