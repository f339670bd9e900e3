"""What torchao packed, compared with its own numbers, and with each field broken."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from flux2_mlx.convert.formats import Unpacked, torchao
from helpers.stored import Codes, Stored

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import Files

GOLDEN = Path(__file__).parent / "golden" / "torchao.safetensors"
SAID = {"_type": "Int8Tensor", "_data": {"block_size": [1, 2]}, "_tensor_data_names": ["zero_point", "qdata", "scale"]}


def layer(start: str = "a._weight_", **changes: object) -> Codes:
    ends = {
        "qdata": ("I8", np.int8([[-128, 127, 1, 2], [1, 0, 3, 4]])),
        "scale": ("F32", np.float32([[1, 3], [2, 0.5]])),
        "zero_point": ("I8", np.int8([[0, 1], [-1, 2]])),
    } | changes
    return {start + end: value for end, value in ends.items() if value is not None}


def unpacked(tensors: Codes, said: object = SAID) -> dict[str, np.ndarray]:
    stored, text = Stored(tensors), said if isinstance(said, str) else json.dumps(said)
    plain = Unpacked(stored, torchao.packed(stored.infos, {} if said is None else {"a.weight": text}))
    return dict(zip(plain.infos, map(np.array, plain.read(plain.infos)), strict=True))


def test_what_torchao_makes():
    files = Files([GOLDEN])
    found = torchao.packed(files.infos, files.metadata)
    assert {name: weight.kind for name, weight in found.items()} == {
        "int8.weight": "torchao int8",
        "int8_groups.weight": "torchao int8",
        "float8.weight": "torchao float8",
        "float8_tensor.weight": "torchao float8",
    }
    plain = Unpacked(files, found)
    assert plain.infos.keys() == found.keys()
    for name, array in zip(found, plain.read(found), strict=True):
        assert list(array.shape) == list(plain.infos[name].shape) == json.loads(files.metadata[f"shape of {name}"])
        assert sha256(np.array(array).tobytes()).hexdigest() == files.metadata[f"sha256 of {name}"]


@pytest.mark.parametrize("start", ["a._weight_", "a.weight:"])
def test_blocks_have_scales_and_zeros(start):
    array = unpacked(layer(start))["a.weight"]
    assert np.array_equal(array, np.float32([[-128, 127, 0, 3], [4, 2, 0.5, 1]]))


def test_plain_tensors_of_older_files():
    one = ("F32", np.ones(2, np.float32))
    stored = Stored({"n.weight:_data": one, "b.weight": one})
    plain = Unpacked(stored, torchao.packed(stored.infos, {"n.weight": '{"_type": "Tensor"}'}))
    assert plain.infos.keys() == {"n.weight", "b.weight"}
    assert np.array_equal(next(plain.read(["n.weight"])), one[1])


@pytest.mark.parametrize(
    "said",
    [
        None,
        "{",
        "[]",
        "[" * 90_000,
        {},
        *(
            {**SAID, "_type": x}
            for x in ("Int4Tensor", "NVFP4Tensor", "MXTensor", "Float8Tensor", "os.system", 1, ["x"])
        ),
        *({**SAID, "_data": x} for x in (None, [], {}, {"block_size": None}, {"block_size": [2]})),
        *({**SAID, "_data": {"block_size": x}} for x in ([1, 4], [2, 4], [1, 3], [0, 2], [1, -2], [1, 2.0], "12")),
        *({**SAID, "_tensor_data_names": x} for x in (["qdata", "scale", "act_pre_scale"], 1, None, [1], "qdata")),
    ],
)
def test_descriptions_that_are_wrong(said):
    with pytest.raises(CheckpointError, match=r"a\.(_weight_|weight)"):
        unpacked(layer(), said)


@pytest.mark.parametrize(
    "change",
    [
        {"qdata": None},
        {"qdata": ("U8", np.zeros((2, 4), np.uint8))},
        {"qdata": ("I8", np.zeros((2, 5), np.int8))},
        {"scale": None},
        {"scale": ("F32", np.ones((2, 1), np.float32))},
        {"scale": ("I8", np.ones((2, 2), np.int8))},
        *({"scale": ("F32", np.full((2, 2), x, np.float32))} for x in (-1, np.nan, np.inf)),
        {"zero_point": None},
        {"zero_point": ("I8", np.zeros((2, 1), np.int8))},
        {"zero_point": ("F32", np.zeros((2, 2), np.float32))},
    ],
)
def test_fields_that_are_broken(change):
    with pytest.raises(CheckpointError, match=r"a\._weight_"):
        unpacked(layer(**change))


def test_scales_of_activations():
    one = ("F32", np.ones((1, 4), np.float32))
    assert unpacked(layer(act_quant_scale=one)).keys() == {"a.weight"}
    with pytest.raises(CheckpointError, match="act_pre_scale, which can't be read"):
        unpacked(layer(act_pre_scale=one))


def test_floats_that_are_none():
    said = SAID | {"_type": "Float8Tensor", "_tensor_data_names": ["qdata", "scale"]}
    change = {"qdata": ("F8_E4M3", np.full((2, 4), 0x7F, np.uint8)), "zero_point": None}
    change["scale"] = ("F32", np.ones((2, 2), np.float32))
    with pytest.raises(CheckpointError, match=r"a\._weight_qdata"):
        unpacked(layer(**change), said)


@pytest.mark.parametrize("other", [layer("a.weight:"), {"a.weight": ("F32", np.ones((2, 4), np.float32))}])
def test_a_weight_that_is_there_twice(other):
    with pytest.raises(CheckpointError, match=r"a\.weight is there"):
        unpacked(layer() | other)
