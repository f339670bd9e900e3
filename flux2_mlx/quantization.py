"""Which weights are quantized, and how: affine, groups of 64, 8, 6 or 4 bits."""

import math
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .components import COMPONENTS, GROUPS
from .config import QUANTIZATIONS, check_quant
from .errors import CheckpointError, InputError
from .weights import CODES, TensorInfo, Tensors
from .wording import told

GROUP_SIZE = 64
# The most weights that are quantized at one time, so few that a CPU's cache holds them, and the bytes that each takes
# meanwhile, measured.
_SLICE = 512 * 1024
_WORK_BYTES = 13
_PARTS = ("weight", "scales", "biases")
_DTYPES = (mx.uint32, mx.bfloat16, mx.bfloat16)
# Of most layers; `mixed4` has some in `FINER`.
BITS: dict[str, int | None] = dict(zip(QUANTIZATIONS, (None, 8, 6, 4, 4), strict=True))
MIXED = "mixed4"
FINER = 8
# A text encoder in 8 bits is hardly told from bfloat16 and half the size; fewer are for who asks for fewer.
_TEXT_QUANT = {quant: quant if quant != "bf16" else "qint8" for quant in QUANTIZATIONS}


def is_quantizable(component: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape is quantized when its component is."""
    if COMPONENTS[component].group is None:
        return False
    if len(shape) != 2:
        return False  # norms, biases and statistics: a few kB, and they scale whole channels
    return shape[-1] % GROUP_SIZE == 0  # groups lie along a row


def statement(
    quant: str, component: str, layers: Iterable[tuple[str, tuple[int, ...]]], finer: Collection[str] = ()
) -> dict[str, Any] | None:
    """What `config.json` says, in mlx-lm's form: the parameters, those of each layer that has others, and `false` for
    each that is left alone.

    Args:
        quant: one of `QUANTIZATIONS`.
        component: the name of the network.
        layers: the names (without `.weight`) and weight shapes of all linear layers and embeddings.
        finer: the names of those that have `FINER` bits in `mixed4`.
    """
    bits = BITS[quant]
    if bits is None or COMPONENTS[component].group is None:
        return None
    own: dict[str, Any] = {}
    for name, shape in layers:
        if not is_quantizable(component, shape):
            own[name] = False
        elif quant == MIXED and name in finer:
            own[name] = _parameters(FINER)
    return _parameters(bits) | own


def _parameters(bits: int) -> dict[str, Any]:
    return {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}


def check_statement(values: Any) -> None:
    """CheckpointError if `values`, read from a file, are nothing that `statement` gives."""
    if values is None:
        return
    parameters = {"group_size": (GROUP_SIZE,), "bits": (4, 6, 8), "mode": ("affine",)}
    if not isinstance(values, dict):
        raise CheckpointError(f"quantization is {reprlib.repr(values)}, not an object")
    for key, allowed in parameters.items():
        if type(values.get(key)) is not type(allowed[0]) or values[key] not in allowed:
            raise CheckpointError(f"quantization.{key} is {reprlib.repr(values.get(key))}, none of {allowed}")
    expected = "false or of 8 bits" if values["bits"] == BITS[MIXED] else "false"
    for key, value in values.items():
        if key in parameters or value is False or (expected != "false" and _is_finer(value)):
            continue
        raise CheckpointError(f"quantization.{reprlib.repr(key)} is {reprlib.repr(value)}, not {expected}")


def _is_finer(value: Any) -> bool:
    """Whether what a file says of a layer is that it has `FINER` bits."""
    return value == _parameters(FINER) and all(type(number) is not float for number in value.values())


def bits_of(quantization: dict[str, Any], layer: str) -> int:
    """The bits of a layer of a network that is quantized as a `statement` says, if it is quantized."""
    own = quantization.get(layer)
    return int((own if isinstance(own, dict) else quantization)["bits"])


def layer_bits(quantization: dict[str, Any] | None, stored: Iterable[str]) -> dict[str, int]:
    """The bits of each layer that is quantized, of a network whose `stored` tensors have these names."""
    layers = [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]
    return {} if quantization is None else {layer: bits_of(quantization, layer) for layer in layers}


def is_stated(quant: str, quantization: dict[str, Any] | None) -> bool:
    """Whether a network that is quantized as a `statement` says is stored as `quant`."""
    if quantization is None:
        return quant == "bf16"
    finer = any(isinstance(value, dict) for value in quantization.values())
    return quantization["bits"] == BITS[quant] and (quant == MIXED or not finer)


def quant_of(quantization: dict[str, Any] | None) -> str:
    """What a network is stored as that is quantized as a `statement` says."""
    return next(quant for quant in reversed(QUANTIZATIONS) if is_stated(quant, quantization))


def quantize_array(weight: mx.array, bits: int) -> dict[str, mx.array]:
    """`weight` `[rows, columns]` as `weight` (packed uint32), and bfloat16 `scales` and `biases`, evaluated.

    Rows are taken in slices, since the work needs several times the memory of the weight, and each is put into its
    place, since there may be no room for all of them twice.
    """
    rows, columns = weight.shape
    widths = (columns * bits // 32, columns // GROUP_SIZE, columns // GROUP_SIZE)
    made = [mx.zeros((rows, width), dtype) for width, dtype in zip(widths, _DTYPES, strict=True)]
    mx.eval(made)
    places = [_numbers(array) for array in made]
    step = max(1, _SLICE // columns)
    for start in range(0, rows, step):
        pieces = _quantize_rows(weight[start : start + step].astype(mx.float32), bits)
        mx.eval(pieces)
        for place, piece in zip(places, pieces, strict=True):
            place[start : start + step] = _numbers(piece)
    return dict(zip(_PARTS, made, strict=True))


def _numbers(array: mx.array) -> np.ndarray:
    """The memory of an array; NumPy has no bfloat16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def stored_names(name: str, stored: Mapping[str, TensorInfo]) -> list[str]:
    """The tensors that our tensor `name` is kept as, of those that are `stored`."""
    layer = name.removesuffix(".weight")
    return [f"{layer}.{part}" for part in _PARTS] if f"{layer}.scales" in stored else [name]


class Quantized:
    """Tensors in as few bits as they are `stored` in by a `statement`, each quantized when the first of its parts is
    read. CheckpointError then if values are so large that there is no scale for them."""

    def __init__(self, tensors: Tensors, stored: Mapping[str, TensorInfo], quantization: dict[str, Any]):
        self._tensors = tensors
        self._quantization = quantization
        # The largest while little is in memory.
        plain = sorted(tensors.infos, key=lambda name: -tensors.infos[name].nbytes)
        self._plain = {part: name for name in plain for part in stored_names(name, stored)}
        self.infos = {name: stored[name] for name in self._plain}

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        names = list(names)
        plain = self._tensors.read(dict.fromkeys(self._plain[name] for name in names))
        made: dict[str, mx.array] = {}
        for name in names:
            if name not in made:
                made |= self._made(self._plain[name], next(plain))
            yield made.pop(name)

    def _made(self, name: str, array: mx.array) -> dict[str, mx.array]:
        mx.eval(array)  # or the device would wait for the file
        parts = stored_names(name, self.infos)
        if parts == [name]:
            return {name: array}
        bits = bits_of(self._quantization, name.removesuffix(".weight"))
        made = [*quantize_array(array, bits).values()]
        if not all(_are_finite(factors) for factors in made[1:]):
            raise CheckpointError(f"{name} has values too large to be quantized; fetch it again, or give another copy")
        return dict(zip(parts, made, strict=True))


def _are_finite(factors: mx.array) -> bool:
    """Whether all numbers in bfloat16 are finite."""
    return not (_numbers(factors) & 0x7F80 == 0x7F80).any()


def quantizing_bytes(shape: tuple[int, ...]) -> int:
    """What quantizing a bfloat16 weight of `shape` takes, itself included, above what it gives."""
    count = math.prod(shape)
    return mx.bfloat16.size * count + _WORK_BYTES * min(count, max(_SLICE, shape[-1]))


def _quantize_rows(weight: mx.array, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    # MLX rounds the scales to bfloat16 after it has chosen the codes. Choosing them again for the rounded scales
    # takes a fifth off the error of 8 bits.
    _, scales, biases = (x.astype(mx.bfloat16) for x in mx.quantize(weight, group_size=GROUP_SIZE, bits=bits))
    grouped = weight.reshape(*scales.shape, GROUP_SIZE)
    safe_scales = mx.where(scales == 0, 1, scales)[..., None].astype(mx.float32)
    offsets = biases[..., None].astype(mx.float32)
    codes = mx.clip(mx.round((grouped - offsets) / safe_scales), 0, 2**bits - 1).astype(mx.uint8)
    return _packed(codes.reshape(len(weight), -1), bits).view(mx.uint32), scales, biases


def _packed(codes: mx.array, bits: int) -> mx.array:
    """The bytes of codes `[rows, columns]` of one byte each: the first code has the lowest bits."""
    if bits == 8:
        return codes
    if bits == 4:
        pairs = codes.view(mx.uint16)  # the second code of a pair is its higher byte
        return (pairs | pairs >> 4).astype(mx.uint8)
    a, b, c, d = mx.unflatten(codes, 1, (-1, 4)).moveaxis(-1, 0)
    return mx.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], axis=-1).flatten(1)  # four codes in three bytes


