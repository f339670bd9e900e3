"""How one of our tensors is made from tensors of the source."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

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
    return Rule(sources, lambda *parts: mx.concatenate(parts), lambda shape: (shape[0] // count, *shape[1:]))


def swap_halves(source: str) -> Rule:
    """Exchange the upper and the lower half of the rows: [scale; shift] to [shift; scale]."""
    return Rule((source,), lambda x: mx.concatenate(mx.split(x, 2)[::-1]), lambda shape: shape)


def channels_last(source: str) -> Rule:
    """A PyTorch convolution weight, out·in·height·width, to out·height·width·in."""
    return Rule((source,), lambda x: x.transpose(0, 2, 3, 1), lambda shape: (shape[0], shape[3], shape[1], shape[2]))
