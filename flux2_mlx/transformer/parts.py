"""A sequence of tokens in parts, which are worked on one after the other."""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from .execution import Execution


def by_parts(
    x: mx.array, work: Callable[[slice], Any], execution: Execution, stream: int | None = None
) -> Iterator[Any]:
    """What `work` makes of the tokens of `x` `[B, L, D]`, one slice of the sequence after the other. They may be of a
    longer `stream` of so many, which is worked on in several parts then."""
    B, L, _ = x.shape
    size = max(1, execution.part // B)
    for start in range(0, L, size):
        part = work(slice(start, start + size))
        if size < (stream or L):
            execution.settle(part)
        yield part


def in_columns(parts: Iterator[tuple[mx.array, ...]]) -> Iterator[list[mx.array]]:
    """What all `parts` begin with, then what comes second in each, and so on. Only who asks for a column holds it."""
    columns = [list(column) for column in zip(*parts, strict=True)]
    while columns:
        yield columns.pop(0)


def joined(columns: Iterator[list[mx.array]], execution: Execution) -> Iterator[mx.array]:
    """Queries, keys or values of all tokens, of columns of those of parts."""
    # The parts of a column are gone before the next is joined, so that no two columns are in memory twice.
    for column in columns:
        yield joined_column(column, execution)


def joined_column(column: list[mx.array], execution: Execution) -> mx.array:
    """Queries, keys or values `[B, heads, L, head_dim]` of all tokens, of those of parts."""
    if len(column) == 1:
        return column[0]
    whole = mx.concatenate(column, axis=2)
    execution.settle(whole)
    return whole


def side_by_side(parts: Iterator[mx.array]) -> mx.array:
    """The tokens `[B, L, D]` of all parts."""
    arrays = list(parts)
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=1)
