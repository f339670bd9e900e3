"""Adapters (LoRA and its kin): what is added to linear layers, beside their weights.

A change ΔW of a layer's weight `[out, in]` is kept in factors, in the form that it was trained in. All forms have the
same methods: `delta(x)`, what the layer's output changes by, `[..., in]` to `[..., out]` in the dtype of `x`;
`weight(rows)`, those rows of ΔW in float32; `shape`, `[out, in]`; and `nbytes`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import mlx.core as mx

from .balance import LARGEST, even, lengths, moved, peaks, power_of_two, split
from .layers import cast

Factor = mx.array | tuple[mx.array, mx.array]  # a matrix, or two that it is the product of
ALL = slice(None)
MOST_SCALE = 1000.0  # times what an adapter changes
# The most weights that are made of factors at one time.
_SLICE = 4 * 1024 * 1024
_LEAST = -8  # power of two of a scale that stays one, as `up` may be small
_SHORTEST = 1e-12  # row of a weight, which has no direction


@dataclass(frozen=True, eq=False)
class _Factors:
    """A change of a layer in factors; the fields of all forms are arrays, pairs of arrays, and `scale`."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def outputs(self) -> int:
        return self.shape[0]  # type: ignore[attr-defined]  # of all but a bias, which has its own

    def cast(self, dtype: mx.Dtype) -> Self:
        """This change with arrays of `dtype`."""
        told = self._balanced() if dtype == mx.float16 else self
        return replace(told, **{field.name: _cast(getattr(told, field.name), dtype) for field in fields(self)})

    def _balanced(self) -> Self:
        """The same change in float32, with powers of two moved from one factor, or the scale, into another where the
        inner values, or a factor itself, might leave the range of float16."""
        return self

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, those in pairs and those of a change within included."""
        return _arrays(self)


@dataclass(frozen=True, eq=False)
class LowRank(_Factors):
    """ΔW = scale · up @ down, with `down` `[rank, in]` and `up` `[out, rank]`."""

    down: mx.array
    up: mx.array
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def delta(self, x: mx.array) -> mx.array:
        return _project(_times(_project(x, self.down), self.scale), self.up)

    def weight(self, rows: slice = ALL) -> mx.array:
        return self.scale * _float32(self.up[rows]) @ _float32(self.down)

    def _balanced(self) -> Self:
        exponent, scale = split(self.scale, _LEAST)
        up, down = even(self.up, self.down, exponent=exponent, largest=LARGEST)
        return replace(self, down=down, up=up, scale=scale)


@dataclass(frozen=True, eq=False)
class Kronecker(_Factors):
    """LoKr: ΔW = scale · kron(w1, w2), each a matrix or a pair `([m, rank], [rank, n])`."""

    w1: Factor
    w2: Factor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), (c, d) = _shape(self.w1), _shape(self.w2)
        return a * c, b * d

    def delta(self, x: mx.array) -> mx.array:
        (_, b), (_, d) = _shape(self.w1), _shape(self.w2)
        w1 = (self.scale * _dense(self.w1)).astype(x.dtype)
        inner = _through(x.reshape(*x.shape[:-1], b, d), self.w2)
        return (w1 @ inner).flatten(-2)

    def weight(self, rows: slice = ALL) -> mx.array:
        w1, w2 = _dense(self.w1), _dense(self.w2)
        outer, inner = mx.divmod(mx.arange(self.shape[0])[rows], len(w2))
        return self.scale * (w1[outer, :, None] * w2[inner, None]).flatten(1)

    def _balanced(self) -> Self:
        exponent, scale = split(self.scale)
        w1, w2 = _evened(self.w1), _evened(self.w2)
        out = moved(lengths(_head(w2)).max(), LARGEST - exponent - peaks(_head(w1)).max())
        w1, w2 = _multiplied(w1, power_of_two(out + exponent)), _multiplied(w2, power_of_two(-out))
        return replace(self, w1=w1, w2=w2, scale=scale)


@dataclass(frozen=True, eq=False)
class Hadamard(_Factors):
    """LoHa: ΔW = scale · (w1a @ w1b) ∘ (w2a @ w2b), of shapes `[out, rank]` and `[rank, in]`."""

    w1a: mx.array
    w1b: mx.array
    w2a: mx.array
    w2b: mx.array
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1a.shape[0], self.w1b.shape[1]

    def delta(self, x: mx.array) -> mx.array:
        outputs, inputs = self.shape
        rank = len(self.w1b) * len(self.w2b)
        if rank * (outputs + inputs) < outputs * inputs:
            return self._product(x.dtype).delta(x)
        rows = max(1, _SLICE // inputs)
        return mx.concatenate([self._rows(x, slice(row, row + rows)) for row in range(0, outputs, rows)], axis=-1)

    def _product(self, dtype: mx.Dtype) -> LowRank:
        """This change as one product, whose rank is the product of both ranks."""
        down = self.w1b.astype(dtype)[:, None] * self.w2b.astype(dtype)[None]
        up = self.w1a.astype(dtype)[:, :, None] * self.w2a.astype(dtype)[:, None]
        return LowRank(down.flatten(0, 1), up.flatten(1), self.scale)

    def _rows(self, x: mx.array, rows: slice) -> mx.array:
        y = x @ self.weight(rows).astype(x.dtype).T
        mx.eval(y)  # or all rows would be made at one time
        return y

    def weight(self, rows: slice = ALL) -> mx.array:
        return self.scale * _dense((self.w1a[rows], self.w1b)) * _dense((self.w2a[rows], self.w2b))

    def _balanced(self) -> Self:
        exponent, scale = split(self.scale)
        w1a, w1b = even(self.w1a, self.w1b)
        w2a, w2b = even(self.w2a, self.w2b, peaks)  # or products of both would be faint
        out = moved(peaks(w2a).max(), LARGEST - exponent - peaks(w1a).max())
        w1a, w2a = w1a * power_of_two(out + exponent), w2a * power_of_two(-out)
        return replace(self, w1a=w1a, w1b=w1b, w2a=w2a, w2b=w2b, scale=scale)


@dataclass(frozen=True, eq=False)
class Difference(_Factors):
    """ΔW = scale · difference, `[out, in]`."""

    difference: mx.array
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.difference.shape
        return outputs, inputs

    def delta(self, x: mx.array) -> mx.array:
        return _project(_times(x, self.scale), self.difference)

    def weight(self, rows: slice = ALL) -> mx.array:
        return self.scale * _float32(self.difference[rows])


Delta = LowRank | Kronecker | Hadamard | Difference


@dataclass(frozen=True, eq=False)
class Decomposed(_Factors):
    """DoRA: W + ΔW with each row, or column, made as long as `magnitude` says: `[out, 1]`, or `[1, in]`.

    What it is multiplied by at work, its strength, is of ΔW alone, as in PEFT: lengths stay what the magnitude says.
    """

    change: Delta
    magnitude: mx.array

    @property
    def shape(self) -> tuple[int, int]:
        return self.change.shape

    def cast(self, dtype: mx.Dtype) -> Self:
        """This change with its factors in `dtype`. The magnitude stays as it is: rounding it would be an error of a
        whole row, in proportion to the weight."""
        return replace(self, change=self.change.cast(dtype))

    @property
    def by_row(self) -> bool:
        return self.magnitude.shape[1] == 1

    def weight(self, base: mx.array, strength: float = 1.0) -> mx.array:
        """What is added to the layer's own float32 weight `[out, in]`."""
        return self.ratio(lambda rows: base[rows], strength) * (base + strength * self.change.weight()) - base

    def ratio(self, base: Callable[[slice], mx.array], strength: float = 1.0) -> mx.array:
        """What W + strength · ΔW is multiplied by, float32 of the shape of `magnitude`, evaluated. `base` gives rows of
        W."""
        outputs, inputs = self.shape
        step = max(1, _SLICE // inputs)
        squares = []
        for row in range(0, outputs, step):
            rows = slice(row, row + step)
            changed = mx.square(base(rows) + strength * self.change.weight(rows))
            squares.append(changed.sum(axis=int(self.by_row), keepdims=True))
            mx.eval(squares[-1])  # or all rows would be made at one time
        lengths = mx.sqrt(mx.concatenate(squares) if self.by_row else sum(squares[1:], squares[0]))
        ratio = _float32(self.magnitude) / mx.maximum(lengths, _SHORTEST)
        mx.eval(ratio)
        return ratio


@dataclass(frozen=True, eq=False)
class BiasDifference(_Factors):
    """A change of the bias, scale · `difference` `[out]`, of layers without one as well."""

    difference: mx.array
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        return len(self.difference)

    def cast(self, dtype: mx.Dtype) -> Self:
        """This change itself: it is small, and is rounded when its scale is in it."""
        return self

    def delta(self, x: mx.array) -> mx.array:
        """`[out]`, whatever `x` is."""
        return (self.scale * _float32(self.difference)).astype(x.dtype)


@dataclass(frozen=True, eq=False)
class Placed:
    """A change of the `rows` of a layer's weight; None: of all."""

    change: Delta | Decomposed | BiasDifference
    rows: slice | None = None

    @property
    def span(self) -> slice:
        """The rows, from the first to behind the last."""
        start = 0 if self.rows is None else self.rows.start or 0
        return slice(start, start + self.change.outputs)


Layers = Mapping[str, tuple[Placed, ...]]


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read from a file.

    Attributes:
        name: what it is called in `set_adapters`.
        layers: what it changes, by network (`transformer`, `text_encoder`) and our name of the layer
            (`double_blocks.3.img_attn.qkv`).
        source: as it was asked for.
        sha256: of its file.
        origin: the repo and file of the Hub that it comes from, as `owner/name:file`; None: none.
        config: a short hash of the strength that a config beside the file gives it; None: the file alone tells it.
    """

    name: str
    layers: Mapping[str, Layers]
    source: str = ""
    sha256: str = ""
    origin: str | None = None
    config: str | None = None

    @property
    def identity(self) -> str:
        """What tells all that it changes from what others do."""
        return self.sha256 if self.config is None else f"{self.sha256} {self.config}"

    def cast(self, dtypes: Callable[[str], mx.Dtype]) -> "Adapter":
        """This adapter in the dtype that `dtypes` gives for the name of each network."""
        return replace(self, layers={name: _cast_layers(layers, dtypes(name)) for name, layers in self.layers.items()})


def tucker(core: mx.array, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """The pair of matrices for LyCORIS' `core` `[r, r]` between `a` `[r, out]` and `b` `[r, in]`: aᵀ @ core @ b."""
    return a.T, (_float32(core) @ _float32(b)).astype(b.dtype)


def folded(weight: mx.array, changes: Sequence[Placed], strength: float = 1.0) -> mx.array:
    """A layer's `weight` `[out, in]` with all `changes` but those of a bias, in float32."""
    base = _float32(weight)
    whole = mx.array(base)
    for placed in changes:
        rows = placed.span
        change = placed.change
        if isinstance(change, Decomposed) and strength:
            whole[rows] += change.weight(base[rows], strength)
        elif not isinstance(change, Decomposed | BiasDifference):
            whole[rows] += strength * change.weight()
    return whole


def _cast_layers(layers: Layers, dtype: mx.Dtype) -> Layers:
    return {
        name: tuple(replace(placed, change=placed.change.cast(dtype)) for placed in changes)
        for name, changes in layers.items()
    }


def _cast(value: Any, dtype: mx.Dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    if isinstance(value, _Factors):
        return value.cast(dtype)
    return value.astype(dtype) if isinstance(value, mx.array) else value


def _arrays(value: Any) -> list[mx.array]:
    if isinstance(value, mx.array):
        return [value]
    if isinstance(value, _Factors):
        value = tuple(getattr(value, field.name) for field in fields(value))
    return [array for part in value for array in _arrays(part)] if isinstance(value, tuple) else []


def _float32(x: mx.array) -> mx.array:
    return x.astype(mx.float32)


def _evened(factor: Factor) -> Factor:
    """The same in float32, with a pair in balance."""
    return _float32(factor) if isinstance(factor, mx.array) else even(*factor)


def _head(factor: Factor) -> mx.array:
    return factor if isinstance(factor, mx.array) else factor[0]


def _multiplied(factor: Factor, number: mx.array) -> Factor:
    return factor * number if isinstance(factor, mx.array) else (factor[0] * number, factor[1])


def _shape(factor: Factor) -> tuple[int, int]:
    return (factor.shape[0], factor.shape[1]) if isinstance(factor, mx.array) else (len(factor[0]), factor[1].shape[1])


def _dense(factor: Factor) -> mx.array:
    """The matrix, in float32."""
    return _float32(factor) if isinstance(factor, mx.array) else _float32(factor[0]) @ _float32(factor[1])


def _through(x: mx.array, factor: Factor) -> mx.array:
    """`x` times the matrix transposed."""
    if isinstance(factor, mx.array):
        return _project(x, factor)
    return _project(_project(x, factor[1]), factor[0])


def _project(x: mx.array, weight: mx.array) -> mx.array:
    """`x` times the matrix transposed. What is beyond float16 becomes its largest number, as infinities would add up to
    NaN."""
    return cast(x @ weight.astype(x.dtype).T, x.dtype)


def _times(x: mx.array, scale: float) -> mx.array:
    """`x` times a number that is not rounded before."""
    return x if scale == 1 else cast(_float32(x) * scale, x.dtype)
