"""Which bytes of a file are read for it to be told what it holds."""

import json
import struct
from pathlib import Path

import pytest
from flux2_mlx.convert.formats.outline import pieces
from helpers.headers import write_gguf

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo

STATE = "a.weight.quant_state.bitsandbytes__nf4"


def header(**tensors: list[object]) -> bytes:
    data = json.dumps({name: {"dtype": "U8", "shape": [4], "data_offsets": x} for name, x in tensors.items()}).encode()
    return struct.pack("<Q", len(data)) + data


def test_the_header_and_small_tensors():
    data = header(**{"a.weight": [0, 90], STATE: [90, 94], "tekken_model": [94, 98]})
    end = len(data)
    assert pieces("x.safetensors", data, end + 98) == [(0, end), (end + 90, end + 94)]
    early = pieces("x.safetensors", data, end + 98, ["tekken_model"])
    assert early == [(0, end), (end + 90, end + 94), (end + 94, end + 98)]
    assert pieces("x.safetensors", data[:20], end + 98) == [(0, end)]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        b"\xff" * 8,
        bytes(8),
        struct.pack("<Q", 4) + b"[[]]",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b"\xff" * 9,
        *(header(**{STATE: x}) for x in ([0], [0, -1], [5, 4], ["0", 1], [0, 0.5], [True, 9], [0, 10**18])),
    ],
)
def test_what_is_damaged_is_left_to_who_reads_it(data):
    assert len(pieces("x.safetensors", data, 1000)) == 1
    assert pieces("x.safetensors", data, 1000)[0][1] <= 1000


def test_no_more_than_a_model_has():
    with pytest.raises(CheckpointError, match="says too much of them"):
        pieces("x.safetensors", header(**{STATE: [0, 10**9]}), 10**10)


def test_a_gguf_header_is_asked_for_until_it_is_there(tmp_path: Path):
    infos = {f"blk.{n}.weight": TensorInfo("BF16", (32, 32)) for n in range(40)}
    data = write_gguf(tmp_path / "x.gguf", infos, "Q8_0").read_bytes()
    end = pieces("x.gguf", data, len(data))[0][1]
    assert 0 < end < len(data) - 40 * 1088 + 32
    known = 16
    while (wanted := pieces("x.gguf", data[:known], len(data))[0][1]) > known:
        known = wanted
    assert known == end
    assert pieces("x.gguf", b"GGUF" + b"\xff" * 60, 64)[0][1] <= 64
