"""Weights of 8 bits, compared with comfy-kitchen's own numbers and with the definitions of the formats."""

from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.formats import Unpacked, fp8
from helpers.stored import Codes, Stored, marker, said_of, unpacked

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import Files, TensorInfo

GOLDEN = Path(__file__).parent / "golden" / "comfy.safetensors"
RANDOM = np.random.default_rng(0)
ONE = np.float32(0.5)


def number(code: int, exponent_bits: int) -> float:
    """What a byte stands for, by the definition; infinity and what is no number are None."""
    mantissa_bits, bias = 7 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    sign, exponent, mantissa = code >> 7, code >> mantissa_bits & 2**exponent_bits - 1, code & 2**mantissa_bits - 1
    size = (mantissa / 2**mantissa_bits + bool(exponent)) * 2.0 ** (max(exponent, 1) - bias)
    return -size if sign else size


def codes(*shape: int) -> np.ndarray:
    """Bytes of finite numbers in either dtype."""
    return (RANDOM.integers(0, 0x7C, shape) | RANDOM.integers(0, 2, shape) << 7).astype(np.uint8)


def numbers(values: np.ndarray, exponent_bits: int = 4) -> np.ndarray:
    table = np.array([number(code, exponent_bits) for code in range(256)], np.float32)
    return table[values]


def layer(code: str = "F8_E4M3", *, weight: tuple[int, ...] = (4, 6), **others: object) -> Codes:
    """A layer `a`, with a scale unless `others` say which."""
    return {"a.weight": (code, codes(*weight)), **(others or {"a.weight_scale": ("F32", ONE)})}


def test_what_comfy_kitchen_makes():
    files = Files([GOLDEN])
    found = fp8.packed(files.infos, files.metadata)
    kinds = {name.removeprefix("blocks.").removesuffix(".weight"): weight.kind for name, weight in found.items()}
    assert kinds == {
        "float8_e4m3fn": "fp8",
        "float8_e5m2": "fp8",
        "mxfp8": "mxfp8",
        **dict.fromkeys(("int8", "int8_rows", "convrot_16", "convrot_64"), "int8"),
    }
    plain = Unpacked(files, found)
    for name, array in zip(found, plain.read(found), strict=True):
        made = np.array(array)
        if "convrot" in name:
            expected = next(files.read([f"expected.{name.removesuffix('.weight')}"]))
            assert np.abs(made - np.array(expected)).max() <= 1e-6 * np.abs(made).max()
        else:
            assert sha256(made.tobytes()).hexdigest() == files.metadata[name.removesuffix(".weight")]


@pytest.mark.parametrize(("code", "bits", "largest"), [("F8_E4M3", 4, 0x7E), ("F8_E5M2", 5, 0x7B)])
def test_every_number(code, bits, largest, any_size):
    values = np.array([[x, x | 0x80] for x in range(largest + 1)], np.uint8)
    made = unpacked({"a.weight": (code, values), "a.weight_scale": ("F32", np.ones(()))}, fp8.packed)["a.weight"]
    assert made.tobytes() == numbers(values, bits).tobytes()  # minus zero included
    small = values[np.abs(numbers(values, bits)).max(axis=1) < 32]
    assert len(small) > len(values) / 2
    assert unpacked({"a.weight": (code, small)}, fp8.packed)["a.weight"].tobytes() == numbers(small, bits).tobytes()
    for broken in set(range(256)) - set(values.ravel().tolist()):
        with pytest.raises(CheckpointError, match=r"^a\.weight holds infinity or what is no number"):
            unpacked({"a.weight": (code, np.array([0, broken], np.uint8))}, fp8.packed)


