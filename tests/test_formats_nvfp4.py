"""NVFP4, compared with comfy-kitchen's own numbers and with the definition of the format."""

from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.formats import Unpacked, fp8, nvfp4
from helpers.stored import Codes, Stored, marker, said_of, unpacked

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import Files

GOLDEN = Path(__file__).parent / "golden" / "comfy.safetensors"
NAME = "blocks.nvfp4"
SAID = {"a": {"format": "nvfp4"}}
NUMBERS = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
RANDOM = np.random.default_rng(0)


def layer(rows: int = 4, columns: int = 32, **others: object) -> Codes:
    scales = (-(-rows // 128) * 128, -(-columns // 64) * 4)
    return {
        "a.weight": ("U8", RANDOM.integers(0, 256, (rows, columns // 2)).astype(np.uint8)),
        "a.weight_scale": ("F8_E4M3", np.full(scales, 0x38, np.uint8)),  # ones
        "a.weight_scale_2": ("F32", np.float32(0.1)),
        **others,
    }


def test_what_comfy_kitchen_makes():
    files = Files([GOLDEN])
    found = nvfp4.packed(files.infos, files.metadata)
    assert {name: weight.kind for name, weight in found.items()} == {f"{NAME}.weight": "nvfp4"}
    made = np.array(next(Unpacked(files, found).read(found)))
    assert sha256(made.tobytes()).hexdigest() == files.metadata[NAME]


def test_every_number_the_even_one_in_the_upper_half():
    tensors = layer(32, 16, **{"a.weight": ("U8", np.arange(256, dtype=np.uint8).reshape(32, 8))})
    expected = np.stack([NUMBERS.repeat(16), np.tile(NUMBERS, 16)], -1).reshape(32, 16) * np.float32(0.1)
    assert unpacked(tensors, nvfp4.packed, SAID)["a.weight"].tobytes() == expected.tobytes()


def test_scales_lie_in_blocks():
    """Element by element, by cuBLAS's own formula for where a scale is."""
    rows, groups = 300, 6
    codes = RANDOM.integers(1, 0x7F, (384, 8)).astype(np.uint8)
    tensors = layer(rows, 16 * groups, **{"a.weight_scale": ("F8_E4M3", codes)})
    tensors["a.weight"] = ("U8", np.full((rows, 8 * groups), 0x22, np.uint8))  # ones
    made = unpacked(tensors, nvfp4.packed, SAID)["a.weight"][:, ::16]
    values = np.asarray(mx.from_fp8(mx.array(codes.ravel()), mx.float32))
    for row in range(rows):
        for group in range(groups):
            block = row // 128 * (8 // 4) + group // 4
            place = 512 * block + 16 * (row % 32) + 4 * (row % 128 // 32) + group % 4
            assert made[row, group] == values[place] * np.float32(0.1)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_says_it_in_its_header_or_beside_the_layer(prefix):
    tensors = {prefix + name: x for name, x in layer(**{"a.input_scale": ("F32", np.float32(1))}).items()}
    assert set(unpacked(tensors, nvfp4.packed, SAID)) == {f"{prefix}a.weight"}
    tensors[f"{prefix}a.comfy_quant"] = marker(format="nvfp4")
    assert set(unpacked(tensors, nvfp4.packed)) == {f"{prefix}a.weight"}


def test_beside_fp8():
    """As in the text encoders that people have: each family finds its own weights and all else stays."""
    tensors = layer(**{"a.comfy_quant": marker(format="nvfp4"), "b.comfy_quant": marker(format="float8_e4m3fn")})
    tensors |= {"b.weight": ("F8_E4M3", np.zeros((2, 3), np.uint8)), "b.weight_scale": ("F32", np.float32(1))}
    tensors["c.weight"] = ("F32", np.ones(3, np.float32))
    stored = Stored(tensors)
    found = nvfp4.packed(stored.infos, {}) | fp8.packed(stored.infos, {})
    assert {name: weight.kind for name, weight in found.items()} == {"a.weight": "nvfp4", "b.weight": "fp8"}
    assert set(Unpacked(stored, found).infos) == {"a.weight", "b.weight", "c.weight"}


def test_other_formats_are_left_alone():
    tensors: Codes = {
        "bitsandbytes.weight": ("U8", np.zeros((48, 1), np.uint8)),
        "bitsandbytes.weight.absmax": ("F32", np.zeros(2, np.float32)),
        "tekken_model": ("U8", np.zeros(9, np.uint8)),
    }
    assert nvfp4.packed(Stored(tensors).infos, {}) == {}


def without(name: str) -> Codes:
    tensors = layer()
    del tensors[name]
    return tensors


# What is in a file, what its header says of its layers, and the refusal.
PLANS: dict[str, tuple[Codes, object, str]] = {
    "unsaid": (
        layer(),
        None,
        "a.weight looks like NVFP4, and its file does not say so.*; fetch the releaser's .* bf16 one$",
    ),
    "no scale": (without("a.weight_scale"), SAID, "there is no a.weight_scale, which a layer in NVFP4 needs"),
    "no second": (without("a.weight_scale_2"), SAID, "there is no a.weight_scale_2, which a layer in NVFP4 needs"),
    "no second, unsaid": (without("a.weight_scale_2"), None, "there is no a.weight_scale_2, which a layer in NVFP4"),
    "no weight": (without("a.weight"), None, "there is no a.weight, which a layer in NVFP4 needs"),
    "said of none": (without("a.weight"), SAID, "'a' is said to be quantized, and there is no weight of that name"),
    "said of bf16": (
        layer(**{"a.weight": ("BF16", np.zeros((4, 16)))}),
        SAID,
        r"a.weight is BF16 \[4, 16\], which is no",
    ),
    "said to be fp8": (
        layer(),
        {"a": {"format": "float8_e4m3fn"}},
        "is stored as nvfp4, and its file says float8_e4m3fn",
    ),
    "of 12 bytes": (
        layer(**{"a.weight": ("U8", np.zeros((4, 12), np.uint8))}),
        SAID,
        r"a.weight is U8 \[4, 12\], which ",
    ),
    "of nothing": (
        layer(**{"a.weight": ("U8", np.zeros((0, 16), np.uint8))}),
        SAID,
        r"a.weight is U8 \[0, 16\], which ",
    ),
    "in rows": (
        layer(**{"a.weight_scale": ("F8_E4M3", np.zeros((4, 2), np.uint8))}),
        SAID,
        r"a.weight_scale is F8_E4M3 \[4, 2\]; for U8 \[4, 16\] it is F8_E4M3 \[128, 4\], in blocks",
    ),
    "scales in F32": (
        layer(**{"a.weight_scale": ("F32", np.zeros((128, 4)))}),
        SAID,
        r"a.weight_scale is F32 \[128, 4\];",
    ),
    "a second each": (
        layer(**{"a.weight_scale_2": ("F32", np.ones(4))}),
        SAID,
        r"a.weight_scale_2 is F32 \[4\] in place",
    ),
    "a second in BF16": (
        layer(**{"a.weight_scale_2": ("BF16", np.ones(()))}),
        SAID,
        r"a.weight_scale_2 is BF16 \[\] in ",
    ),
    "smoothed": (layer(**{"a.pre_quant_scale": ("F32", np.ones(32))}), SAID, "a.pre_quant_scale can't be read"),
    "rotated": (layer(), {"a": SAID["a"] | {"convrot": True}}, "a is rotated and in nvfp4; only int8_tensorwise can"),
}


@pytest.mark.parametrize("case", PLANS)
def test_what_can_not_be_is_refused_unread(case):
    tensors, layers, message = PLANS[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        nvfp4.packed(Stored(tensors).infos, {} if layers is None else said_of(layers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 0.0, 1e37])
def test_a_second_scale_that_can_not_be(scale):
    with pytest.raises(CheckpointError, match=r"a\.weight_scale_2 holds a scale that is no positive number"):
        unpacked(layer(**{"a.weight_scale_2": ("F32", np.float32(scale))}), nvfp4.packed, SAID)


@pytest.mark.parametrize("code", [0x7F, 0xFF, 0x81, 0xFE])
def test_a_scale_that_can_not_be(code):
    scales = np.zeros((128, 4), np.uint8)
    scales[0, 1] = code  # of the first row
    with pytest.raises(CheckpointError, match=r"a\.weight_scale holds"):
        unpacked(layer(**{"a.weight_scale": ("F8_E4M3", scales)}), nvfp4.packed, SAID)


def test_a_marker_that_says_another_format():
    with pytest.raises(CheckpointError, match=r"a\.weight is stored as nvfp4, and its file says mxfp8"):
        unpacked(layer(**{"a.comfy_quant": marker(format="mxfp8")}), nvfp4.packed)
