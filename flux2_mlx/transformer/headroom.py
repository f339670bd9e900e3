"""Room for large values under float16, which ends at 65504. Other dtypes are computed as without it, bit for bit.

A few channels of the stream of tokens grow beyond that, and so does what blocks add to it. Under float16 both are in
units of `UNIT`, which costs nothing: norms divide by the size anyway. What is too large even so is put at the end of
the range, for an infinity would be "not a number" after the next product. (diffusers has the latter only.)
"""

import mlx.core as mx

from .. import layers
from ..device import fused
from ..layers import clip_float16

# A power of two, so that only values below 0.002 lose digits.
UNIT = 32


def clips(dtype: mx.Dtype) -> bool:
    """Whether what is too large for this dtype is put at the end of its range."""
    return dtype == mx.float16


def unit(dtype: mx.Dtype) -> int:
    """What 1 stands for in a stream of this dtype."""
    return UNIT if clips(dtype) else 1


def output_unit(layer: str, dtype: mx.Dtype) -> int:
    """What 1 stands for in the output of the layer of this name: those that add to the stream are given units."""
    return unit(dtype) if layer.endswith((".proj", "_mlp.2", ".linear2")) else 1


def clipped(x: mx.array) -> mx.array:
    """`x` without the infinities that a projection may give."""
    return clip_float16(x) if x.dtype == mx.float16 else x


def in_units(x: mx.array) -> mx.array:
    """`x` in units."""
    return _in_units(x) if x.dtype == mx.float16 else x


@fused
def gated_sum(x: mx.array, gate: mx.array, update: mx.array) -> mx.array:
    """x + gate · update, with `x` and `update` in units."""
    if x.dtype != mx.float16:
        return x + gate * update
    return clip_float16(x + clip_float16(gate * clip_float16(update)))


@fused
def _in_units(x: mx.array) -> mx.array:
    return clip_float16(x) / UNIT


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """SiLU(gate) · x, in units."""
    return _swiglu(gate, x) if x.dtype == mx.float16 else layers.swiglu(gate, x)


@fused
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return clip_float16(layers.silu(clip_float16(gate)) * (clip_float16(x) / UNIT))
