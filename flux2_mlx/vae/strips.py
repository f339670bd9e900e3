"""Activations in strips of rows, so that only what is kept between two passes has the size of the image.

A layer takes and returns `Rows`, whose values are computed when they are read. `stored` computes such rows strip by
strip from top to bottom and frees its input as it goes.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

# Rows beside a strip are computed twice, so small strips cost time. This is 32 rows of the widest layer of the
# released decoder at a width of 1024 in bfloat16.
STRIP_BYTES = 256 * 1024 * 1024


class Rows:
    """The rows of an activation `[B, H, W, C]`; `strip_bytes` is what computing one strip of them may allocate."""

    def __init__(self, shape: tuple[int, ...], dtype: mx.Dtype, strip_bytes: int):
        self.shape, self.dtype, self.strip_bytes = tuple(shape), dtype, strip_bytes
        B, _, W, C = shape
        self.row_values = B * W * C

    def read(self, start: int, stop: int) -> mx.array:
        raise NotImplementedError

    def drop(self, stop: int) -> None:
        """Free what no row from `stop` on needs."""
        raise NotImplementedError

    def temporaries(self, rows: int) -> int:
        """Bytes that reading `rows` rows allocates at most, the result included."""
        raise NotImplementedError


class Stored(Rows):
    """Rows in memory, as strips from top to bottom."""

    def __init__(self, strips: list[mx.array], strip_bytes: int):
        B, _, W, C = strips[0].shape
        super().__init__((B, sum(strip.shape[1] for strip in strips), W, C), strips[0].dtype, strip_bytes)
        self._strips, self._top, self._joins = deque(strips), 0, len(strips) > 1

    def read(self, start: int, stop: int) -> mx.array:
        parts, top = [], self._top
        for strip in self._strips:
            bottom = top + strip.shape[1]
            if top < stop and start < bottom:
                parts.append(strip[:, max(start - top, 0) : stop - top])
            top = bottom
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)

    def whole(self) -> mx.array:
        return self.read(0, self.shape[1])

    def drop(self, stop: int) -> None:
        while self._strips and self._top + self._strips[0].shape[1] <= stop:
            self._top += self._strips.popleft().shape[1]

    def temporaries(self, rows: int) -> int:
        return self._joins * rows * self.row_values * self.dtype.size


class Mapped(Rows):
    """A function of each pixel that computes in float32; `copies` counts its arrays of the input's size."""

    def __init__(self, source: Rows, function: Callable[[mx.array], mx.array], copies: int = 3):
        super().__init__(source.shape, source.dtype, source.strip_bytes)
        self._source, self._function, self._copies = source, function, copies

    def read(self, start: int, stop: int) -> mx.array:
        return self._function(self._source.read(start, stop))

    def drop(self, stop: int) -> None:
        self._source.drop(stop)

    def temporaries(self, rows: int) -> int:
        return self._source.temporaries(rows) + self._copies * rows * self.row_values * mx.float32.size


class Moments(Mapped):
    """Mean and variance over each row, `[B, H, 2, C]` in float32."""

    def __init__(self, source: Rows):
        super().__init__(source, _moments)
        B, H, _, C = source.shape
        self.shape, self.dtype = (B, H, 2, C), mx.float32


class Doubled(Rows):
    """Each pixel of the source as 2×2 pixels."""

    def __init__(self, source: Rows):
        B, H, W, C = source.shape
        super().__init__((B, 2 * H, 2 * W, C), source.dtype, source.strip_bytes)
        self._source = source

    def read(self, start: int, stop: int) -> mx.array:
        first = start // 2
        x = mx.repeat(mx.repeat(self._source.read(first, -(-stop // 2)), 2, axis=1), 2, axis=2)
        return x[:, start - 2 * first : stop - 2 * first]

    def drop(self, stop: int) -> None:
        self._source.drop(stop // 2)

    def temporaries(self, rows: int) -> int:
        read = rows // 2 + 1
        return self._source.temporaries(read) + 3 * read * self.row_values * self.dtype.size


class Convolved(Rows):
    """A convolution that divides both sides by its stride; zeros surround the image, never a strip."""

    def __init__(self, source: Rows, conv: nn.Conv2d):
        B, H, W, _ = source.shape
        stride = conv.stride[0]
        super().__init__((B, H // stride, W // stride, conv.weight.shape[0]), source.dtype, source.strip_bytes)
        self._source, self._conv = source, conv

    def _window(self, start: int, stop: int, axis: int) -> tuple[int, int, int, int]:
        """First and last + 1 position that outputs `start` to `stop` read, and the zeros before and after them."""
        conv, size = self._conv, self._source.shape[axis]
        first = start * conv.stride[0] - conv.padding[0]
        last = (stop - 1) * conv.stride[0] + conv.weight.shape[1] - conv.padding[0]
        return max(first, 0), min(last, size), max(-first, 0), max(last - size, 0)

    def read(self, start: int, stop: int) -> mx.array:
        first, last, top, bottom = self._window(start, stop, 1)
        _, _, left, right = self._window(0, self.shape[2], 2)
        # What both sides share needs no copy.
        rows, columns = min(top, bottom), min(left, right)
        x = mx.pad(
            self._source.read(first, last), [(0, 0), (top - rows, bottom - rows), (left - columns, right - columns), (0, 0)]
        )
        return mx.conv2d(x, self._conv.weight, self._conv.stride, (rows, columns)) + self._conv.bias

    def drop(self, stop: int) -> None:
        self._source.drop(self._source.shape[1] if stop == self.shape[1] else self._window(stop, stop + 1, 1)[0])

    def temporaries(self, rows: int) -> int:
        kernel, stride = self._conv.weight.shape[1], self._conv.stride[0]
        window = rows * stride + kernel - stride
        # A backend may copy the window to pad it, and copy every pixel to each place where the kernel meets it.
        unfolded = window + kernel * kernel * rows / stride
        values = unfolded * self._source.row_values + rows * self.row_values
        return self._source.temporaries(window) + int(values) * self.dtype.size


class Sum(Rows):
    def __init__(self, first: Rows, second: Rows):
        super().__init__(first.shape, first.dtype, first.strip_bytes)
        self._terms = first, second

    def read(self, start: int, stop: int) -> mx.array:
        first, second = (term.read(start, stop) for term in self._terms)
        return first + second

    def drop(self, stop: int) -> None:
        for term in self._terms:
            term.drop(stop)

    def temporaries(self, rows: int) -> int:
        return sum(term.temporaries(rows) for term in self._terms)


def strip_height(rows: Rows) -> int:
    """Rows of one strip: as many as `rows.strip_bytes` allows, in strips of about the same height; at least one."""
    height = rows.shape[1]
    fitting = bisect_right(range(1, height + 1), rows.strip_bytes, key=rows.temporaries)
    strips = -(-height // max(fitting, 1))
    return -(-height // strips)


def stored(rows: Rows, keep: bool = False) -> Stored:
    """Compute all rows; what they are computed from is freed strip by strip unless `keep` is set."""
    height, strips = strip_height(rows), []
    for start in range(0, rows.shape[1], height):
        stop = min(start + height, rows.shape[1])
        strips.append(rows.read(start, stop))
        mx.eval(strips[-1])
        if not keep:
            rows.drop(stop)
    return Stored(strips, rows.strip_bytes)


def _moments(x: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    mean = x.mean(axis=2, keepdims=True)
    return mx.concatenate([mean, mx.square(x - mean).mean(axis=2, keepdims=True)], axis=2)
