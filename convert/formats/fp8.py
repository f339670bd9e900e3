"""Weights of 8 bits: fp8 with scales of any kind or without, mxfp8, and ComfyUI's int8."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from math import gcd

import mlx.core as mx
import numpy as np

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import READER, TensorInfo

from .checks import LEAST, MOST, not_all_zero, of_weights
from .comfy import AGAIN, MARKER, WEIGHT, Declared, declarations, packed_layer, swizzled_shape, told, unswizzled
from .packed import Packed
from .tables import numbers

_NAMES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
# The largest finite number of each, and its byte: above it are infinity and what is no number.
LARGEST = {"F8_E4M3": (448.0, 0x7E), "F8_E5M2": (57344.0, 0x7B), "I8": (128.0, 0x7F)}
_SCALES = (".weight_scale", ".weight_scale_inv", ".scale_weight")
_SCALE_2 = ".weight_scale_2"  # of nvfp4
_SET_MARKER = "scaled_fp8"
_FLOATS = ("F32", "F16", "BF16")
_GROUP = 32
_BLOCK = 128
# Codes that a scale belongs to go up to 240 or 448 in each tensor. Layers of these models stay below 10, so that
# several times as much is none of theirs; what has one dimension, such as a norm, may be larger.
_MOST_UNSCALED, _MOST_OF_VECTORS = 32.0, 256.0
_FORGOTTEN = "a weight without its scale would give a white image; get the file that it was made as"
# In the last part of a name, but for the norms of the original release, which are called `scale` alone.
_SPEAKS_OF_SCALES = re.compile(r"(?:^|_)scale[sd]?(?:_|$)")


def packed(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, Packed]:
    """The weights of 8 bits among tensors, by their names, as float32.

    Args:
        infos: all tensors of the files, by their names there, in any naming.
        metadata: the texts of the files' headers.

    Raises:
        CheckpointError: a scale is missing, without weight, there twice or of another shape or dtype than it can be;
            or a weight is not in the format that the files say.
    """
    declared = declarations(infos, metadata)
    scales = _scales(infos)
    if not (declared or any(map(_speaks_of_scales, infos))):
        return {name: _cast(name, info) for name, info in infos.items() if info.dtype in _NAMES}
    sets = [name for name in infos if name.rpartition(".")[2] == _SET_MARKER]
    found = {}
    for name, info in infos.items():
        layer = name.removesuffix(WEIGHT)
        if info.dtype in _NAMES and name.endswith(".bias"):
            raise CheckpointError(f"{name} is {info.dtype} beside weights with scales; {_FORGOTTEN}")
        if layer != name and (info.dtype in _NAMES or (info.dtype == "I8" and (layer in scales or layer in declared))):
            markers = tuple(marker for marker in sets if name.startswith(marker.removesuffix(_SET_MARKER)))
            found[name] = _layer(layer, scales.get(layer), declared, infos, markers)
    _check_left(infos, found, scales, declared, sets)
    return found


def check_codes(name: str, codes: mx.array, largest: int) -> None:
    """CheckpointError if a byte stands for no finite number, as those above `largest` of either sign do."""
    values = np.asarray(codes)
    if values.size and (values.max() > 0x80 | largest or values.view(np.int8).max() > largest):
        raise CheckpointError(f"{name} holds infinity or what is no number; fetch or make the file again")


def check_scales(name: str, scales: mx.array, largest: float, *, zero: bool = False) -> None:
    """CheckpointError unless scales in float32 are positive, or 0 if `zero`, and not too large for codes up to
    `largest`."""
    values = np.asarray(scales)
    with np.errstate(over="ignore", invalid="ignore"):
        if not ((values >= (0 if zero else LEAST)) & (values * np.float32(largest) <= MOST)).all():
            what = "a scale that is no positive number, or far too large"
            raise CheckpointError(f"{name} holds {what}; fetch or make the file again")


def _scales(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The name of the scale of each layer that has one; layers in NVFP4 are left out."""
    scales: dict[str, str] = {}
    for name in infos:
        for end in _SCALES:
            layer = name.removesuffix(end)
            if layer == name or _is_nvfp4(layer, infos):
                continue
            if layer in scales:
                raise CheckpointError(f"{layer}{WEIGHT} has two scales, {scales[layer]} and {name}; {AGAIN}")
            scales[layer] = name
    return scales


