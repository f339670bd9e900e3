"""Factors of a product in balance: powers of two are moved from one to another, so that all stay in float16's range."""

import math
from collections.abc import Callable

import mlx.core as mx

LARGEST = 15  # power of two of an entry near float16's largest number
_FAINT = -6  # that of a row so short that it loses digits


def split(scale: float, least: int = 0) -> tuple[int, float]:
    """The power of two that is to be moved out of a scale, and what stays of that, from 2^`least` to 2."""
    exponent = math.frexp(scale)[1] - 1
    out = exponent - min(max(exponent, least), 0)
    return out, math.ldexp(scale, -out)


def lengths(matrix: mx.array) -> mx.array:
    """The power of two that each row is no longer than; -inf where all entries are 0."""
    most = peaks(matrix)
    return most + mx.ceil(mx.log2(mx.linalg.norm(matrix * power_of_two(-most)[:, None], axis=1)))


def peaks(matrix: mx.array) -> mx.array:
    """The power of two that no entry of each row is above; -inf where all are 0."""
    return mx.ceil(mx.log2(mx.abs(matrix).max(axis=1)))


def moved(size: mx.array, room: mx.array) -> mx.array:
    """The power of two that is to be moved out of what is 2^`size` long, into what has `room` for so much."""
    size = mx.where(mx.isinf(size), 0, size)
    return mx.minimum(mx.where(size < _FAINT, size, mx.maximum(size, 0)), room)


def even(
    up: mx.array,
    down: mx.array,
    sizes: Callable[[mx.array], mx.array] = lengths,
    *,
    exponent: int = 0,
    largest: float = math.inf,
) -> tuple[mx.array, mx.array]:
    """Matrices in float32 whose product is 2^`exponent` times that of `up` and `down`. The `sizes` of the second's rows
    are at most 1, if entries of the first are no larger than 2^`largest` then."""
    up, down = up.astype(mx.float32), down.astype(mx.float32)
    out = moved(sizes(down), largest - exponent - peaks(up.T))
    return up * power_of_two(out + exponent), down * power_of_two(-out)[:, None]


def power_of_two(exponent: mx.array) -> mx.array:
    """Exactly that, from its bits."""
    return mx.left_shift(mx.clip(exponent, -126, 127).astype(mx.int32) + 127, 23).view(mx.float32)
