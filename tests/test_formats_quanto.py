"""What optimum-quanto packed, compared with its own numbers, and with each field broken."""

import json
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.formats import Unpacked, quanto
from helpers.stored import Codes, Stored

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import Files

GOLDEN = Path(__file__).parent / "golden" / "quanto.safetensors"
SHAPES = {"a.weight": (3, 8)}


def rows(**changes: object) -> Codes:
    ends = {"_data": ("I8", np.int8([[-128, 127], [1, 0]])), "_scale": ("F32", np.float32([[1], [3]]))} | changes
    return {f"a.weight.{end}": value for end, value in ends.items() if value is not None}


def groups(**changes: object) -> Codes:
    """A weight of 6 groups of 4 values."""
    ends = {
        "_data._data": ("U8", np.arange(12, dtype=np.uint8).reshape(3, 4) * 17 + 1),
        "_scale": ("F32", np.float32([[1], [2], [3], [4], [5], [6]])),
        "_shift": ("F32", np.float32([[0], [1], [-1], [0.5], [8], [0]])),
    } | changes
    return {f"a.weight.{end}": value for end, value in ends.items() if value is not None}


def unpacked(tensors: Codes, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, np.ndarray]:
    stored = Stored(tensors)
    plain = Unpacked(stored, quanto.packed(stored.infos, {}, shapes))
    return dict(zip(plain.infos, map(np.array, plain.read(plain.infos)), strict=True))


def test_what_quanto_makes():
    files = Files([GOLDEN])
    start = "shape of "
    shapes = {x.removeprefix(start): json.loads(n) for x, n in files.metadata.items() if x.startswith(start)}
    found = quanto.packed(files.infos, files.metadata, {name: tuple(shape) for name, shape in shapes.items()})
    assert {name: weight.kind for name, weight in found.items()} == {
        "qint8.weight": "quanto qint8",
        "qfloat8.weight": "quanto qfloat8_e4m3fn",
        "qfloat8_e5m2.weight": "quanto qfloat8_e5m2",
        "qint4.weight": "quanto qint4",
        "qint2.weight": "quanto qint2",
    }
    plain = Unpacked(files, found)
    assert plain.infos.keys() == found.keys()
    for name, array in zip(found, plain.read(found), strict=True):
        assert list(array.shape) == list(plain.infos[name].shape) == shapes[name]
        assert sha256(np.array(array).tobytes()).hexdigest() == files.metadata[f"sha256 of {name}"]


def test_rows_have_scales_of_any_float():
    expected = np.float32([[-128, 127], [3, 0]])
    for code, dtype in (("F32", mx.float32), ("BF16", mx.bfloat16), ("F16", mx.float16)):
        scale = mx.array([[1], [3]]).astype(dtype)
        assert np.array_equal(unpacked(rows(_scale=(code, scale)))["a.weight"], expected)


def test_the_first_groups_are_in_the_low_nibbles():
    data = (np.arange(12, dtype=np.uint8) * 17 + 1).reshape(3, 4)
    codes = np.concatenate([data & 15, data >> 4]).astype(np.float32)
    scale, shift = (groups()[f"a.weight.{end}"][1] for end in ("_scale", "_shift"))
    assert np.array_equal(unpacked(groups())["a.weight"], (codes * scale - shift).reshape(3, 8))
    zeros = np.uint8([[0], [1], [2], [8], [15], [3]])
    whole = unpacked(groups(_shift=("U8", zeros)))["a.weight"]
    assert np.array_equal(whole, ((codes - zeros) * scale).reshape(3, 8))


def test_two_bits():
    data = np.uint8([[0b11100100, 0b00011011]] * 2)
    ends = {"_data._data": ("U8", data), "_scale": ("F32", np.ones((7, 1), np.float32))}
    array = unpacked(groups(**ends, _shift=("F32", np.zeros((7, 1), np.float32))), {"a.weight": (7, 2)})["a.weight"]
    assert np.array_equal(array, np.float32([[0, 3]] * 2 + [[1, 2]] * 2 + [[2, 1]] * 2 + [[3, 0]]))


def test_scales_of_activations_are_not_used_and_others_stay():
    one = ("F32", np.float32(1))
    tensors = rows() | {"a.input_scale": one, "a.output_scale": one, "b.weight": ("F32", np.ones((2, 2), np.float32))}
    assert unpacked(tensors).keys() == {"a.weight", "b.weight"}


@pytest.mark.parametrize(
    "change",
    [
        {"_data": None},
        {"_data": ("I32", np.int32([[1, 2], [1, 0]]))},
        {"_data": ("I8", np.int8(1))},
        {"_data": ("F8_E4M3", np.uint8([[0x7F, 0], [0, 0]]))},
        {"_data": ("F8_E5M2", np.uint8([[0, 0], [0xFC, 0]]))},
        {"_scale": None},
        {"_scale": ("F32", np.float32([[1]]))},
        {"_scale": ("F32", np.float32([1, 3]))},
        {"_scale": ("F32", np.float32([[1, 3]]))},
        {"_scale": ("I8", np.int8([[1], [3]]))},
        *({"_scale": ("F32", np.float32([[1], [x]]))} for x in (-1, np.nan, np.inf)),
        {"_shift": ("F32", np.float32([[1], [3]]))},
        {"_data._data": ("U8", np.uint8([[1], [3]]))},
    ],
)
def test_rows_that_are_broken(change):
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        unpacked(rows(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"_data._data": None},
        {"_data._data": ("I8", np.zeros((3, 4), np.int8))},
        {"_data._data": ("U8", np.zeros(12, np.uint8))},
        {"_data._data": ("U8", np.zeros((4, 4), np.uint8))},
        {"_data._data": ("U8", np.zeros((3, 3), np.uint8))},
        {"_scale": None},
        {"_scale": ("F32", np.ones((5, 1), np.float32))},
        {"_scale": ("F32", np.ones(6, np.float32))},
        {"_scale": ("U8", np.ones((6, 1), np.uint8))},
        *({"_scale": ("F32", np.full((6, 1), x, np.float32))} for x in (-1, np.nan, np.inf)),
        {"_shift": None},
        {"_shift": ("F32", np.ones((5, 1), np.float32))},
        {"_shift": ("I32", np.ones((6, 1), np.int32))},
        {"_shift": ("I8", np.full((6, 1), -1, np.int8))},
        {"_shift": ("U8", np.full((6, 1), 16, np.uint8))},
        {"_shift": ("F32", np.full((6, 1), np.nan, np.float32))},
    ],
)
def test_groups_that_are_broken(change):
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        unpacked(groups(**change))


def test_a_weight_that_is_there_twice():
    with pytest.raises(CheckpointError, match=r"a\.weight is there twice"):
        unpacked(rows() | {"a.weight": ("F32", np.ones((2, 2), np.float32))})


@pytest.mark.parametrize("shapes", [{}, {"a.weight": (4, 8)}, {"a.weight": (4, 6)}, {"a.weight": (12, 2)}])
def test_a_shape_of_groups_is_known_and_right(shapes):
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        unpacked(groups(), shapes)


def test_groups_too_few_to_tell_their_bits():
    ends = {"_data._data": ("U8", np.zeros((1, 4), np.uint8)), "_scale": ("F32", np.ones((2, 1), np.float32))}
    with pytest.raises(CheckpointError, match="not clearly"):
        unpacked(groups(**ends, _shift=("F32", np.ones((2, 1), np.float32))), {"a.weight": (2, 4)})
