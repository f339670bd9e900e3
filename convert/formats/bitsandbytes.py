"""bitsandbytes: nf4 and fp4, with one or two levels of scales, and int8 by rows."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import READER, TensorInfo

from .checks import FLOAT_CODES, complete, finite, is_shape, json_object, not_all_zero, require, require_json
from .packed import Packed

Read = Callable[[Iterable[str]], Iterator[mx.array]]

STATE = ".quant_state.bitsandbytes__"
_ENDINGS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB")
_FORMAT = ".weight_format"
_NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0),
)
_FP4 = tuple(x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3))
# What each nibble stands for. The file has the same table, which is what is used.
_TABLES = {"nf4": _NF4, "fp4": _FP4 + tuple(-x for x in _FP4)}
_BLOCKS = tuple(2**n for n in range(5, 13))
_MAX_OFFSET = 3e38
_DTYPES = ("float32", "float16", "bfloat16")
_BYTE = 7.874015718698502e-3  # 1/127 as bitsandbytes has it
_CHUNK = 2**20  # bytes that are unpacked at once, for the processor's caches
_LAYOUTS = ("row", "col32", "col_turing", "col_ampere")


@dataclass(frozen=True)
class _State:
    """How a tensor of nibbles is packed, as its file says."""

    kind: str
    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int = 0
    offset: float = 0.0


def packed(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], read: Read) -> dict[str, Packed]:
    """The weights that bitsandbytes packed, by their names; `read` reads the tensors that describe them.

    Raises:
        CheckpointError: something that belongs to one is missing, left over or wrong.
    """
    states = [name for name in infos if STATE in name]
    for name in states:
        require_json(infos, name)
    weights: dict[str, Packed] = {}
    for name, array in zip(states, read(states), strict=True):
        weight = name[: name.index(STATE)]
        if weight in weights:
            raise CheckpointError(f"{weight} has two quantization states; fetch the file again")
        weights[weight] = _nibbles(infos, weight, name, _state(name, array))
    rows = [name.removesuffix(".SCB") for name in infos if name.endswith(".SCB")]
    if rows or any(name.endswith(_FORMAT) for name in infos):
        rows += _without_scales(infos)
    return complete(infos, weights | {f"{layer}.weight": _rows(infos, layer) for layer in rows}, _ENDINGS)


def _without_scales(infos: Mapping[str, TensorInfo]) -> list[str]:
    """The layers of bytes that have no scales of any kind."""
    layers = [name.removesuffix(".weight") for name, info in infos.items() if info.dtype == "I8"]
    ends = (".SCB", ".weight_scale")
    return [x for x in layers if f"{x}.weight" in infos and infos.keys().isdisjoint(x + end for end in ends)]


def _state(name: str, array: mx.array) -> _State:
    """What the bytes of a quantization state say; CheckpointError if they are nonsense."""
    said = json_object(np.array(array).tobytes(), name)
    kind = said.get("quant_type")
    shape = said.get("shape")
    blocksize = said.get("blocksize")
    if kind not in tuple(_TABLES) or not name.endswith(STATE + kind):
        raise CheckpointError(f"{name} says quant_type {kind!r:.40}")
    if not is_shape(shape):
        raise CheckpointError(f"{name} says shape {shape!r:.40}, which is none of a weight")
    if type(blocksize) is not int or blocksize not in _BLOCKS:
        raise CheckpointError(f"{name} says blocksize {blocksize!r:.40} instead of {_BLOCKS[0]} to {_BLOCKS[-1]}")
    if said.get("dtype") not in _DTYPES:
        raise CheckpointError(f"{name} says dtype {said.get('dtype')!r:.40} instead of one of {', '.join(_DTYPES)}")
    state = _State(kind, tuple(shape), blocksize)
    return state if "nested_blocksize" not in said else _nested(name, said, state)


def _nested(name: str, said: Mapping[str, Any], state: _State) -> _State:
    blocksize = said["nested_blocksize"]
    offset = said.get("nested_offset")
    dtype = said.get("nested_dtype")
    if type(blocksize) is not int or not 0 < blocksize < 2**31:
        raise CheckpointError(f"{name} says nested_blocksize {blocksize!r:.40}")
    if not isinstance(offset, int | float) or isinstance(offset, bool) or not -_MAX_OFFSET < offset < _MAX_OFFSET:
        raise CheckpointError(f"{name} says nested_offset {offset!r:.40}")
    if dtype != "float32":
        raise CheckpointError(f"{name} says nested_dtype {dtype!r:.40} instead of float32")
    return _State(state.kind, state.shape, state.blocksize, blocksize, float(offset))


def _nibbles(infos: Mapping[str, TensorInfo], weight: str, name: str, state: _State) -> Packed:
    """A weight of two values a byte."""
    size = math.prod(state.shape)
    stored = require(infos, weight, ("U8", *FLOAT_CODES))
    if stored.nbytes != (size + 1) // 2:
        raise CheckpointError(f"{weight} has {stored.nbytes} bytes, which is not half of {list(state.shape)}")
    blocks = -(-size // state.blocksize)
    absmax, table, *nested = (weight + ending for ending in _ENDINGS[:4])
    require(infos, table, ("F32",), [(16,)])
    require(infos, absmax, ("U8",) if state.nested_blocksize else FLOAT_CODES, [(blocks,), (blocks, 1)])
    if state.nested_blocksize:
        require(infos, nested[0], ("F32",), [(-(-blocks // state.nested_blocksize),)])
        require(infos, nested[1], ("F32",), [(256,)])
    sources = (weight, table, absmax, *(nested if state.nested_blocksize else ()))
    unpack = partial(_unpack_nibbles, sources, state)
    return Packed(f"bitsandbytes {state.kind}", sources, TensorInfo("F32", state.shape), unpack, (name,))


def _unpack_nibbles(
    names: tuple[str, ...], state: _State, stored: mx.array, table: mx.array, absmax: mx.array, *nested: mx.array
) -> mx.array:
    values = np.array(finite(table, names[1]))
    if not np.allclose(values, _TABLES[state.kind], rtol=0, atol=1e-4):
        raise CheckpointError(f"{names[1]} is not the table of {state.kind}; fetch the file again")
    factors = _unnested(names[3:], state, absmax, *nested) if nested else finite(absmax, names[2], least=0.0)
    scales = np.array(not_all_zero(finite(factors, names[2]), names[2], stored)).reshape(-1)
    with mx.stream(READER):
        data = stored.view(mx.uint8).reshape(-1)
        weight = mx.zeros(2 * data.size)
    mx.eval(data, weight)
    # NumPy finds both values of a byte at once, in the memory of the result.
    pairs = np.stack([np.repeat(values, 16), np.tile(values, 16)], axis=1).view(np.uint64).reshape(-1)
    _fill(np.array(weight, copy=False), np.array(data, copy=False), pairs, scales, state.blocksize)
    with mx.stream(READER):
        return weight[: math.prod(state.shape)].reshape(state.shape)


def _fill(out: np.ndarray, data: np.ndarray, pairs: np.ndarray, scales: np.ndarray, blocksize: int) -> None:
    """Write the two values of each byte, the high nibble's first, times the scale of their block."""
    for start in range(0, data.size, _CHUNK):
        part = out[2 * start : 2 * (start + _CHUNK)]
        np.take(pairs, data[start : start + _CHUNK], out=part.view(np.uint64), mode="clip")
        first = 2 * start // blocksize
        whole = part.size // blocksize
        part[: whole * blocksize].reshape(whole, blocksize)[:] *= scales[first : first + whole, None]
        part[whole * blocksize :] *= scales[min(first + whole, scales.size - 1)]