@pytest.mark.parametrize("name", ["a.weight_scale", "a.weight_scale_inv", "a.scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (130,), (130, 1)])
def test_scales(name, shape):
    scales = RANDOM.uniform(0.001, 0.1, shape).astype(np.float32)
    tensors = layer(weight=(130, 258), **{name: ("F32", scales)})
    made = unpacked(tensors, fp8.packed)["a.weight"]
    assert np.array_equal(made, numbers(tensors["a.weight"][1]) * scales.reshape(-1, 1))


@pytest.mark.parametrize("shape", [(256, 384), (130, 258), (129, 1), (96, 300), (320, 128)])
def test_scales_of_blocks(shape):
    scales = RANDOM.uniform(0.001, 0.1, [-(-size // 128) for size in shape]).astype(np.float32)
    tensors = layer(weight=shape, **{"a.weight_scale_inv": ("F32", scales)})
    spread = scales.repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]
    assert np.array_equal(unpacked(tensors, fp8.packed)["a.weight"], numbers(tensors["a.weight"][1]) * spread)


def test_scales_of_16_bits():
    tensors = layer(**{"a.weight_scale": ("F16", np.float16([0.1]))})
    expected = numbers(tensors["a.weight"][1]) * np.float32(np.float16(0.1))
    assert np.array_equal(unpacked(tensors, fp8.packed)["a.weight"], expected)


def test_a_set_without_scales_is_taken_as_it_is():
    tensors = {"x.a.weight": ("F8_E4M3", codes(2, 3) % 0x60), "x.a.bias": ("F8_E5M2", codes(3))}
    tensors |= {"x.norm.scale": ("F8_E4M3", codes(2)), "x.b.weight": ("F16", np.float16([1.5]))}
    made = unpacked(tensors, fp8.packed)
    assert set(made) == set(tensors)
    assert np.array_equal(made["x.a.weight"], numbers(tensors["x.a.weight"][1]))
    assert np.array_equal(made["x.a.bias"], numbers(tensors["x.a.bias"][1], 5))
    assert made["x.b.weight"] == [1.5]


def test_a_mixed_set():
    """Of two parts; what belongs to the weights of 8 bits goes with them and all else stays."""
    tensors: Codes = {"m.scaled_fp8": ("F8_E4M3", np.zeros(2, np.uint8)), "scaled_fp8": ("F32", np.zeros(0))}
    for name in ("m.a", "m.b", "t.c"):
        tensors |= {f"{name}.weight": ("F8_E4M3", codes(2, 3)), f"{name}.scale_weight": ("F32", ONE)}
        tensors |= {f"{name}.scale_input": ("F32", ONE), f"{name}.bias": ("F32", np.ones(2, np.float32))}
    tensors["m.d.weight"] = ("F32", np.ones((2, 3), np.float32))
    plain = {"m.a.weight", "m.b.weight", "t.c.weight", "m.a.bias", "m.b.bias", "t.c.bias", "m.d.weight"}
    assert set(unpacked(tensors, fp8.packed)) == plain


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_a_file_says_of_its_layers(prefix):
    tensors = {prefix + name: tensor for name, tensor in layer().items()}
    assert set(unpacked(tensors, fp8.packed, {"a": {"format": "float8_e4m3fn"}})) == {f"{prefix}a.weight"}
    tensors[f"{prefix}a.comfy_quant"] = marker(format="float8_e4m3fn", full_precision_matrix_mult=True)
    assert set(unpacked(tensors, fp8.packed)) == {f"{prefix}a.weight"}
    assert set(unpacked(tensors, fp8.packed, {"a": {"format": "float8_e4m3fn"}})) == {f"{prefix}a.weight"}


def test_a_marker_tells_of_rotation():
    files = Files([GOLDEN])
    names = ["blocks.convrot_16.weight", "blocks.convrot_16.weight_scale", "expected.blocks.convrot_16"]
    weight, scale, expected = (np.array(x) for x in files.read(names))
    tensors: Codes = {"a.weight": ("I8", weight), "a.weight_scale": ("F32", scale)}
    for parameters in (
        {"convrot": True, "convrot_groupsize": 16},
        {"params": {"convrot": True, "convrot_groupsize": 16}},
    ):
        tensors["a.comfy_quant"] = marker(format="int8_tensorwise", **parameters)
        assert np.allclose(unpacked(tensors, fp8.packed)["a.weight"], expected, rtol=0, atol=1e-6)
    tensors["a.comfy_quant"] = marker(format="int8_tensorwise")
    assert np.array_equal(unpacked(tensors, fp8.packed)["a.weight"], weight * scale)


def test_other_formats_are_left_alone():
    tensors: Codes = {
        "bitsandbytes.weight": ("I8", np.zeros((2, 3), np.int8)),
        "bitsandbytes.SCB": ("F32", np.zeros(2, np.float32)),
        "quanto.weight._data": ("F8_E4M3", codes(2, 3)),
        "quanto.weight._scale": ("F32", np.zeros((2, 1), np.float32)),
        "quanto.input_scale": ("F32", ONE),
        "mlx.weight": ("U32", np.zeros((2, 3), np.uint32)),
        "mlx.scales": ("F32", np.zeros((2, 1), np.float32)),
        "nvfp4.weight": ("U8", codes(2, 8)),
        "nvfp4.weight_scale": ("F8_E4M3", codes(128, 4)),
        "nvfp4.weight_scale_2": ("F32", ONE),
    }
    assert fp8.packed(Stored(tensors).infos, {}) == {}


E4M3, INT8 = {"a": {"format": "float8_e4m3fn"}}, {"a": {"format": "int8_tensorwise"}}
MX = layer(weight=(4, 64), **{"a.weight_scale": ("F8_E8M0", np.full((128, 4), 127, np.uint8))})
BF16: Codes = {"b.weight": ("BF16", np.zeros((2, 3), np.float32))}
I8: Codes = {"a.weight": ("I8", np.ones((2, 24), np.int8)), "a.weight_scale": ("F32", ONE)}
# What is in a file, what its header says of its layers, and the refusal.
PLANS: dict[str, tuple[Codes, object, str]] = {
    "a forgotten scale": (
        layer() | {"b.weight": ("F8_E4M3", codes(2, 2))},
        None,
        "b.weight is F8_E4M3 and has no scale",
    ),
    "a bias without": (
        layer() | {"a.bias": ("F8_E4M3", codes(2))},
        None,
        "a.bias is F8_E4M3 beside weights with scales",
    ),
    "only an input's": (layer(**{"b.input_scale": ("F32", ONE)}), None, "a.weight is F8_E4M3 and has no scale"),
    "marked, unscaled": (layer(scaled_fp8=("F8_E4M3", codes(0))), None, "a.weight is F8_E4M3 and has no scale"),
    "a scale alone": ({"b.weight_scale": ("F32", ONE)}, None, "there is no b.weight, and its file has b.weight_scale"),
    "a scale of bf16": (
        BF16 | {"b.scale_weight": ("F32", ONE)},
        None,
        r"b.weight is BF16 \[2, 3\], and its file has b.sc",
    ),
    "two scales": (
        layer() | {"a.scale_weight": ("F32", ONE), "a.weight_scale": ("F32", ONE)},
        None,
        "has two scales.*; fetch the releaser's .* bf16 one$",
    ),
    "its shape": (
        layer(**{"a.weight_scale": ("F32", np.ones(6))}),
        None,
        r"a.weight_scale is F32 \[6\], which is no.*; fetch the releaser's .* bf16 one$",
    ),
    "its dtype": (layer(**{"a.weight_scale": ("I32", ONE)}), None, r"a.weight_scale is I32 \[\], which is no scale"),
    "none of it": (layer(**{"a.weight_scale": ("F32", np.ones(0))}), None, r"a.weight_scale is F32 \[0\], which is no"),
    "another dtype": (layer("F8_E5M2"), E4M3, "a.weight is stored as float8_e5m2, and its file says float8_e4m3fn"),
    "set of another": (
        layer() | {"scaled_fp8": ("F8_E5M2", codes(0))},
        None,
        "a.weight is F8_E4M3, and scaled_fp8 says F8_E5M2",
    ),
    "set of none": (
        BF16 | {"scaled_fp8": ("F8_E4M3", codes(0))},
        None,
        "scaled_fp8 says that weights are in fp8, and ",
    ),
    "said of bf16": (
        BF16,
        {"b": {"format": "float8_e4m3fn"}},
        r"b.weight is BF16 \[2, 3\], and its file says that it is",
    ),
    "marked bf16": (BF16 | {"b.comfy_quant": marker(format="mxfp8")}, None, "and its file has b.comfy_quant"),
    "said of none": (layer(), E4M3 | {"c": {"format": "mxfp8"}}, "'c' is said to be quantized, and there is no weight"),
    "not said": (
        layer() | {"b.weight": ("F8_E4M3", codes(2, 2)), "b.weight_scale": ("F32", ONE)},
        E4M3,
        "b.weight has a scale, and its file does not name it",
    ),
    "mxfp8 unsaid": (MX, None, "a.weight looks like mxfp8, and its file does not say so"),
    "mxfp8 as fp8": (MX, E4M3, "a.weight is stored as mxfp8, and its file says float8_e4m3fn"),
    "mxfp8 in rows": (
        MX | {"a.weight_scale": ("F8_E8M0", codes(4, 2))},
        {"a": {"format": "mxfp8"}},
        r"a.weight_scale is F8_E8M0 \[4, 2\]; for a weight of \[4, 64\] it is \[128, 4\]",
    ),
    "mxfp8 of 33": (
        MX | {"a.weight": ("F8_E4M3", codes(4, 33))},
        {"a": {"format": "mxfp8"}},
        "scales groups of 32 inp",
    ),
    "int8 unsaid": (
        I8,
        None,
        "a.weight looks like int8_tensorwise, and its file does not say so.*; fetch the releaser's .* bf16 one$",
    ),
    "int8 unscaled": ({"a.weight": I8["a.weight"]}, INT8, "a.weight is I8 and has no scale"),
    "rotated by 16": (I8, {"a": INT8["a"] | {"convrot": True, "convrot_groupsize": 16}}, "in groups of 16, and has 24"),
    "rotated by 8": (I8, {"a": INT8["a"] | {"convrot": True, "convrot_groupsize": 8}}, "groups of 8, which is not one"),
    "rotated by all": (
        I8,
        {"a": INT8["a"] | {"convrot": True, "convrot_groupsize": 4**20}},
        "which is not one of 4, 16",
    ),
    "rotated fp8": (layer(), {"a": E4M3["a"] | {"convrot": True}}, "a is rotated and in float8_e4m3fn; only int8"),
    "rotated maybe": (I8, {"a": INT8["a"] | {"convrot": "yes"}}, "a is rotated in groups of 256"),
    "an unknown format": (
        layer(),
        {"a": {"format": "w4a4"}},
        "a is in format 'w4a4', which is not one of float8_e4m3fn.*; fetch the releaser's .* bf16 one$",
    ),
    "no format": (layer(), {"a": {}}, "a is in format 'None'"),
    "a format in a list": (layer(), {"a": {"format": ["mxfp8"]}}, "a is in format "),
    "a layer of text": (layer(), {"a": "float8_e4m3fn"}, "a is in format 'None'"),
    "layers in a list": (layer(), ["a"], "_quantization_metadata has no table of layers"),
    "a marker of floats": (
        layer() | {"a.comfy_quant": ("F32", np.ones(4))},
        None,
        r"a.comfy_quant is F32 \[4\], which h",
    ),
    "a long marker": (layer() | {"a.comfy_quant": ("U8", codes(5000))}, None, r"a.comfy_quant is U8 \[5000\], which h"),
}


@pytest.mark.parametrize("case", PLANS)
def test_what_can_not_be_is_refused_unread(case):
    tensors, layers, message = PLANS[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        fp8.packed(Stored(tensors).infos, {} if layers is None else said_of(layers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{",
        '{"layers": {}}\n{"layers": {}}',
        '{"layers": {"a": {}, "a": {}}}',
        "[" * 99_999,
        '{"a": NaN}',
    ],
    ids=lambda text: text[:20],
)
def test_metadata_that_says_nothing(text):
    with pytest.raises(CheckpointError, match=r"^_quantization_metadata "):
        fp8.packed(Stored(layer()).infos, {"_quantization_metadata": text})


def test_metadata_of_another_version():
    with pytest.raises(CheckpointError, match=r"is of version '2\.0'; only version 1 can be read"):
        fp8.packed(Stored(layer()).infos, said_of(E4M3, "2.0"))


# What is in a file, and the refusal when it is read.
VALUES: dict[str, tuple[Codes, str]] = {
    **{
        f"a scale of {scale}": (
            layer(**{"a.weight_scale": ("F32", np.float32([scale]))}),
            "a.weight_scale holds a scale ",
        )
        for scale in (np.nan, np.inf, -1.0, -0.0, 0.0, 1e38)
    },
    "one of the rows": (
        layer(**{"a.weight_scale": ("F32", np.float32([1, 1, -1, 1]))}),
        "a.weight_scale holds a scale",
    ),
    "int8": (
        I8 | {"a.weight_scale": ("F32", np.float32(0)), "a.comfy_quant": marker(**INT8["a"])},
        "a.weight_scale holds",
    ),
    "mxfp8": (
        MX | {"a.weight_scale": ("F8_E8M0", np.full((128, 4), 255, np.uint8)), "a.comfy_quant": marker(format="mxfp8")},
        "a.weight_scale holds a scale that is no positive number",
    ),
    "no JSON": (layer() | {"a.comfy_quant": ("U8", codes(9))}, "a.comfy_quant is not JSON"),
    "another layer": (layer() | {"a.comfy_quant": marker(format="nvfp4")}, "as float8_e4m3fn, and its file says nvfp4"),
    "other JSON": (
        layer() | {"a.comfy_quant": ("U8", np.frombuffer(b"[1]", np.uint8))},
        "a.comfy_quant holds no JSON ob",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_can_not_be_are_refused_when_they_are_read(case):
    tensors, message = VALUES[case]
    tensors = {"a.weight_scale": ("F32", ONE)} | tensors
    with pytest.raises(CheckpointError, match=message) as caught:
        unpacked(tensors, fp8.packed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2"])
def test_a_scale_that_makes_no_weights_is_refused(code):
    values = np.float32([[7.5, 0.25], [-3.0, 0]])
    scale = np.float32(7.5 / fp8.LARGEST[code][0])
    dtype = {"F8_E4M3": 4, "F8_E5M2": 5}[code]
    table = np.abs(numbers(np.arange(fp8.LARGEST[code][1] + 1), dtype) - np.abs(values / scale)[..., None])
    stored = (table.argmin(-1) | (values < 0) << 7).astype(np.uint8)
    for shape in ((), (2, 1)):
        given = np.full(shape, scale)
        made = unpacked({"a.weight": (code, stored), "a.weight_scale": ("F32", given)}, fp8.packed)["a.weight"]
        assert made[0, 0] == pytest.approx(7.5)
        for broken in (1 / given, given * 1000):
            with pytest.raises(
                CheckpointError, match=r"^a\.weight_scale (makes weights up|holds a scale that is no).*; fetch"
            ):
                unpacked({"a.weight": (code, stored), "a.weight_scale": ("F32", broken)}, fp8.packed)
    # One is the scale of a row of zeros, and of a set that was cast.
    ones = {"a.weight": (code, np.array([[0, 0], [0x38, 0xB8]], np.uint8)), "a.weight_scale": ("F32", np.ones((2, 1)))}
    assert np.abs(unpacked(ones, fp8.packed)["a.weight"]).max() <= 1


def test_a_marker_and_the_metadata_say_two_things():
    tensors = I8 | {"a.weight": ("I8", np.ones((2, 32), np.int8)), "a.comfy_quant": marker(**INT8["a"])}
    layers = {"a": INT8["a"] | {"convrot": True, "convrot_groupsize": 16}}
    with pytest.raises(CheckpointError, match=r"a\.comfy_quant says another thing than the metadata of its file"):
        unpacked(tensors, fp8.packed, layers)


def test_scales_of_blocks_may_be_as_many_as_rows():
    shape = (128, 128 * 128)
    codes = mx.full(shape, 0x38, mx.uint8)  # 1
    scales = mx.arange(1, 129, dtype=mx.float32).reshape(1, 128)
    infos = {"a.weight": TensorInfo("F8_E4M3", shape), "a.weight_scale": TensorInfo("F32", (1, 128))}
    found = fp8.packed(infos, {})["a.weight"].unpack(codes, scales)
    assert mx.array_equal(found, mx.broadcast_to(mx.repeat(scales, 128, axis=1), shape)).item()


@pytest.mark.parametrize("last", [0x60, 0x77, 0x7E])  # 32, 240 and 448
def test_weights_that_lost_their_scales_are_not_taken_as_they_are(last):
    infos = {"a.weight": TensorInfo("F8_E4M3", (2, 2))}
    with pytest.raises(
        CheckpointError, match=r"^a\.weight holds numbers that only a scale makes weights, and has none; "
    ):
        fp8.packed(infos, {})["a.weight"].unpack(mx.array([[0x38, 0x38], [0x38, last]], mx.uint8))
    norm = unpacked({"a.weight": ("F8_E4M3", np.array([0x38, 0x77], np.uint8))}, fp8.packed)["a.weight"]
    assert norm.tolist() == [1, 240]


def test_a_scale_that_makes_a_layer_zero_is_refused():
    nothing = {"a.weight_scale": ("F32", np.float32(1e-30))}
    with pytest.raises(CheckpointError, match=r"^a\.weight_scale is 0 or nearly so throughout, for no such weight"):
        unpacked({"a.weight": ("F8_E4M3", codes(2, 32)), **nothing}, fp8.packed)
    zero = unpacked({"a.weight": ("F8_E4M3", np.zeros((2, 32), np.uint8)), **nothing}, fp8.packed)["a.weight"]
    assert not zero.any()
