"""Unpacked weights become bfloat16 in the memory that they were made in."""

import mlx.core as mx
import numpy as np
from flux2_mlx.convert.formats import Unpacked, fp8, rounded, rounding
from helpers.stored import Stored

RANDOM = np.random.default_rng(0)


def test_values_are_rounded_where_they_are(monkeypatch):
    monkeypatch.setattr(rounding, "_STEP", 2**12)
    codes = RANDOM.integers(0, 0x7E, (256, 4096)).astype(np.uint8)
    stored = Stored(
        {
            "a.weight": ("F8_E4M3", codes),
            "a.weight_scale": ("F32", np.float32(0.1)),
            "b.weight": ("F32", np.float32([[0.1]])),
        }
    )
    tensors = Unpacked(stored, fp8.packed(stored.infos, {}))
    expected = next(tensors.read(["a.weight"])).astype(mx.bfloat16)
    mx.eval(expected)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    found, kept = rounded(tensors).read(["a.weight", "b.weight"])
    assert mx.get_peak_memory() - held < 1.1 * 4 * codes.size  # of float32, alone
    assert found.dtype == mx.bfloat16
    assert mx.array_equal(found.view(mx.uint16), expected.view(mx.uint16))
    assert kept.tolist() == [[np.float32(0.1)]] or kept.dtype == mx.bfloat16
