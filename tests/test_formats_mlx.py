"""What MLX packed, compared with its own numbers and with the definition, and with each field broken."""

import json
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.formats import Unpacked, mlx
from helpers.stored import Codes, Stored

from flux2_mlx.errors import CheckpointError

WEIGHT = mx.random.normal((3, 384), key=mx.random.key(0))
CODES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint8: "U8", mx.uint32: "U32"}
MFLUX = {"mflux_version": "0.24.0", "quantization_level": "8"}


def layer(bits: int = 4, group: int = 64, mode: str = "affine", dtype: mx.Dtype = mx.float32, **changes) -> Codes:
    arrays = mx.quantize(WEIGHT.astype(dtype), group, bits, mode)
    ends = {end: (CODES[x.dtype], x) for end, x in zip(("weight", "scales", "biases"), arrays, strict=False)} | changes
    return {f"a.{end}": value for end, value in ends.items() if value is not None}


def said(**settings: object) -> dict[str, str]:
    return {"quantization": json.dumps(settings)}


def unpacked(tensors: Codes, metadata: dict[str, str], shapes: dict[str, tuple[int, ...]] | None = None):
    stored = Stored(tensors)
    plain = Unpacked(stored, mlx.packed(stored.infos, metadata, shapes or {}))
    return dict(zip(plain.infos, plain.read(plain.infos), strict=True))


def defined(tensors: Codes, bits: int, group: int) -> np.ndarray:
    """Values from the lower bits to the upper ones of each row, times their scale, plus their bias."""
    words, scales, biases = (tensors[f"a.{end}"][1].astype(mx.float32) for end in ("weight", "scales", "biases"))
    stored = np.array(tensors["a.weight"][1])
    bytes_ = np.unpackbits(stored.view(np.uint8), axis=1, bitorder="little").reshape(len(words), -1, bits)
    codes = (bytes_ * 2 ** np.arange(bits)).sum(axis=-1).astype(np.float64)
    repeated = (np.repeat(np.array(x).astype(np.float64), group, axis=1) for x in (scales, biases))
    scale, bias = repeated
    return codes * scale + bias


@pytest.mark.parametrize(("bits", "group"), list(product((1, 2, 3, 4, 5, 6, 8), (32, 64, 128))))
def test_affine(bits, group):
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        tensors = layer(bits, group, dtype=dtype)
        (array,) = unpacked(tensors, said(bits=bits, group_size=group)).values()
        expected = defined(tensors, bits, group)
        assert array.dtype == mx.float32
        # A product and a sum are each rounded.
        assert np.abs(np.array(array) - expected).max() <= 2.0**-23 * np.abs(expected).max()


@pytest.mark.parametrize(("mode", "group", "bits"), [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)])
def test_floats_of_few_bits_are_told_by_their_shapes(mode, group, bits):
    tensors = layer(bits, group, mode)
    packed = [value for _, value in tensors.values()]
    expected = mx.dequantize(*packed, None, group, bits, mode, dtype=mx.float32)
    for metadata in ({}, said(mode=mode), said(bits=bits, group_size=group, mode=mode)):
        assert mx.array_equal(unpacked(tensors, metadata)["a.weight"], expected)
    with pytest.raises(CheckpointError, match=r"a\.weight .* with mode 'affine'"):
        unpacked(tensors, said(mode="affine"))


def test_a_form_is_said_or_it_is_the_only_one():
    tensors = layer(8, 32)
    expected = defined(tensors, 8, 32)
    with pytest.raises(CheckpointError, match=r"2 bits in groups of 128 or 4 bits in groups of 64 or 8 bits in groups"):
        unpacked(tensors, {})
    ways = (said(bits=8), said(group_size=32), said(bits=4, a={"bits": 8, "group_size": 32}))
    for array in (*(unpacked(tensors, x) for x in ways), unpacked(tensors, {}, {"a.weight": (3, 384)})):
        assert np.allclose(np.array(array["a.weight"]), expected, atol=1e-6)
    assert unpacked(layer(8, 128), {})["a.weight"].shape == (3, 384)


def test_mflux_has_groups_of_64_of_any_bits():
    for bits in (3, 4, 6, 8):
        tensors = layer(bits, 64, dtype=mx.bfloat16)
        assert np.allclose(np.array(unpacked(tensors, MFLUX)["a.weight"]), defined(tensors, bits, 64), atol=1e-6)


def test_tensors_of_others_stay():
    others = {"b.weight": ("BF16", mx.zeros((2, 2), mx.bfloat16)), "c.weight": ("U32", np.uint32([[1]]))}
    others |= {"d.qweight": ("I32", np.int32([[1]])), "d.scales": ("F16", np.ones((1, 1), np.float16))}
    stored = Stored(layer() | others)
    found = mlx.packed(stored.infos, said(bits=4))
    assert {name: weight.kind for name, weight in found.items()} == {"a.weight": "MLX 4-bit"}


@pytest.mark.parametrize(
    "change",
    [
        {"scales": None},
        {"biases": None},
        {"scales": ("F32", np.ones((3, 5), np.float32))},
        {"scales": ("F32", np.ones((2, 6), np.float32))},
        {"scales": ("F32", np.ones((3, 0), np.float32)), "biases": ("F32", np.ones((3, 0), np.float32))},
        {"scales": ("F32", np.ones(6, np.float32))},
        {"scales": ("I32", np.ones((3, 6), np.int32))},
        {"scales": ("BF16", mx.ones((3, 6), mx.bfloat16))},
        {"scales": ("U8", np.ones((3, 6), np.uint8))},
        {"biases": ("F32", np.ones((3, 5), np.float32))},
        {"biases": ("U8", np.ones((3, 6), np.uint8))},
        {"weight": ("U32", np.ones((3, 47), np.uint32))},
        {"weight": ("U32", np.ones(48, np.uint32))},
        *({end: ("F32", np.full((3, 6), np.nan, np.float32))} for end in ("scales", "biases")),
        *({end: ("F32", np.full((3, 6), np.inf, np.float32))} for end in ("scales", "biases")),
    ],
)
def test_fields_that_are_broken(change):
    with pytest.raises(CheckpointError, match=r"a\.(weight|scales|biases)"):
        unpacked(layer(**change), said(bits=4, group_size=64))


@pytest.mark.parametrize(("mode", "group", "bits", "code"), [("mxfp4", 32, 4, 255), ("nvfp4", 16, 4, 127)])
def test_scales_that_are_no_numbers(mode, group, bits, code):
    scales = ("U8", np.full((3, 384 // group), code, np.uint8))
    with pytest.raises(CheckpointError, match=r"a\.scales has values"):
        unpacked(layer(bits, group, mode, scales=scales), {})


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 90_000,
        *(json.dumps({"bits": 4} | x) for x in ({"bits": "4"}, {"bits": 5}, {"bits": 4.0}, {"group_size": [64]})),
        *(
            json.dumps({"bits": 4} | x)
            for x in ({"mode": "mxfp4"}, {"mode": 1}, {"a": False}, {"a": {"bits": 8, "group_size": 64}})
        ),
    ],
)
def test_settings_that_are_wrong(text):
    with pytest.raises(CheckpointError, match=r"a\.weight|quantization"):
        unpacked(layer(), {"quantization": text})


def test_a_shape_that_does_not_fit():
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        unpacked(layer(), said(bits=4), {"a.weight": (3, 192)})