def _is_nvfp4(layer: str, infos: Mapping[str, TensorInfo]) -> bool:
    weight = infos.get(layer + WEIGHT)
    return layer + _SCALE_2 in infos or (weight is not None and weight.dtype == "U8")


def _speaks_of_scales(name: str) -> bool:
    end = name.rpartition(".")[2]
    return end != "scale" and _SPEAKS_OF_SCALES.search(end) is not None


def _cast(name: str, info: TensorInfo) -> Packed:
    """A tensor of 8 bit numbers that no scale belongs to."""
    most = _MOST_UNSCALED if len(info.shape) > 1 else _MOST_OF_VECTORS

    def unpack(codes: mx.array) -> mx.array:
        with mx.stream(READER):
            found = eight_bits(name, info.dtype, codes)
            if found.size and (mx.maximum(mx.max(found), -mx.min(found)) >= most).item():
                raise CheckpointError(
                    f"{name} holds numbers that only a scale makes weights, and has none; {_FORGOTTEN}"
                )
            return found

    return Packed("fp8", (name,), TensorInfo("F32", info.shape), unpack)


def _layer(
    layer: str,
    scale: str | None,
    declared: Mapping[str, Declared | None],
    infos: Mapping[str, TensorInfo],
    markers: tuple[str, ...],
) -> Packed:
    weight = infos[layer + WEIGHT]
    if scale is None:
        raise CheckpointError(f"{layer}{WEIGHT} is {weight.dtype} and has no scale; {_FORGOTTEN}")
    format = _format(layer, weight, infos[scale], declared)
    if declared and layer not in declared:
        raise CheckpointError(f"{layer}{WEIGHT} has a scale, and its file does not name it among its quantized layers")
    for marker in markers:
        if weight.dtype in _NAMES and infos[marker].dtype in _NAMES and infos[marker].dtype != weight.dtype:
            raise CheckpointError(f"{layer}{WEIGHT} is {weight.dtype}, and {marker} says {infos[marker].dtype}")
    shape = weight.shape
    if format == "mxfp8":
        _check_groups(scale, shape, infos[scale])
    else:
        _check_shape(scale, shape, infos[scale])

    def unpack(codes: mx.array, scales: mx.array) -> mx.array:
        if format != "mxfp8":
            scales = scales.astype(mx.float32)
            check_scales(scale, scales, LARGEST[weight.dtype][0])
            not_all_zero(scales, scale, codes)
        one = float(np.asarray(scales).item()) if scales.size == 1 and format != "mxfp8" else 1.0
        found = eight_bits(layer + WEIGHT, weight.dtype, codes, one)
        if format == "mxfp8":
            return _by_groups(scale, found, scales)
        found = found if scales.size == 1 else _scaled(found, scales)
        return of_weights(found, scale, LARGEST[weight.dtype][0] * float(np.asarray(scales).max(initial=0)))

    return packed_layer(layer, format, declared.get(layer), infos, (scale,), shape, unpack, markers)


def _format(layer: str, weight: TensorInfo, scale: TensorInfo, declared: Mapping[str, Declared | None]) -> str:
    if weight.dtype == "F8_E4M3" and scale.dtype in ("F8_E8M0", "U8"):
        format = "mxfp8"
    elif weight.dtype == "I8":
        format = "int8_tensorwise"
    else:
        return _NAMES[weight.dtype]
    if layer not in declared:
        raise CheckpointError(
            f"{layer}{WEIGHT} looks like {format}, and its file does not say so, as those of ComfyUI do; other tools "
            f"store the same otherwise; {AGAIN}"
        )
    return format


