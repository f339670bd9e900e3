"""What bitsandbytes packed, compared with its own numbers, and with each field broken."""

import json
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.formats import Unpacked, bitsandbytes
from helpers.stored import Codes, Stored

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import Files

GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes.safetensors"
NF4 = np.float32(bitsandbytes._NF4)
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}
NESTED = {"nested_blocksize": 256, "nested_offset": 0.25, "nested_dtype": "float32"}


def text(value: object) -> tuple[str, np.ndarray]:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return "U8", np.frombuffer(data, np.uint8)


def nibbles(said: object = STATE, **changes: object) -> Codes:
    """A weight of two blocks; `changes` are of tensors by the end of their names, None where there is none."""
    ends = {
        "": ("U8", np.full((64, 1), 0x0F, np.uint8)),
        ".absmax": ("F32", np.float32([1, 2])),
        ".quant_map": ("F32", NF4),
        ".quant_state.bitsandbytes__nf4": text(said),
    } | {end if end in ("",) else f".{end}": value for end, value in changes.items()}
    return {f"a.weight{end}": value for end, value in ends.items() if value is not None}


def nested(**changes: object) -> Codes:
    fields = {
        "absmax": ("U8", np.uint8([3, 255])),
        "nested_absmax": ("F32", np.float32([2])),
        "nested_quant_map": ("F32", np.linspace(-1, 1, 256, dtype=np.float32)),
    }
    return nibbles(STATE | NESTED, **(fields | changes))


def rows(**changes: object) -> Codes:
    ends = {
        "weight": ("I8", np.int8([[-128, 127], [1, 0]])),
        "SCB": ("F32", np.float32([1, 3])),
        "weight_format": ("U8", np.uint8(0)),
    } | changes
    return {f"a.{end}": value for end, value in ends.items() if value is not None}


def unpacked(tensors: Codes) -> dict[str, np.ndarray]:
    stored = Stored(tensors)
    plain = Unpacked(stored, bitsandbytes.packed(stored.infos, {}, stored.read))
    return dict(zip(plain.infos, map(np.array, plain.read(plain.infos)), strict=True))


def test_what_bitsandbytes_makes():
    files = Files([GOLDEN])
    found = bitsandbytes.packed(files.infos, files.metadata, files.read)
    assert len(found) == 7
    assert {weight.kind for weight in found.values()} == {f"bitsandbytes {x}" for x in ("nf4", "fp4", "int8")}
    plain = Unpacked(files, found)
    assert plain.infos.keys() == found.keys()
    for name, array in zip(found, plain.read(found), strict=True):
        assert list(array.shape) == list(plain.infos[name].shape) == json.loads(files.metadata[f"shape of {name}"])
        assert sha256(np.array(array).tobytes()).hexdigest() == files.metadata[f"sha256 of {name}"]


def test_the_first_value_of_a_byte_is_in_its_high_nibble():
    array = unpacked(nibbles())["a.weight"]
    assert np.array_equal(array, np.float32([[-1, 1] * 32, [-2, 2] * 32]))


def test_scales_that_are_packed_themselves():
    array = unpacked(nested())["a.weight"]
    scales = np.linspace(-1, 1, 256, dtype=np.float32)[[3, 255]] * np.float32(2) + np.float32(0.25)
    assert np.array_equal(array, scales[:, None] * np.float32([-1, 1] * 32))


def test_more_than_is_unpacked_at_once(monkeypatch):
    monkeypatch.setattr(bitsandbytes, "_CHUNK", 2048)
    data = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    scales = np.random.default_rng(1).random(157, np.float32)
    said = STATE | {"shape": [3, 3333]}
    array = unpacked(nibbles(said, **{"": ("U8", data[:, None]), "absmax": ("F32", scales)}))["a.weight"]
    values = NF4[np.stack([data >> 4, data & 15], axis=1).reshape(-1)[:9999]]
    assert np.array_equal(array.reshape(-1), values * np.repeat(scales, 64)[:9999])


def test_tensors_of_others_stay():
    others = {"b.weight": ("BF16", mx.zeros((2, 2), mx.bfloat16)), "c.weight": ("I8", np.int8([[1]]))}
    stored = Stored(nibbles() | others)
    found = bitsandbytes.packed(stored.infos, {}, stored.read)
    assert list(found) == ["a.weight"]
    assert Unpacked(stored, found).infos.keys() == {"a.weight", "b.weight", "c.weight"}


def test_bytes_of_rows():
    array = unpacked(rows())["a.weight"]
    by = np.float32(7.874015718698502e-3)
    assert np.array_equal(array, np.float32([[-128 * by, 127 * by], [3 * by, 0]]))
    assert np.array_equal(unpacked(rows(weight_format=None))["a.weight"], array)


