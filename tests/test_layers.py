"""Blocks that the networks share."""

import mlx.core as mx
import pytest
from helpers.mlx_state import randomized

from flux2_mlx import layers
from flux2_mlx.layers import Linear


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
