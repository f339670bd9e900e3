"""The blocks of values that tensors of GGUF files consist of: their types, and reading them as plain numbers.

What blocks mean is the part of the `gguf` library.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from flux2_mlx.copying import FileVersion
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import READER, TensorInfo

from .checks import FAINT, are_weights

# Types that hold numbers as they are, and the arrays that they are read into: NumPy has no bfloat16.
PLAIN = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.uint16,
    "I8": mx.int8,
    "I16": mx.int16,
    "I32": mx.int32,
    "I64": mx.int64,
}
_SCALED_APART = "NVFP4"  # a further scale lies in another tensor, under one of several names
_THREADS = min(8, os.cpu_count() or 1)
_JOB = 2**22  # values that a thread makes at a time
_STEP = 2**17  # values of these that it makes at once, in the cache of its core


class Kind(NamedTuple):
    """A type of GGUF: its name, its code, and how many values and bytes a block of it has."""

    name: str
    code: int
    values: int
    nbytes: int

    @property
    def dtype(self) -> str:
        """The dtype that it is read in, as a code of safetensors."""
        return self.name if self.name in PLAIN else "F32"


@dataclass(frozen=True)
class Stored:
    """A tensor in its file: `offset` and `nbytes` say where, `info` the dtype and shape that it is read in."""

    file: FileVersion
    kind: Kind
    info: TensorInfo
    offset: int
    nbytes: int


@cache
def kind_names() -> dict[int, str]:
    """All types that the library knows."""
    from gguf import GGMLQuantizationType

    return {int(kind): kind.name for kind in GGMLQuantizationType}


@cache
def kinds() -> dict[int, Kind]:
    """The types that can be read, by code."""
    from gguf import GGML_QUANT_SIZES

    kinds = [Kind(kind.name, int(kind), *size) for kind, size in GGML_QUANT_SIZES.items() if kind.name != _SCALED_APART]
    return {kind.code: kind for kind in kinds if kind.name in PLAIN or _is_dequantized(kind)}


def _is_dequantized(kind: Kind) -> bool:
    """Whether the library can dequantize a type. Trying also makes its tables before threads ask for them."""
    try:
        _dequantize(np.zeros(kind.nbytes, np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dequantize(blocks: np.ndarray, kind: Kind) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    with np.errstate(all="ignore"):  # scales may be infinite, which the caller finds
        return quants.dequantize(blocks[None], GGMLQuantizationType(kind.code))[0]


def read_stored(name: str, stored: Stored) -> mx.array:
    """A tensor in memory. Threads fill it piece by piece, so that nothing else of its size is needed."""
    shape = stored.info.shape
    dtype = stored.info.dtype
    array = mx.zeros(shape, PLAIN[dtype], stream=READER)
    mx.eval(array)
    values = np.array(array, copy=False).reshape(-1)
    with stored.file.open() as file, ThreadPoolExecutor(_THREADS) as pool:
        fill = partial(_fill, file.fileno(), name, stored, values)
        found = [*pool.map(fill, range(0, len(values), _JOB))]
    if any(differ for _, differ in found) and max(most for most, _ in found) < FAINT:
        raise CheckpointError(
            f"{name} in {stored.file.path} has scales that are 0 or nearly so throughout, for no such weight; "
            "fetch the file again"
        )
    return array.view(mx.bfloat16, stream=READER) if dtype == "BF16" else array


def _fill(file: int, name: str, stored: Stored, values: np.ndarray, start: int) -> tuple[float, bool]:
    """Fill `values` from number `start` on, as far as one job goes. Of quantized ones it gives the largest, without its
    sign, and whether all are nearly zero although their blocks differ, as where the true scales were lost."""
    kind = stored.kind
    values = values[start : start + _JOB]
    quantized = kind.name not in PLAIN
    data = np.empty(len(values) // kind.values * kind.nbytes, np.uint8) if quantized else values.view(np.uint8)
    try:
        count = os.preadv(file, [data.data], stored.offset + start // kind.values * kind.nbytes)
    except OSError as error:
        raise CheckpointError(f"can't read {stored.file.path}: {error.strerror}") from error
    if count != len(data):
        raise CheckpointError(f"{stored.file.path} became shorter while it was read")
    if not quantized:
        return math.inf, False
    most = 0.0
    step = _STEP // kind.values * kind.nbytes
    for number, first in enumerate(range(0, len(data), step)):
        made = _dequantize(data[first : first + step], kind)
        least, largest = float(made.min()), float(made.max())
        if not (are_weights(-least) and are_weights(largest)):
            raise CheckpointError(f"{name} in {stored.file.path} has scales that no weight has; fetch the file again")
        values[number * _STEP :][: len(made)] = made
        most = max(most, -least, largest)
    return most, most < FAINT and bool((data.reshape(-1, kind.nbytes) != data[: kind.nbytes]).any())