@pytest.mark.parametrize(
    "said",
    [
        b"{",
        b"[]",
        b"\xff",
        b"[" * 90_000,
        {},
        *({**STATE, "quant_type": x} for x in ("fp4", "int4", 4, ["nf4"], None)),
        *({**STATE, "blocksize": x} for x in (0, -64, 63, 64.0, True, "64", 10**400, None)),
        *({**STATE, "dtype": x} for x in ("float8", "", 1, None)),
        *({**STATE, "shape": x} for x in ([], [2], [2, -64], [-2, -64], [2.0, 64], [2, 65], [2**40, 2**40], "2", None)),
        {**STATE, **NESTED},
    ],
)
def test_states_that_are_none(said):
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        unpacked(nibbles(said))


@pytest.mark.parametrize(
    "change",
    [{"nested_blocksize": x} for x in (0, -1, 1.0, True, "1", None)]
    + [{"nested_offset": x} for x in ("0", 1e39, 10**400, True, None)]
    + [{"nested_dtype": x} for x in ("float16", None)]
    + [{"nested_blocksize": 1}],
)
def test_nested_states_that_are_none(change):
    state = text(STATE | NESTED | change)
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        unpacked(nested(**{"quant_state.bitsandbytes__nf4": state}))


@pytest.mark.parametrize(
    "change",
    [
        {"": None},
        {"": ("U8", np.zeros((63, 1), np.uint8))},
        {"": ("I8", np.zeros((64, 1), np.int8))},
        {"absmax": None},
        {"absmax": ("F32", np.float32([1]))},
        {"absmax": ("F32", np.float32([1, 2, 3]))},
        {"absmax": ("U8", np.uint8([1, 2]))},
        *({"absmax": ("F32", np.float32([1, x]))} for x in (-1, np.nan, np.inf)),
        {"quant_map": None},
        {"quant_map": ("F32", NF4[:15])},
        {"quant_map": ("F16", NF4.astype(np.float16))},
        {"quant_map": ("F32", NF4[::-1].copy())},
        {"quant_map": ("F32", np.where(NF4 == 0, np.nan, NF4))},
        {"quant_state.bitsandbytes__nf4": None},
        {"quant_state.bitsandbytes__nf4": ("F32", np.float32([1]))},
        {"quant_state.bitsandbytes__nf4": text(b" " * 200_000)},
        {"quant_state.bitsandbytes__fp4": text(STATE | {"quant_type": "fp4"})},
        {"nested_absmax": ("F32", np.float32([1]))},
        {"nested_quant_map": ("F32", np.zeros(256, np.float32))},
    ],
)
def test_fields_that_are_broken(change):
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        unpacked(nibbles(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"absmax": ("F32", np.float32([1, 2]))},
        {"nested_absmax": None},
        {"nested_absmax": ("F32", np.float32([1, 1]))},
        *({"nested_absmax": ("F32", np.float32([x]))} for x in (-1, np.nan, np.inf)),
        {"nested_quant_map": None},
        {"nested_quant_map": ("F32", np.zeros(255, np.float32))},
        {"nested_quant_map": ("F32", np.full(256, np.nan, np.float32))},
    ],
)
def test_nested_fields_that_are_broken(change):
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        unpacked(nested(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"weight": None},
        {"weight": ("U8", np.zeros((2, 2), np.uint8))},
        {"weight": ("I8", np.zeros(2, np.int8))},
        {"SCB": ("F32", np.float32([1]))},
        {"SCB": ("I8", np.int8([1, 2]))},
        *({"SCB": ("F32", np.float32([1, x]))} for x in (-1, np.nan, np.inf)),
        {"weight_format": ("U8", np.uint8(1))},
        {"weight_format": ("U8", np.uint8(200))},
        {"weight_format": ("F32", np.float32(0))},
        {"weight_format": ("U8", np.uint8([0, 0]))},
    ],
)
def test_bytes_of_rows_that_are_broken(change):
    with pytest.raises(CheckpointError, match=r"a\.(weight|SCB)"):
        unpacked(rows(**change))


@pytest.mark.parametrize("beside", [{}, {"SCB": None, "weight_format": ("U8", np.uint8(0))}])
def test_bytes_without_their_scales_are_told(beside):
    stored = rows(**beside) | {"b.weight": ("I8", np.int8([[1, 2]]))}
    with pytest.raises(CheckpointError, match=r"[ab]\.SCB is missing; fetch the file again"):
        unpacked(stored)