def quantize_module(module: nn.Module, quantization: dict[str, Any] | None) -> None:
    """Replace the layers of `module` as `quantization` says; CheckpointError if it is no `statement`."""
    check_statement(quantization)
    if quantization is not None:
        layers = {path for path, layer in module.named_modules() if hasattr(layer, "to_quantized")}
        _check_finer(layers, quantization)
        nn.quantize(
            module,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            mode=quantization["mode"],
            class_predicate=lambda path, layer: hasattr(layer, "to_quantized") and quantization.get(path, True),
        )


def quantized_infos(plain: Mapping[str, TensorInfo], quantization: dict[str, Any]) -> dict[str, TensorInfo]:
    """The tensors of a network after `quantize_module`, of those that it has in 16 bits; counting them takes a tenth of
    the time."""
    check_statement(quantization)
    stored: dict[str, TensorInfo] = {}
    for name, info in plain.items():
        layer, _, kind = name.rpartition(".")
        if kind != _PARTS[0] or len(info.shape) != 2 or quantization.get(layer) is False:
            stored[name] = info
            continue
        rows, columns = info.shape
        if columns % quantization["group_size"]:
            raise ValueError(f"{layer} has {columns} columns, which are no groups of {quantization['group_size']}")
        groups = (rows, columns // quantization["group_size"])
        shapes = ((rows, columns * bits_of(quantization, layer) // 32), groups, groups)
        parts = zip(_PARTS, _DTYPES, shapes, strict=True)
        stored |= {f"{layer}.{part}": TensorInfo(CODES[dtype], shape) for part, dtype, shape in parts}
    _check_finer({name.removesuffix(".scales") for name in stored.keys() - plain.keys()}, quantization)
    return stored


def _check_finer(layers: Collection[str], quantization: dict[str, Any]) -> None:
    """CheckpointError if parameters are those of a layer that is none of these, which can have some."""
    for path, own in quantization.items():
        if isinstance(own, dict) and path not in layers:
            raise CheckpointError(f"quantization.{reprlib.repr(path)} is of no layer of this network")


def usual_text_quant(quant: str) -> str:
    """How the text encoder is stored beside a transformer in `quant` unless something else is asked for."""
    return _TEXT_QUANT[check_quant(quant)]


def wanted_quants(quant: str | None, text_quant: str | None) -> tuple[str, str]:
    """How the transformer and the text encoder are stored of a model in 16 bits; None stands for what is usual.

    Raises:
        InputError: there is no such quantization.
    """
    quant = check_quant(quant or "bf16")
    return quant, check_quant(text_quant or usual_text_quant(quant))


def quants_from(stored: tuple[str, str], quant: str | None, text_quant: str | None) -> tuple[str, str]:
    """What is asked for of a transformer and a text encoder that are `stored` in these quantizations.

    None stands for what is stored, and where a transformer's is given, for what usually goes with that if the text
    encoder is in 16 bits.

    Raises:
        InputError: there is no such quantization.
    """
    own, own_text = stored
    usual = usual_text_quant(quant) if quant is not None and own_text == "bf16" else own_text
    return check_quant(quant or own), check_quant(text_quant or usual)


def check_loadable(stored: tuple[str, str], wanted: tuple[str, str]) -> None:
    """InputError if a transformer and a text encoder that are `stored` in these quantizations can't become what is
    `wanted` while they are loaded."""
    for group, own, other in zip(GROUPS, stored, wanted, strict=True):
        if own not in (other, "bf16"):
            raise InputError(
                f"the {told([group])} is stored as {own}, which can't become {other}; convert the model again"
            )
