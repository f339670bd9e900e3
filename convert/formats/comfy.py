"""What files of ComfyUI and of the releaser say of their quantized layers, and how they store scales of groups."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from flux2_mlx.errors import CheckpointError
from flux2_mlx.json_files import parse_json
from flux2_mlx.weights import READER, TensorInfo

from .packed import Packed

METADATA = "_quantization_metadata"
MARKER = ".comfy_quant"
WEIGHT = ".weight"
# The formats that can be read, and what users call them.
FORMATS = {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8", "mxfp8": "mxfp8", "int8_tensorwise": "int8", "nvfp4": "nvfp4"}
# Scales of activations, which are computed in bfloat16 here.
_UNUSED = (".input_scale", ".scale_input", ".activation_scale")
_ROTATIONS = (4, 16, 64, 256, 1024)
_MARKER_BYTES = 4096
AGAIN = "fetch the releaser's or ComfyUI's file again, or the bf16 one"


@dataclass(frozen=True)
class Declared:
    """What a file says of a layer: its format, and how many inputs each were rotated together before (0: none)."""

    format: str
    rotation: int = 0


def declarations(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, Declared | None]:
    """What files say of their layers, by the names of these; None: a tensor of the layer says it.

    Raises:
        CheckpointError: a statement can't be understood, or is about a layer that is not there.
    """
    marked: dict[str, Declared | None] = {}
    for name, info in infos.items():
        if name.endswith(MARKER):
            if info.dtype != "U8" or len(info.shape) != 1 or not 0 < info.shape[0] <= _MARKER_BYTES:
                raise CheckpointError(f"{name} is {told(info)}, which holds no description of a layer")
            marked[name.removesuffix(MARKER)] = None
    declared = marked | (_listed(infos, metadata[METADATA]) if METADATA in metadata else {})
    for layer in declared:
        if layer + WEIGHT not in infos:
            raise CheckpointError(f"{layer[:200]!r} is said to be quantized, and there is no weight of that name")
    return declared


def packed_layer(
    layer: str,
    format: str,
    declared: Declared | None,
    infos: Mapping[str, TensorInfo],
    scales: tuple[str, ...],
    shape: tuple[int, ...],
    unpack: Callable[..., mx.array],
    unused: tuple[str, ...] = (),
) -> Packed:
    """A weight of this `shape` that `unpack` makes from its bytes and `scales`.

    Raises:
        CheckpointError: the file says that it is in another format.
    """
    markers = tuple(name for name in (layer + MARKER,) if name in infos)
    if declared is not None:
        _check(layer, declared, format, shape)

    def unpacked(*arrays: mx.array) -> mx.array:
        said = declared
        if markers:
            said = _declared(markers[0], _json(markers[0], np.asarray(arrays[-1]).tobytes()))
            _check(layer, said, format, shape, declared)
        with mx.stream(READER):
            array = unpack(*arrays[: 1 + len(scales)])
            return _rotated(array, said.rotation) if said and said.rotation else array

    unused += tuple(layer + end for end in _UNUSED if layer + end in infos)
    return Packed(FORMATS[format], (layer + WEIGHT, *scales, *markers), TensorInfo("F32", shape), unpacked, unused)


def unswizzled(scales: mx.array, rows: int, columns: int) -> mx.array:
    """Scales of groups, `[rows, columns]`, from cuBLAS's blocks of 128 · 4, which are stored one after another, each
    as 32 rows of 16: row r of a block as columns 4 · (r div 32) … of row r mod 32."""
    down, across = (-(-rows // 128), -(-columns // 4))
    blocks = scales.reshape(down, across, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return blocks.reshape(128 * down, 4 * across)[:rows, :columns]


def swizzled_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of `[rows, columns]` scales in cuBLAS's blocks (see `unswizzled`)."""
    return (rows + -rows % 128, columns + -columns % 4)


def told(info: TensorInfo) -> str:
    """The dtype and shape of a tensor, for messages."""
    return f"{info.dtype} {list(info.shape)}"


def _listed(infos: Mapping[str, TensorInfo], text: str) -> dict[str, Declared | None]:
    """What the metadata says, by the layers' names in the files, which may have a prefix more."""
    value = _json(METADATA, text.encode())
    version = str(value.get("format_version", "1"))
    layers = value.get("layers")
    if version.split(".")[0] != "1":
        raise CheckpointError(f"{METADATA} is of version {version[:40]!r}; only version 1 can be read")
    if not isinstance(layers, dict):
        raise CheckpointError(f"{METADATA} has no table of layers")
    prefix = _prefix(infos, next(iter(layers), ""))
    return {prefix + layer: _declared(layer, value) for layer, value in layers.items()}


def _prefix(infos: Mapping[str, TensorInfo], layer: str) -> str:
    if layer + WEIGHT in infos:
        return ""
    end = f".{layer}{WEIGHT}"
    return min((name[: 1 - len(end)] for name in infos if name.endswith(end)), key=len, default="")


def _json(name: str, data: bytes) -> dict[str, Any]:
    try:
        value = parse_json(data, unique=True)
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds no JSON object")
    return value


def _declared(name: str, value: Any) -> Declared:
    """What the parsed JSON about a layer says."""
    format = value.get("format") if isinstance(value, dict) else None
    if not isinstance(format, str) or format not in FORMATS:
        name = name[:200]
        raise CheckpointError(
            f"{name} is in format {str(format)[:40]!r}, which is not one of {', '.join(FORMATS)}; {AGAIN}"
        )
    parameters = value.get("params", {})
    values = value | parameters if isinstance(parameters, dict) else value
    rotated, size = values.get("convrot", False), values.get("convrot_groupsize", 256)
    if not isinstance(rotated, bool) or (rotated and (type(size) is not int or size not in _ROTATIONS)):
        sizes = ", ".join(map(str, _ROTATIONS))
        raise CheckpointError(f"{name} is rotated in groups of {str(size)[:40]}, which is not one of {sizes}")
    if rotated and format != "int8_tensorwise":
        raise CheckpointError(f"{name} is rotated and in {format}; only int8_tensorwise can be rotated back")
    return Declared(format, size if rotated else 0)


def _check(layer: str, said: Declared, format: str, shape: tuple[int, ...], before: Declared | None = None) -> None:
    """CheckpointError if a weight is not as it is `said` to be, or if something else was said `before`."""
    if said.format != format:
        raise CheckpointError(f"{layer}{WEIGHT} is stored as {format}, and its file says {said.format}; {AGAIN}")
    if before not in (None, said):
        raise CheckpointError(f"{layer}{MARKER} says another thing than the metadata of its file")
    if said.rotation and shape[-1] % said.rotation:
        raise CheckpointError(f"{layer}{WEIGHT} is rotated in groups of {said.rotation}, and has {shape[-1]} inputs")


def _rotated(weight: mx.array, size: int) -> mx.array:
    """Each group of `size` inputs times a symmetric Hadamard matrix, which is its own inverse."""
    return (weight.reshape(-1, size) @ mx.array(_hadamard(size))).reshape(weight.shape)


@cache
def _hadamard(size: int) -> np.ndarray:
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32) / 2
    return four if size == 4 else np.kron(_hadamard(size // 4), four)
