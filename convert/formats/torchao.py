"""torchao: int8 and float8 weights as it flattens them for safetensors."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import READER, TensorInfo

from .checks import FLOAT_CODES, complete, finite, is_shape, json_object, not_all_zero, require
from .fp8 import LARGEST, eight_bits
from .packed import Packed

# Until 0.14 `layer.weight:qdata`, since then `layer._weight_qdata`.
_DATA = re.compile(r"(?P<layer>.*)(?:\._(?P<new>weight)_|\.(?P<old>weight):)qdata", re.DOTALL)
_ENDINGS = ("._weight_qdata", "._weight_scale", "._weight_zero_point", ".weight:qdata", ".weight:scale")
_KINDS = {"Int8Tensor": ("int8", "I8"), "Float8Tensor": ("float8", "F8_E4M3")}
_PLAIN = ":_data"
_INSTEAD = "fetch a bf16, fp8, GGUF or bitsandbytes file, or one that torchao saved as int8 or float8 weights"


def packed(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, Packed]:
    """The weights that torchao packed, by their names; `metadata` says how.

    Raises:
        CheckpointError: something that belongs to one is missing, left over, wrong, or of a kind that can't be read.
    """
    weights: dict[str, Packed] = {}
    for name in infos:
        if match := _DATA.fullmatch(name):
            weight = f"{match['layer']}.weight"
            if weight in weights:
                raise CheckpointError(f"{weight} is there in two forms; remove one of them")
            weights[weight] = _weight(infos, name.removesuffix("qdata"), _described(infos, metadata, weight, name))
        elif name.endswith(_PLAIN) and name.removesuffix(_PLAIN) in metadata:
            weights[name.removesuffix(_PLAIN)] = Packed("torchao", (name,), infos[name], lambda array: array)
    return complete(infos, weights, _ENDINGS)


def _described(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], weight: str, name: str
) -> tuple[str, dict[str, Any]]:
    """Of which kind a weight is, and what is said of it."""
    if weight not in metadata:
        raise CheckpointError(f"{name} is of torchao, but the file's metadata does not say how {weight} is packed")
    said = json_object(metadata[weight].encode(), f"the metadata of {weight}")
    kind = said.get("_type")
    data = said.get("_data")
    if kind not in tuple(_KINDS):
        raise CheckpointError(f"{weight} is torchao's {kind!r:.60}, which can't be read; {_INSTEAD}")
    if not isinstance(data, dict):
        raise CheckpointError(f"the metadata of {weight} does not say how it is packed; fetch the file again")
    _check_parts(infos, name.removesuffix("qdata"), said.get("_tensor_data_names", []), weight)
    return kind, data


def _check_parts(infos: Mapping[str, TensorInfo], start: str, parts: Any, weight: str) -> None:
    """CheckpointError unless all `parts` that a weight is said to have are there, and can be read."""
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise CheckpointError(f"the metadata of {weight} does not say how it is packed; fetch the file again")
    if missing := [part for part in parts if start + part not in infos]:
        raise CheckpointError(f"{start}{missing[0]:.60} is missing; fetch the file again, or one that has it")
    if start + "act_pre_scale" in infos:
        raise CheckpointError(f"{weight} is packed with act_pre_scale, which can't be read; {_INSTEAD}")


def _weight(infos: Mapping[str, TensorInfo], start: str, described: tuple[str, dict[str, Any]]) -> Packed:
    kind, code = _KINDS[described[0]]
    said = described[1]
    names: tuple[str, ...] = (f"{start}qdata", f"{start}scale")
    shape = require(infos, names[0], (code,)).shape
    scales = require(infos, names[1], FLOAT_CODES).shape
    blocks = said.get("block_size")
    if not is_shape(blocks) or scales != _scales(shape, blocks):
        raise CheckpointError(f"{names[1]} is {list(scales)}, which blocks of {blocks!r:.40} in {list(shape)} have not")
    if kind == "int8" and f"{start}zero_point" in infos:
        names += (f"{start}zero_point",)
        require(infos, names[2], ("I8",), [scales])
    unused = tuple(x for x in (f"{start}act_quant_scale", f"{start}act_quant_zero_point") if x in infos)
    return Packed(f"torchao {kind}", names, TensorInfo("F32", shape), partial(_unpack, names, code, shape), unused)


def _scales(shape: tuple[int, ...], blocks: list[int]) -> tuple[int, ...] | None:
    """The shape of the scales of a weight; None if such blocks do not fit."""
    if len(blocks) != len(shape) or any(size % block for size, block in zip(shape, blocks, strict=True)):
        return None
    return tuple(size // block for size, block in zip(shape, blocks, strict=True))


def _unpack(
    names: tuple[str, ...], code: str, shape: tuple[int, ...], data: mx.array, scale: mx.array, *zero: mx.array
) -> mx.array:
    factors = not_all_zero(finite(scale, names[1], least=0.0, largest=2 * LARGEST[code][0]), names[1], data)
    with mx.stream(READER):
        values = eight_bits(names[0], code, data)
        # A dimension becomes two, of blocks and of what is in them, so that scales fit by themselves.
        split = [n for size, count in zip(shape, factors.shape, strict=True) for n in (count, size // count)]
        apart = [n for count in factors.shape for n in (count, 1)]
        values = values.reshape(split)
        if zero:
            values = values - zero[0].astype(mx.float32).reshape(apart)
        return (values * factors.reshape(apart)).reshape(shape)
