"""Activations in strips of rows, so that only what is kept between two passes has the size of the image.

A layer takes and returns `Rows`, whose values are computed when they are read. `Rows.store` computes them strip by
strip from top to bottom and frees its input as it goes.
"""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..device import on_gpu

# Rows at a seam are prepared for both strips, so small strips cost time. This gives 32 rows or more in any convolution
# of the released models at a width of 1024 in bfloat16.
STRIP_BYTES = 256 * 1024 * 1024


class Rows:
    """An activation `[B, H, W, C]` whose rows are computed from those of its sources when they are read."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    runner: "Runner"

    def __init__(self, *sources: "Rows", shape: tuple[int, ...] | None = None, dtype: mx.Dtype | None = None):
        self._sources = sources
        self.runner = sources[0].runner
        self.shape = tuple(shape or sources[0].shape)
        self.dtype = dtype or sources[0].dtype

    def store(self, keep: bool = False) -> "Stored":
        """Compute all rows; what they are computed from is freed strip by strip unless `keep` is set."""
        return self.runner.store(self, keep)

    def read(self, start: int, stop: int) -> mx.array:
        raise NotImplementedError

    def drop(self, stop: int) -> None:
        """Free what no row from `stop` on needs."""
        for source in self._sources:
            source.drop(stop)

    def temporaries(self, rows: int) -> int:
        """Bytes that reading `rows` rows allocates at most, the result included."""
        raise NotImplementedError

    def held(self) -> int:
        """Bytes of what the rows are computed from."""
        return sum(source.held() for source in self._sources)

    def nbytes(self, rows: int) -> int:
        B, _, W, C = self.shape
        return rows * B * W * C * self.dtype.size


class Stored(Rows):
    """Rows in memory, as strips from top to bottom."""

    def __init__(self, strips: list[mx.array], runner: "Runner"):
        B, _, W, C = strips[0].shape
        self.shape = (B, sum(strip.shape[1] for strip in strips), W, C)
        self.dtype = strips[0].dtype
        self.runner = runner
        self._strips = deque(strips)
        self._top = 0
        self._joins = len(strips) > 1

    def read(self, start: int, stop: int) -> mx.array:
        parts = []
        top = self._top
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
        return self._joins * self.nbytes(rows)

    def held(self) -> int:
        return self.nbytes(self.shape[1] - self._top)


class Mapped(Rows):
    """A function of each pixel that may compute in float32, and that allocates `workspace` further bytes per row."""

    def __init__(self, source: Rows, function: Callable[[mx.array], mx.array], workspace: int = 0):
        super().__init__(source)
        self._function = function
        self._workspace = workspace

    def read(self, start: int, stop: int) -> mx.array:
        return self._function(self._sources[0].read(start, stop))

    def temporaries(self, rows: int) -> int:
        copy = self.nbytes(rows) // self.dtype.size * mx.float32.size
        # Two copies; the first may reuse what the source allocated.
        return max(self._sources[0].temporaries(rows), copy) + copy + self._workspace * rows


class Moments(Rows):
    """Mean and variance of each row, `[B, H, 2, C]` in float32."""

    def __init__(self, source: Rows):
        B, H, _, C = source.shape
        super().__init__(source, shape=(B, H, 2, C), dtype=mx.float32)

    def read(self, start: int, stop: int) -> mx.array:
        x = self._sources[0].read(start, stop).astype(mx.float32)
        mean = x.mean(axis=2, keepdims=True)
        return mx.concatenate([mean, mx.square(x - mean).mean(axis=2, keepdims=True)], axis=2)

    def temporaries(self, rows: int) -> int:
        source = self._sources[0]
        return source.temporaries(rows) + 2 * source.nbytes(rows) * mx.float32.size // source.dtype.size


class Doubled(Rows):
    """Each pixel of the source as 2×2 pixels."""

    def __init__(self, source: Rows):
        B, H, W, C = source.shape
        super().__init__(source, shape=(B, 2 * H, 2 * W, C))

    def read(self, start: int, stop: int) -> mx.array:
        first = start // 2
        x = self._sources[0].read(first, math.ceil(stop / 2))
        x = mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
        return x[:, start - 2 * first : stop - 2 * first]

    def drop(self, stop: int) -> None:
        self._sources[0].drop(stop // 2)

    def temporaries(self, rows: int) -> int:
        read = rows // 2 + 1
        return self._sources[0].temporaries(read) + 3 * self.nbytes(read)


class Convolved(Rows):
    """A convolution that divides both sides by its stride; zeros surround the image, never a strip."""

    def __init__(self, source: Rows, conv: nn.Conv2d):
        B, H, W, _ = source.shape
        stride = conv.stride[0]
        super().__init__(source, shape=(B, H // stride, W // stride, conv.weight.shape[0]))
        self._conv = conv

    def read(self, start: int, stop: int) -> mx.array:
        first, last, top, bottom = self._window(start, stop, 1)
        _, _, left, right = self._window(0, self.shape[2], 2)
        x = self._sources[0].read(first, last)
        padding = (top, left)
        if padding != (bottom, right):
            x = mx.pad(x, [(0, 0), (top, bottom), (left, right), (0, 0)])
            padding = (0, 0)
        y = mx.conv2d(x, self._conv.weight, self._conv.stride, padding)
        return y + self._conv.bias if "bias" in self._conv else y

    def drop(self, stop: int) -> None:
        last = stop == self.shape[1]
        self._sources[0].drop(self._sources[0].shape[1] if last else self._window(stop, stop + 1, 1)[0])

    def temporaries(self, rows: int) -> int:
        source = self._sources[0]
        kernel = self._conv.weight.shape[1]
        stride = self._conv.stride[0]
        window = rows * stride + kernel - stride
        # The backend copies the window, which may have been padded here before, and then unfolds the copy: each pixel
        # goes to all places where the kernel meets it. MLX unfolds on a CPU, there in float32 whatever it is given, and
        # on a GPU for few channels.
        widening = 1 if on_gpu() else mx.float32.size // self.dtype.size
        unfolded = kernel * kernel * source.nbytes(rows) // stride
        padded = 0 if rows == self.shape[1] and stride == 1 else source.nbytes(window)
        result = self.nbytes(rows) * (widening + 1 if widening > 1 else 1)
        return source.temporaries(window) + padded + widening * (source.nbytes(window) + unfolded) + result

    def _window(self, start: int, stop: int, axis: int) -> tuple[int, int, int, int]:
        """What outputs `start` to `stop` read along an axis: first, last + 1, and the zeros before and after them."""
        conv = self._conv
        size = self._sources[0].shape[axis]
        first = start * conv.stride[0] - conv.padding[0]
        last = (stop - 1) * conv.stride[0] + conv.weight.shape[1] - conv.padding[0]
        return max(first, 0), min(last, size), max(-first, 0), max(last - size, 0)


class Sum(Rows):
    def read(self, start: int, stop: int) -> mx.array:
        first, second = (source.read(start, stop) for source in self._sources)
        return first + second

    def temporaries(self, rows: int) -> int:
        return sum(source.temporaries(rows) for source in self._sources)


class Runner:
    """Computes rows in strips that allocate at most `strip_bytes` each, or of one row if that takes more."""

    def __init__(self, strip_bytes: int):
        self._strip_bytes = strip_bytes

    def store(self, rows: Rows, keep: bool) -> Stored:
        H = rows.shape[1]
        height = strip_height(rows, self._strip_bytes)
        strips = []
        for start in range(0, H, height):
            stop = min(start + height, H)
            strips.append(self._compute(rows, start, stop))
            if not keep:
                rows.drop(stop)
        return Stored(strips, self)

    def _compute(self, rows: Rows, start: int, stop: int) -> mx.array:
        strip = rows.read(start, stop)
        mx.eval(strip)
        return strip


class Meter(Runner):
    """Computes nothing; `peak` is the most bytes that a `Runner` would have allocated at once."""

    peak = 0

    def _compute(self, rows: Rows, start: int, stop: int) -> mx.array:
        self.peak = max(self.peak, rows.held() + rows.nbytes(start) + rows.temporaries(stop - start))
        B, _, W, C = rows.shape
        return mx.zeros((B, stop - start, W, C), rows.dtype)  # never evaluated, so never allocated


def strip_height(rows: Rows, strip_bytes: int) -> int:
    """Rows of a strip: as many as `strip_bytes` allows, at least one, and about the same in all strips."""
    H = rows.shape[1]
    most = bisect_right(range(1, H + 1), strip_bytes, key=rows.temporaries)
    strips = math.ceil(H / max(most, 1))
    return math.ceil(H / strips)
