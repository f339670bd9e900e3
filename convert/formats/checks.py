"""What is asked of stored tensors before they are taken for weights."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeGuard

import mlx.core as mx
import numpy as np

from flux2_mlx.errors import CheckpointError
from flux2_mlx.json_files import parse_json
from flux2_mlx.weights import FLOATS, READER, TensorInfo

from .packed import Packed

FLOAT_CODES = tuple(FLOATS.values())
LEAST = 2.0**-126  # less has fewer digits in float32
FAINT = 1e-12  # with codes up to 448, scales below it make a layer that is zero, as no layer of a model is
MOST = 2.0**20  # where a scale makes it possible, it overflows in float16, whatever the codes are
# Matrices of these models stay below 10. Codes reach 448 where a scale was lost and 1 is in its place.
_MOST_OF_WEIGHTS = 400.0
# For scales that belong to their codes: none of those is much smaller than the largest one, but where all are zero.
_MOST_POSSIBLE = 1024.0
_MAX_JSON = 100_000  # several hundred times what says how one tensor is packed


def require(
    infos: Mapping[str, TensorInfo], name: str, dtypes: Collection[str], shapes: Iterable[tuple[int, ...]] = ()
) -> TensorInfo:
    """The tensor `name`; CheckpointError if it is not there, or not of one of these dtypes and, if given, shapes."""
    shapes = tuple(shapes)
    info = infos.get(name)
    if info is None:
        raise CheckpointError(f"{name} is missing; fetch the file again, or one that has it")
    if info.dtype not in dtypes:
        raise CheckpointError(f"{name} is {info.dtype} instead of {' or '.join(dtypes)}")
    if shapes and info.shape not in shapes:
        raise CheckpointError(f"{name} is {list(info.shape)} instead of {' or '.join(str(list(x)) for x in shapes)}")
    return info


def complete(
    infos: Mapping[str, TensorInfo], weights: dict[str, Packed], endings: tuple[str, ...]
) -> dict[str, Packed]:
    """`weights` again; CheckpointError if one is there plainly too, or a tensor with such an ending belongs to none."""
    taken = {name for weight in weights.values() for name in (*weight.sources, *weight.unused)}
    for name in weights:
        if name in infos and name not in taken:
            raise CheckpointError(f"{name} is there twice, plain and packed; remove one of them")
    for name in infos:
        if name.endswith(endings) and name not in taken:
            raise CheckpointError(f"{name} belongs to no weight of the file; fetch the file again")
    return weights


def finite(array: mx.array, name: str, *, least: float = -math.inf, largest: float = 1.0) -> mx.array:
    """An array in float32; CheckpointError if a value is not finite, below `least`, or times `largest` too large for a
    weight."""
    with mx.stream(READER):
        array = array.astype(mx.float32)
        if not mx.all(mx.isfinite(array)).item():
            raise CheckpointError(f"{name} has values that are not finite; fetch the file again")
        if least > -math.inf and not mx.all(array >= least).item():
            raise CheckpointError(f"{name} has values below {least:g}; fetch the file again")
        if array.size and (most := float(np.abs(np.asarray(array)).max()) * largest) > _MOST_POSSIBLE:
            raise _too_large(name, most)
    return array


def of_weights(found: mx.array, name: str, possible: float) -> mx.array:
    """Unpacked weights again; CheckpointError if numbers of a matrix are too large for weights.

    Args:
        found: the weights.
        name: of the scales that made them.
        possible: the largest number that these can make; whether it is there is looked at where that is too large.
    """
    if found.ndim > 1 and not are_weights(possible):
        values = np.asarray(found)
        if not are_weights(most := float(max(values.max(), -values.min()))):
            raise _too_large(name, most)
    return found


def are_weights(most: float) -> bool:
    """Whether numbers up to `most` may be the weights of a matrix."""
    return most <= _MOST_OF_WEIGHTS  # false, too, if it is no number


def _too_large(name: str, most: float) -> CheckpointError:
    return CheckpointError(f"{name} makes weights up to {most:.2g}, as no model has; fetch the file again")


def not_all_zero(scales: mx.array, name: str, codes: mx.array) -> mx.array:
    """`scales` again; CheckpointError if all are 0 or nearly so while the codes differ: the true scales were lost."""
    with mx.stream(READER):
        if codes.size and not mx.any(mx.abs(scales) >= FAINT).item() and mx.any(codes != codes.reshape(-1)[0]).item():
            raise CheckpointError(f"{name} is 0 or nearly so throughout, for no such weight; fetch the file again")
    return scales


def require_json(infos: Mapping[str, TensorInfo], name: str) -> None:
    """CheckpointError if a tensor can't be JSON, so that it need not be read."""
    if require(infos, name, ("U8",)).nbytes > _MAX_JSON:
        raise CheckpointError(f"{name} is {list(infos[name].shape)}, which is no JSON of a weight")


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """What JSON that belongs to the tensor `name` says; CheckpointError if it is no object."""
    try:
        value = parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds no JSON object")
    return value


def is_shape(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of one or more positive whole numbers."""
    return isinstance(value, list) and bool(value) and all(type(n) is int and 0 < n < 2**31 for n in value)
