"""Scales that were lost, in formats that keep them among the codes or as codes: 0 or nearly so throughout a weight."""

import gguf as library
import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.formats import blocks as block_types
from test_formats_gguf import NAME, Type, blocks, read, write
from test_formats_mlx import layer, unpacked

from flux2_mlx.errors import CheckpointError

# Where the scale of a block is, in bytes.
HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,), "TQ2_0": (64,)}
LOST = r"has scales that are 0 or nearly so throughout, for no such weight; fetch the file again"


def without_scales(kind: str, rows: int = 4, values: int = 512) -> np.ndarray:
    stored = blocks(kind, rows, values)
    each = stored.reshape(-1, library.GGML_QUANT_SIZES[Type[kind]][1])
    for start in HALVES[kind]:
        each[:, start : start + 2] = 0
    return stored


@pytest.mark.parametrize("kind", HALVES)
def test_a_block_without_its_scale(kind, tmp_path):
    with pytest.raises(CheckpointError, match=LOST):
        read(write(tmp_path / "a.gguf", {NAME: (kind, without_scales(kind))}))


def test_exponents_that_are_faint(tmp_path):
    stored = blocks("MXFP4", 4, 512)
    stored.reshape(-1, 17)[:, 0] = 20
    with pytest.raises(CheckpointError, match=LOST):
        read(write(tmp_path / "a.gguf", {NAME: ("MXFP4", stored)}))


def test_zeros_are_a_weight(tmp_path):
    """All of which are stored alike, and some of which any weight may have."""
    zeros = library.quants.quantize(np.zeros((4, 512), np.float32), Type.Q4_0)
    assert not np.asarray(read(write(tmp_path / "a.gguf", {NAME: ("Q4_0", zeros)}))).any()
    some = without_scales("Q4_0")
    some[3] = library.quants.quantize(np.ones((1, 512), np.float32), Type.Q4_0)
    assert np.asarray(read(write(tmp_path / "b.gguf", {NAME: ("Q4_0", some)})))[3].all()


def test_pieces_that_are_read_apart_are_one_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(block_types, "_JOB", 512)
    lost = without_scales("Q4_0")
    lost[0] = lost[0, :18].tolist() * 16
    with pytest.raises(CheckpointError, match=LOST):
        read(write(tmp_path / "a.gguf", {NAME: ("Q4_0", lost)}))
    lost[0] = library.quants.quantize(np.ones((1, 512), np.float32), Type.Q4_0)
    read(write(tmp_path / "b.gguf", {NAME: ("Q4_0", lost)}))


@pytest.mark.parametrize(
    ("mode", "group", "bits", "code"),
    [("mxfp4", 32, 4, 0), ("mxfp4", 32, 4, 80), ("mxfp8", 32, 8, 0), ("nvfp4", 16, 4, 0)],
)
def test_modes_of_mlx_without_biases(mode, group, bits, code):
    scales = np.full((3, 384 // group), code, np.uint8)
    with pytest.raises(CheckpointError, match=r"a\.scales is 0 or nearly so throughout"):
        unpacked(layer(bits, group, mode, scales=("U8", scales)), {})
    scales[1, 2] = 118 if group == 32 else 56
    (array,) = unpacked(layer(bits, group, mode, scales=("U8", scales)), {}).values()
    assert mx.any(array[1] != 0).item()
    zeros = {"scales": ("U8", np.zeros_like(scales)), "weight": ("U32", np.zeros((3, 384 * bits // 32), np.uint32))}
    (array,) = unpacked(layer(bits, group, mode, **zeros), {}).values()
    assert not mx.any(array).item()
