"""Tensors in memory as a file has them, and what a format makes of them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping

import mlx.core as mx
import numpy as np
from flux2_mlx.convert.formats import Packed, Unpacked

from flux2_mlx.weights import TensorInfo

Codes = dict[str, tuple[str, np.ndarray | mx.array]]  # the dtype of a file and the values, bytes for floats of 8 bits


class Stored:
    def __init__(self, tensors: Codes):
        self._arrays = {name: mx.array(values) for name, (_, values) in tensors.items()}
        self.infos = {name: TensorInfo(code, self._arrays[name].shape) for name, (code, _) in tensors.items()}

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        return (self._arrays[name] for name in names)


def unpacked(
    tensors: Codes,
    packed: Callable[[Mapping[str, TensorInfo], Mapping[str, str]], dict[str, Packed]],
    layers: Mapping[str, object] | None = None,
) -> dict[str, np.ndarray]:
    """All that there is then, read, given what the file's header says of its layers."""
    stored = Stored(tensors)
    metadata = {} if layers is None else said_of(layers)
    plain = Unpacked(stored, packed(stored.infos, metadata))
    arrays = dict(zip(plain.infos, plain.read(plain.infos), strict=True))
    assert {name: info.shape for name, info in plain.infos.items()} == {name: x.shape for name, x in arrays.items()}
    return {name: np.array(x.astype(mx.float32)) for name, x in arrays.items()}


def said_of(layers: object, version: object = "1.0") -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": version, "layers": layers})}


def marker(**values: object) -> tuple[str, np.ndarray]:
    """A tensor that says what a layer is."""
    return "U8", np.frombuffer(json.dumps(values).encode(), np.uint8)


def in_groups(shape: tuple[int, int], size: int = 32) -> tuple[dict[str, mx.array], mx.array]:
    """What quanto stores of a weight in 4 bits, which is no shape, and the weight."""
    data = mx.random.randint(0, 256, (shape[0] * shape[1] // size // 2, size), key=mx.random.key(3)).astype(mx.uint8)
    codes = mx.concatenate([data & 15, data >> 4]).astype(mx.float32)
    scale = mx.full((len(codes), 1), 0.125)
    return {"_data._data": data, "_scale": scale, "_shift": 8 * scale}, ((codes - 8) * scale).reshape(shape)
