"""Blocks that the networks share."""

import mlx.core as mx
import pytest
from mlx_state import randomized

from flux2_mlx import layers
from flux2_mlx.errors import InputError
from flux2_mlx.layers import Linear, activation_dtype


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [
        *((f"Apple M{number}{kind}", mx.float16) for number in (1, 2) for kind in ("", " Pro", " Max", " Ultra")),
        *((f"Apple M{number}{kind}", mx.bfloat16) for number in (3, 4, 5, 10, 21) for kind in ("", " Pro", " Max")),
        ("Apple Paravirtual device", mx.bfloat16),
        ("Apple A18 Pro", mx.bfloat16),
        ("", mx.bfloat16),
    ],
)
def test_the_chip_decides_what_is_computed_in(chip, dtype, monkeypatch):
    monkeypatch.setattr(layers, "on_metal", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": chip, "architecture": "applegpu_g13s"})
    assert activation_dtype(None) == dtype
    assert activation_dtype("float32") == mx.float32


def test_a_cpu_computes_in_float32(monkeypatch):
    monkeypatch.setattr(layers, "on_metal", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M1"})
    assert activation_dtype(None) == mx.float32


def test_a_dtype_asked_for_is_taken():
    names = ("float32", "bfloat16", "float16")
    assert [activation_dtype(name) for name in names] == [mx.float32, mx.bfloat16, mx.float16]
    with pytest.raises(InputError, match="unknown dtype 'float64'; choose one of float32, bfloat16, float16"):
        activation_dtype("float64")


@pytest.mark.parametrize("rows", [1, 7, 48])
def test_a_narrow_weight_is_widened_some_rows_at_a_time(rows, monkeypatch):
    layer, x = randomized(Linear(64, 48)), mx.random.normal((2, 5, 64))
    layer.weight = layer.weight.astype(mx.bfloat16)
    expected = x @ layer.weight.astype(mx.float32).T
    monkeypatch.setattr(layers, "WIDENED", rows * 64)
    assert layer(x).dtype == mx.float32
    assert mx.allclose(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_widening_takes_no_more_memory_than_it_may(monkeypatch):
    layer, x = randomized(Linear(1024, 4096)), mx.random.normal((1, 1024))
    layer.weight = layer.weight.astype(mx.bfloat16)
    mx.eval(layer.weight, x)
    taken = {}
    for rows in (256, 4096):
        monkeypatch.setattr(layers, "WIDENED", rows * 1024)
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(layer(x))
        taken[rows] = mx.get_peak_memory() - held
        assert taken[rows] <= 4 * rows * 1024 + 2**17
    assert taken[4096] >= 4 * 4096 * 1024
