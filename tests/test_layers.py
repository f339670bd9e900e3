"""Blocks that the networks share."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.mlx_state import randomized
from mlx.utils import tree_flatten

from flux2_mlx import layers
from flux2_mlx.layers import GatedMLP, Linear, adapted


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


class Doubling:
    """Stand-ins for adapters beside every linear layer."""

    nbytes = 0

    def beside(self, name: str, layer: nn.Module) -> nn.Module:
        return nn.Sequential(layer, lambda x: 2 * x) if isinstance(layer, nn.Linear) else layer


def test_what_runs_beside_layers_leaves_them_as_they_are():
    block = randomized(GatedMLP(8, 16))
    names, x = [name for name, _ in tree_flatten(block.parameters())], mx.ones((1, 8))
    before = block(x)
    both = adapted([block, nn.SiLU(), 7], Doubling())
    assert mx.array_equal(both[0](x), 2 * block.down_proj(layers.swiglu(2 * block.gate_proj(x), 2 * block.up_proj(x))))
    assert both[0].down_proj.layers[0] is block.down_proj
    assert type(both[0]) is GatedMLP
    assert both[2] == 7
    assert mx.array_equal(block(x), before)
    assert [name for name, _ in tree_flatten(block.parameters())] == names
    assert adapted(block, None) is block
