"""optimum-quanto: qint8 and qfloat8 by rows, qint4 and qint2 by groups."""

import math
from collections.abc import Mapping
from functools import partial

import mlx.core as mx

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import READER, TensorInfo

from .checks import FLOAT_CODES, complete, finite, not_all_zero, require
from .fp8 import LARGEST, eight_bits
from .packed import NO_SHAPES, Packed, Shapes

_BITS = "._data._data"
_ENDINGS = ("._data", "._scale", "._shift")
# Scales of what a layer takes and gives, for computing in 8 bits.
_ACTIVATIONS = (".input_scale", ".output_scale")


_KINDS = {"I8": "qint8", "F8_E4M3": "qfloat8_e4m3fn", "F8_E5M2": "qfloat8_e5m2"}


def packed(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], shapes: Shapes = NO_SHAPES
) -> dict[str, Packed]:
    """The weights that quanto packed, by their names.

    Args:
        infos: what is stored.
        metadata: of the files.
        shapes: of weights by their names, as far as they are known; of groups of values no file says it.

    Raises:
        CheckpointError: something that belongs to one is missing, left over or wrong, or a shape is not known.
    """
    weights: dict[str, Packed] = {}
    for name in infos:
        if name.endswith(_BITS):
            weight = name.removesuffix(_BITS)
            weights[weight] = _groups(infos, weight, shapes.get(weight))
        elif name.endswith("._data"):
            weight = name.removesuffix("._data")
            weights[weight] = _rows(infos, weight)
    return complete(infos, weights, _ENDINGS)


def _unused(infos: Mapping[str, TensorInfo], weight: str) -> tuple[str, ...]:
    layer = weight.removesuffix(".weight")
    return tuple(layer + ending for ending in _ACTIVATIONS if layer + ending in infos)


def _rows(infos: Mapping[str, TensorInfo], weight: str) -> Packed:
    """A weight of bytes, with a scale for each of its rows."""
    data = f"{weight}._data"
    scale = f"{weight}._scale"
    stored = require(infos, data, _KINDS)
    if not stored.shape:
        raise CheckpointError(f"{data} is a single value, which is no weight")
    require(infos, scale, FLOAT_CODES, [(stored.shape[0], *(1 for _ in stored.shape[1:]))])
    unpack = partial(_unpack_rows, (data, scale), stored.dtype)
    return Packed(
        f"quanto {_KINDS[stored.dtype]}", (data, scale), TensorInfo("F32", stored.shape), unpack, _unused(infos, weight)
    )


def _unpack_rows(names: tuple[str, ...], code: str, data: mx.array, scale: mx.array) -> mx.array:
    factors = not_all_zero(finite(scale, names[1], least=0.0, largest=LARGEST[code][0]), names[1], data)
    with mx.stream(READER):
        return eight_bits(names[0], code, data) * factors


def _groups(infos: Mapping[str, TensorInfo], weight: str, shape: tuple[int, ...] | None) -> Packed:
    """A weight of several values a byte, with a scale and a shift for each group of them."""
    names = (weight + _BITS, f"{weight}._scale", f"{weight}._shift")
    stored = require(infos, names[0], ("U8",)).shape
    scale = require(infos, names[1], FLOAT_CODES).shape
    if len(stored) != 2 or len(scale) != 2 or scale[1] != 1:
        raise CheckpointError(
            f"{names[0]} is {list(stored)} with scales {list(scale)}, which are no groups of a matrix"
        )
    require(infos, names[2], (*FLOAT_CODES, "I8", "U8"), [scale])
    bits = _bits(names[0], stored[0], scale[0])
    if shape is None:
        raise CheckpointError(f"{names[0]} does not say what shape {weight} has; give a whole model with configs")
    if math.prod(shape) != scale[0] * stored[1] or shape[-1] % stored[1]:
        raise CheckpointError(f"{names[0]} has {scale[0]} groups of {stored[1]} values, which {list(shape)} does not")
    unpack = partial(_unpack_groups, names, bits, shape)
    return Packed(f"quanto qint{bits}", names, TensorInfo("F32", shape), unpack, _unused(infos, weight))


def _bits(name: str, rows: int, groups: int) -> int:
    """Bits of a value, where so many `rows` of bytes hold the values of so many `groups`."""
    found = [bits for bits in (4, 2) if rows == -(-groups * bits // 8)]
    if len(found) != 1:
        raise CheckpointError(f"{name} has {rows} rows, which is not clearly a half or a quarter of {groups} groups")
    return found[0]


def _unpack_groups(
    names: tuple[str, ...], bits: int, shape: tuple[int, ...], data: mx.array, scale: mx.array, shift: mx.array
) -> mx.array:
    factors = not_all_zero(finite(scale, names[1], least=0.0, largest=2**bits), names[1], data)
    # A whole number is the code of zero, another one what is taken off in the end.
    before = not mx.issubdtype(shift.dtype, mx.floating)
    zero = finite(shift, names[2], least=0.0 if before else -math.inf)
    with mx.stream(READER):
        if before and not mx.all(zero < 2**bits).item():
            raise CheckpointError(f"{names[2]} has values above {2**bits - 1}; fetch the file again")
        # The first rows are the lowest bits of all bytes.
        parts = [(data >> place) & (2**bits - 1) for place in range(0, 8, bits)]
        values = mx.concatenate(parts)[: factors.shape[0]].astype(mx.float32)
        values = (values - zero) * factors if before else values * factors - zero
        return values.reshape(shape)
