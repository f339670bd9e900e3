"""Files of weights: what their headers say, and writing them. Knows bytes, no model."""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import CheckpointError

_DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_MAX_PROBLEMS = 8
# What Python raises when values of a JSON file have other types or sizes than they should.
NONSENSE = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header states it; `dtype` is the safetensors code, such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BYTES.get(self.dtype, 1)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes in a safetensors file, after comparing its length with its header.

    Raises:
        CheckpointError: not a safetensors file, or one that is cut short or too long.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        for name, tensor in tensors.items():
            first, last = header[name]["data_offsets"]
            if last - first != tensor.nbytes:
                raise ValueError(f"{name} has {last - first} bytes in place of {tensor.nbytes}")
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except (*NONSENSE, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if size != end:
        raise CheckpointError(f"{path} has {size} bytes where its header says {end}; fetch or convert it again")
    return tensors


def read_headers(paths: Iterable[Path]) -> dict[str, TensorInfo]:
    """The tensors of several safetensors files; CheckpointError also if two of them hold the same one."""
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        header = read_header(path)
        raise_problems(f"{path} repeats tensors of another file", [name for name in header if name in tensors])
        tensors |= header
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def mismatches(expected: dict[str, TensorInfo], found: dict[str, TensorInfo]) -> list[str]:
    """A line for each tensor that is missing, left over, or of another shape or dtype."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    for name, want in expected.items():
        have = found.get(name, want)
        if have != want:
            problems.append(f"{name} is {have.dtype} {list(have.shape)} instead of {want.dtype} {list(want.shape)}")
    return problems


def raise_problems(what: str, problems: list[str]) -> None:
    """Raise one CheckpointError that lists `problems`, if there are any."""
    if problems:
        more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise CheckpointError(f"{what}: {'; '.join(problems[:_MAX_PROBLEMS])}{more}")


def write_safetensors(
    path: Path,
    tensors: dict[str, TensorInfo],
    arrays: Iterable[mx.array],
    metadata: dict[str, str],
    report: Callable[[int], None],
) -> None:
    """Write a safetensors file of `tensors`, whose `arrays` come in the same order and are dropped one by one."""
    header, offset = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor, array in zip(tensors.values(), arrays, strict=True):
            data = np.ascontiguousarray(array.view(mx.uint16) if tensor.dtype == "BF16" else array)
            if data.shape != tensor.shape:
                raise AssertionError(f"planned {tensor.shape}, made {data.shape}")
            file.write(data.data)
            report(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())
