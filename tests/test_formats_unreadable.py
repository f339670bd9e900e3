"""Quantizations that are recognised, by names or by a config, and not read, and files with the wrong ending."""

import struct

import pytest
from flux2_mlx.convert.formats import Gguf
from flux2_mlx.convert.formats.unreadable import unreadable
from helpers.listings import KEYS, listing

from flux2_mlx.errors import CheckpointError

LAYER = "transformer_blocks.0.attn.to_q"
ENDS = {
    "SVDQuant for nunchaku": ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up"),
    "DFloat11": ("encoded_exponent", "sign_mantissa", "luts", "gaps", "output_positions", "split_positions"),
    "SDNQ": ("weight", "scale"),
    "HQQ or gemlite": ("W_q", "scales", "zeros"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
    "GPTQ or AWQ": ("qweight", "qzeros", "scales"),
}


@pytest.mark.parametrize("family", ENDS)
def test_by_names(family):
    found = unreadable(["x_embedder.weight", *(f"{LAYER}.{end}" for end in ENDS[family])], {})
    assert found == f"quantized as {family}, which can't be read; fetch a bf16, fp8 or GGUF file of the model"


@pytest.mark.parametrize("end", ["svd_up", "zero_point", "zero_point_scale"])
def test_other_parts_of_sdnq(end):
    assert "SDNQ" in unreadable([f"{LAYER}.{end}"], {})


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"quantization_config": {"quant_method": "sdnq"}}, "SDNQ"),
        ({"quantization_config": {"quant_method": "GPTQ"}}, "GPTQ or AWQ"),
        ({"quantization_config": {"quant_method": "auto-round"}}, "AutoRound"),
        ({"quantization_config": {"method": "svdquant"}}, "SVDQuant for nunchaku"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"dfloat11_config": {"version": "0.2.0"}}, "DFloat11"),
    ],
)
def test_by_a_config(config, family):
    assert f"as {family}," in unreadable([f"{LAYER}.weight"], config)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {"quant_method": []}}])
def test_what_can_be_read_is_not_named(config):
    ends = ("weight", "weight._data", "weight._scale", "weight.absmax", "SCB", "scales", "biases", "weight_scale")
    assert unreadable([f"{LAYER}.{end}" for end in ends], config) is None


def test_no_released_file_is_taken_for_one():
    files = [path.stem for path in KEYS.glob("*.tsv")]
    assert len(files) > 5
    for name in files:
        assert unreadable(listing(name), {}) is None


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (struct.pack("<Q", 99) + b"{", "it is a safetensors file; give it a name that ends in .safetensors"),
        (b"<html><head>", "it is a web page; fetch the file itself, signed in if its repo asks for that"),
        (b"GG", "it begins with b'GG', of 2 bytes, as no GGUF file does; fetch it again"),
    ],
)
def test_what_else_is_named_gguf_is_told(start, reason, tmp_path):
    (tmp_path / "x.gguf").write_bytes(start)
    with pytest.raises(CheckpointError) as caught:
        Gguf([tmp_path / "x.gguf"])
    assert str(caught.value) == f"can't read {tmp_path}/x.gguf as a GGUF file: {reason}"