def _check_groups(name: str, shape: tuple[int, ...], scale: TensorInfo) -> None:
    """CheckpointError if a weight of this `shape` can't have these scales of groups."""
    if len(shape) != 2 or not shape[0] or not shape[1] or shape[1] % _GROUP:
        raise CheckpointError(f"{name} scales groups of {_GROUP} inputs, of which {list(shape)} has no whole number")
    wanted = swizzled_shape(shape[0], shape[1] // _GROUP)
    if scale.shape != wanted:
        raise CheckpointError(f"{name} is {told(scale)}; for a weight of {list(shape)} it is {list(wanted)}; {AGAIN}")


def _check_shape(name: str, shape: tuple[int, ...], scale: TensorInfo) -> None:
    """CheckpointError unless it is one scale, or one of each row or of each block of a weight of this `shape`."""
    shapes: list[tuple[int, ...]] = [(), (1,), (1, 1)]
    if len(shape) == 2:
        shapes += [(shape[0],), (shape[0], 1), _blocks(shape)]
    if scale.dtype not in _FLOATS or scale.shape not in shapes:
        raise CheckpointError(f"{name} is {told(scale)}, which is no scale of a weight of {list(shape)}; {AGAIN}")


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // _BLOCK) for size in shape)


def eight_bits(name: str, dtype: str, codes: mx.array, factor: float = 1.0) -> mx.array:
    """Numbers of `I8` or of a float of 8 bits as float32, exactly, times a `factor` in float32, rounded once;
    CheckpointError if one of them is not finite."""
    if dtype != "I8":
        check_codes(name, codes, LARGEST[dtype][1])
    with np.errstate(invalid="ignore"):
        return numbers(codes.view(mx.uint8, stream=READER), _table(dtype) * np.float32(factor))


@cache
def _table(dtype: str) -> np.ndarray:
    """What each byte stands for."""
    codes = np.arange(256, dtype=np.uint8)
    if dtype == "I8":
        return codes.view(np.int8).astype(np.float32)
    if dtype == "F8_E4M3":
        return np.array(mx.from_fp8(mx.array(codes), mx.float32))
    return (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)  # the upper half of a float16


def _by_groups(name: str, found: mx.array, scales: mx.array) -> mx.array:
    rows, columns = found.shape
    exponents = unswizzled(scales, rows, columns // _GROUP).astype(mx.uint32)
    powers = (exponents << 23).view(mx.float32)  # 0 for 0, as in comfy-kitchen, which means a group of zeros
    check_scales(name, powers, LARGEST["F8_E4M3"][0], zero=True)
    not_all_zero(powers, name, found)
    found = (found.reshape(rows, -1, _GROUP) * powers[..., None]).reshape(rows, columns)
    return of_weights(found, name, LARGEST["F8_E4M3"][0] * float(np.asarray(powers).max()))


def _scaled(found: mx.array, scales: mx.array) -> mx.array:
    rows, columns = found.shape
    if scales.shape in ((rows,), (rows, 1)):  # as many may be of blocks
        return found * scales.reshape(rows, 1)
    height = gcd(rows, _BLOCK)  # of the pieces of equal rows into which all blocks fall, the last one too
    spread = mx.repeat(mx.repeat(scales, _BLOCK // height, axis=0)[: rows // height], _BLOCK, axis=1)[:, :columns]
    return (found.reshape(-1, height, columns) * spread[:, None]).reshape(rows, columns)


def _check_left(
    infos: Mapping[str, TensorInfo],
    found: Mapping[str, Packed],
    scales: Mapping[str, str],
    declared: Mapping[str, Declared | None],
    sets: Iterable[str],
) -> None:
    """CheckpointError if a scale, a statement or a marker belongs to no weight of 8 bits."""
    for layer in (*scales, *declared):
        weight = infos.get(layer + WEIGHT)
        said = declared.get(layer)
        if layer + WEIGHT in found or (weight and weight.dtype == "U8" and (said is None or said.format == "nvfp4")):
            continue
        if said and said.format == "nvfp4":
            continue
        what = f"says that it is {said.format}" if said else f"has {scales.get(layer, layer + MARKER)}"
        state = f"{layer}{WEIGHT} is {told(weight)}" if weight else f"there is no {layer}{WEIGHT}"
        raise CheckpointError(f"{state}, and its file {what}; fetch or make the file again")
    for marker in sets:
        if not any(marker in weight.unused for weight in found.values()):
            raise CheckpointError(f"{marker} says that weights are in fp8, and there are none")
