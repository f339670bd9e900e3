"""MLX's own quantization: affine of any width, mxfp4, mxfp8 and nvfp4, of mlx-lm, mflux and others."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import READER, TensorInfo

from .checks import FLOAT_CODES, complete, finite, json_object, not_all_zero, require
from .packed import NO_SHAPES, Packed, Shapes

SETTINGS = "quantization"  # the key of a config.json that says it, and of what is added to metadata from there
_MFLUX = ("mflux_version", "quantization_level")
_NOISY = "norm_out.linear.weight"
_NOISE = "norm_out.linear.bias"
_MFLUX_GROUP = 64  # in all of its versions
_BITS = (1, 2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)


class _Form(NamedTuple):
    bits: int
    group: int
    mode: str = "affine"

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group}"


# Without biases, which only one mode has, the columns of scales tell the others apart.
_MODES = (_Form(4, 32, "mxfp4"), _Form(8, 32, "mxfp8"), _Form(4, 16, "nvfp4"))

# The last code of a scale that is a positive number, and makes no larger weights than 1024.
_LAST = {"mxfp4": 134, "mxfp8": 128, "nvfp4": 114}


def packed(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], shapes: Shapes = NO_SHAPES
) -> dict[str, Packed]:
    """The weights that MLX packed, by their names.

    Args:
        infos: what is stored.
        metadata: of the files; where a `config.json` has `quantization`, that as JSON under this name.
        shapes: of weights by their names, as far as they are known.

    Raises:
        CheckpointError: something that belongs to one is missing, left over or wrong, or two forms are possible.
    """
    said = json_object(metadata[SETTINGS].encode(), SETTINGS) if SETTINGS in metadata else {}
    if not said and any(key in metadata for key in _MFLUX):
        said = {"group_size": _MFLUX_GROUP}
    weights = {}
    for weight, info in infos.items():
        layer = weight.removesuffix(".weight")
        if info.dtype == "U32" and layer != weight and not infos.keys().isdisjoint(_beside(layer)):
            weights[weight] = _weight(infos, layer, _settings(said, layer), shapes.get(weight))
    return complete(infos, _without_noise(infos, metadata, weights), ())


def _without_noise(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], weights: dict[str, Packed]
) -> dict[str, Packed]:
    """`weights`, one of them with an unused bias: mflux 0.15 saved random numbers for it, and no FLUX.2 has it."""
    if not metadata.get(_MFLUX[0], "").startswith("0.15.") or not infos.keys() >= {_NOISE, _NOISY}:
        return weights
    plain = Packed(infos[_NOISY].dtype, (_NOISY,), infos[_NOISY], lambda array: array)
    noisy = weights.get(_NOISY, plain)
    return weights | {_NOISY: replace(noisy, unused=(*noisy.unused, _NOISE))}


def _beside(layer: str) -> tuple[str, str]:
    return f"{layer}.scales", f"{layer}.biases"


def _settings(said: Mapping[str, Any], layer: str) -> dict[str, Any]:
    """The settings of a layer: its own, or else those of all layers."""
    own = said.get(layer)
    settings = (
        own if isinstance(own, dict) else {key: said[key] for key in ("bits", "group_size", "mode") if key in said}
    )
    if own is False:
        raise CheckpointError(f"{layer}.weight is quantized, and the config says that it is not")
    for key in ("bits", "group_size"):
        if type(settings.get(key, 0)) is not int:
            raise CheckpointError(f"the config says {key} {settings[key]!r:.40} of {layer}.weight")
    return settings


def _weight(
    infos: Mapping[str, TensorInfo], layer: str, settings: Mapping[str, Any], shape: tuple[int, ...] | None
) -> Packed:
    weight, (scales, biases) = f"{layer}.weight", _beside(layer)
    stored = infos[weight].shape
    factors = require(infos, scales, (*FLOAT_CODES, "U8"))
    if len(stored) < 2 or not all(stored) or factors.shape[:-1] != stored[:-1] or not factors.shape[-1]:
        raise CheckpointError(f"{scales} is {list(factors.shape)}, which does not fit {weight}, {list(stored)}")
    sources: tuple[str, ...] = (weight, scales)
    if factors.dtype == "U8":
        if biases in infos:
            raise CheckpointError(f"{biases} is there, and {scales} is U8, of a form that has none")
    else:
        require(infos, biases, (factors.dtype,), [factors.shape])
        sources += (biases,)
    form = _form(weight, (stored[-1], factors.shape[-1]), factors.dtype == "U8", settings, shape)
    info = TensorInfo("F32", (*stored[:-1], stored[-1] * 32 // form.bits))
    kind = f"MLX {form.bits}-bit" if form.mode == "affine" else f"MLX {form.mode}"
    return Packed(kind, sources, info, partial(_unpack, sources, form))


def _form(
    weight: str, columns: tuple[int, int], is_float: bool, settings: Mapping[str, Any], shape: tuple[int, ...] | None
) -> _Form:
    """The one form that fits the columns of a packed weight and of its scales, and all that is known of it."""
    words, scales = columns
    forms = _MODES if is_float else tuple(_Form(bits, group) for bits in _BITS for group in _GROUPS)
    fitting = [form for form in forms if words * 32 == scales * form.group * form.bits]
    known = {"bits": settings.get("bits"), "group_size": settings.get("group_size"), "mode": settings.get("mode")}
    said = [
        form
        for form in fitting
        if known["bits"] in (None, form.bits)
        and known["group_size"] in (None, form.group)
        and known["mode"] in (None, form.mode)
        and (shape is None or shape[-1] == scales * form.group)
    ]
    if len(said) == 1:
        return said[0]
    if said:
        choice = " or ".join(map(str, said))
        raise CheckpointError(f"{weight} may have {choice}; add the config.json that says its quantization")
    told = "".join(f" with {key} {value!r:.20}" for key, value in known.items() if value is not None)
    raise CheckpointError(f"{weight} has {words} columns for {scales} of scales, which no form of MLX has{told}")


def _numbers(scales: mx.array, form: _Form) -> mx.array:
    """What the codes of scales stand for."""
    if form.mode == "nvfp4":
        return mx.from_fp8(scales, mx.float32)
    return (scales.astype(mx.uint32) << 23).view(mx.float32)


def _unpack(
    names: tuple[str, ...], form: _Form, stored: mx.array, scales: mx.array, biases: mx.array | None = None
) -> mx.array:
    with mx.stream(READER):
        if biases is None:
            if mx.any(scales > _LAST[form.mode]).item():
                raise CheckpointError(f"{names[1]} has values that are no scales; fetch the file again")
            not_all_zero(_numbers(scales, form), names[1], stored)
            return mx.dequantize(stored, scales, None, form.group, form.bits, form.mode, dtype=mx.float32)
        biases = finite(biases, names[2])
        scales = not_all_zero(finite(scales, names[1], largest=2**form.bits), names[1], stored)
        return mx.dequantize(stored, scales, biases, form.group, form.bits)