def _unnested(names: tuple[str, ...], state: _State, absmax: mx.array, scales: mx.array, table: mx.array) -> mx.array:
    """The scales of blocks, which are packed themselves."""
    codes = np.array(absmax).reshape(-1)
    outer = np.repeat(np.array(finite(scales, names[0], least=0.0)), state.nested_blocksize)[: codes.size]
    return mx.array(np.array(finite(table, names[1]))[codes] * outer + np.float32(state.offset))


def _rows(infos: Mapping[str, TensorInfo], layer: str) -> Packed:
    """A weight of bytes, with a scale for each of its rows."""
    weight = f"{layer}.weight"
    scales = f"{layer}.SCB"
    layout = f"{layer}{_FORMAT}"
    stored = require(infos, weight, ("I8",))
    if len(stored.shape) != 2:
        raise CheckpointError(f"{weight} is {list(stored.shape)}, which is no matrix")
    require(infos, scales, FLOAT_CODES, [stored.shape[:1], (stored.shape[0], 1)])
    sources: tuple[str, ...] = (weight, scales)
    if layout in infos:
        require(infos, layout, ("U8",), [(), (1,)])
        sources += (layout,)
    return Packed("bitsandbytes int8", sources, TensorInfo("F32", stored.shape), partial(_unpack_rows, sources))


def _unpack_rows(names: tuple[str, ...], stored: mx.array, scales: mx.array, *layout: mx.array) -> mx.array:
    if layout and (number := int(np.array(layout[0]).item())):
        what = _LAYOUTS[number] if number < len(_LAYOUTS) else str(number)
        raise CheckpointError(f"{names[2]} says {what}, an order for old GPUs; fetch a file that a newer version saved")
    factors = not_all_zero(finite(scales, names[1], least=0.0), names[1], stored).reshape(-1, 1)
    with mx.stream(READER):
        return stored.astype(mx.float32) * factors * _BYTE
