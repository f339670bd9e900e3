"""Adapters beside the layers of networks: what they compute is what merged weights would."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.branches import branches, kronecker, linear_shapes, low_rank, merged, on_all
from helpers.checkpoints import SHALLOW_TEXT, SHALLOW_VARIANT, convert
from helpers.mlx_state import randomized
from mlx.utils import tree_flatten, tree_map

from flux2_mlx.adapters import Adapter, BiasDifference, Decomposed, Difference, LowRank, Placed, folded
from flux2_mlx.branches import AtWork, Branches
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.config import TransformerConfig
from flux2_mlx.layers import Linear, adapted
from flux2_mlx.streaming import Reading, load_streamed
from flux2_mlx.transformer import Flux2Transformer, image_ids, rope_table, text_ids

CONFIG = TransformerConfig(1, 1, 2, 64, 32, 16, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)
SHAPES = linear_shapes(Flux2Transformer(CONFIG))


def transformer(dtype: mx.Dtype = mx.float32) -> Flux2Transformer:
    network = randomized(Flux2Transformer(CONFIG))
    network.update(tree_map(lambda x: x.astype(mx.bfloat16), network.parameters()))
    network.set_dtype(dtype)
    return network


def velocity(network: nn.Module, dtype: mx.Dtype = mx.float32) -> mx.array:
    img, txt = (
        mx.random.normal((1, n, C), key=mx.random.key(n)).astype(dtype)
        for n, C in ((12, network.config.in_channels), (7, network.config.joint_attention_dim))
    )
    rope = rope_table(np.concatenate([text_ids(7), image_ids(3, 4)]), network.config)
    return network(img, network.txt_in(txt), mx.array([0.5]), rope)


def relative_error(ours: mx.array, expected: mx.array) -> float:
    ours, expected = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (ours, expected))
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


FIRST, SECOND = on_all(SHAPES), on_all(SHAPES, rank=3, seed=1, scale=2.0)
THIRD = on_all({name: shape for name, shape in SHAPES.items() if "blocks" in name}, kronecker)


@pytest.mark.parametrize(
    ("adapters", "strengths"),
    [([FIRST], [1.0]), ([FIRST], [-0.7]), ([FIRST, SECOND], [0.5, 0.3]), ([FIRST, THIRD, SECOND], [1.0, 0.5, 0.25])],
)
def test_a_network_computes_what_merged_weights_do(adapters, strengths):
    plain, network = velocity(transformer()), transformer()
    ours = velocity(adapted(network, branches(adapters, strengths)))
    expected = velocity(merged(transformer(), adapters, strengths))
    assert relative_error(ours, expected) <= 1e-5
    assert relative_error(plain, expected) > 0.1
    assert mx.array_equal(velocity(network), plain)


def test_adapters_work_in_their_steps():
    network = transformer()
    changing = branches([FIRST, THIRD], [0.25, 0.5], [(2, 3), (3, 4)])
    whole, plain = adapted(network, changing), velocity(network)
    assert changing.has_steps
    assert not branches([FIRST], [1.0]).has_steps
    assert [changing.at(step) for step in (1, 1, 2, 2)] == [True, False, True, False]
    assert mx.array_equal(velocity(whole), velocity(adapted(network, branches([FIRST], [0.25]))))
    assert [changing.at(step) for step in (3, 4)] == [True, True]
    assert relative_error(velocity(whole), velocity(merged(transformer(), [THIRD], [0.5]))) <= 1e-5
    assert changing.at(5)
    # The last block works out all outputs of a layer with branches, and only those that are wanted of others.
    assert relative_error(velocity(whole), plain) <= 1e-6


def test_a_network_that_no_adapter_changes_has_no_branches():
    adapter = Adapter("a", {"transformer": FIRST, "text_encoder": {}})
    assert Branches.of("transformer", [AtWork(adapter)]) is not None
    assert Branches.of("text_encoder", [AtWork(adapter)]) is None
    assert Branches.of("vae", [AtWork(adapter)]) is None


def test_what_an_effect_depends_on_tells_adapters_apart():
    one, two = (Adapter("a", {"transformer": FIRST}, sha256=name) for name in "12")
    uses = [AtWork(one), AtWork(two), AtWork(one, 0.5), AtWork(one, 1.0, (1, 2))]
    assert len({Branches("transformer", [use]).identity for use in uses}) == 4
    assert Branches("transformer", uses[:2]).identity != Branches("transformer", uses[1::-1]).identity


def layer() -> Linear:
    return randomized(Linear(64, 24))


def beside(layer: nn.Module, *adapters: list[Placed], strengths: list[float] | None = None) -> nn.Module:
    changes = [{"x": tuple(placed)} for placed in adapters]
    return branches(changes, strengths or [1.0] * len(adapters)).beside("x", layer)


def thirds(seed: int = 0) -> list[Placed]:
    return [Placed(low_rank(8, 64, seed=seed + row), slice(row, row + 8)) for row in (16, 0, 8)]


@pytest.mark.parametrize(
    "adapters",
    [
        [thirds()],
        [thirds(), thirds(9)],
        [thirds()[:1], [Placed(low_rank(24, 64))]],
        [thirds()[1:], [Placed(low_rank(12, 64), slice(4, 16))], [Placed(low_rank(2, 64), slice(22, None))]],
        [thirds()[:2], [Placed(kronecker(12, 64), slice(6, 18)), Placed(Difference(mx.ones((24, 64))))]],
    ],
)
def test_changes_of_some_outputs_add_up(adapters):
    own, x = layer(), mx.random.normal((2, 5, 64), key=mx.random.key(1))
    weight = folded(own.weight, [placed for changes in adapters for placed in changes])
    assert relative_error(beside(own, *adapters)(x), x @ weight.T) <= 1e-5


def products(monkeypatch) -> list[tuple[tuple[int, ...], ...]]:
    """The shapes of what is multiplied and added at once from now on."""
    seen, added = [], mx.addmm
    monkeypatch.setattr(
        mx, "addmm", lambda *xs, **scales: seen.append(tuple(x.shape for x in xs[:3])) or added(*xs, **scales)
    )
    return seen


def test_low_ranks_of_a_layer_are_one_product_up(monkeypatch):
    own, x, seen = layer(), mx.ones((5, 64)), products(monkeypatch)
    beside(own, thirds(), thirds(9), [Placed(low_rank(24, 64))])(x)
    beside(own.to_quantized(64, 8, "affine"), thirds())(x)
    beside(own, thirds()[::2])(x)
    assert seen == [((5, 24), (5, 64), (64, 24)), ((5, 24), (5, 12), (12, 24)), ((5, 16), (5, 8), (8, 16))]


def test_many_ranks_are_a_product_up_for_the_same_outputs(monkeypatch):
    monkeypatch.setattr("flux2_mlx.low_ranks._MOST_PADDED", 27)
    both, x = beside(layer(), thirds(), thirds(9), [Placed(low_rank(24, 64))]), mx.ones((5, 64))
    seen = products(monkeypatch)
    both(x)
    assert sorted(seen) == [((5, 8), (5, 8), (8, 8))] * 3 + [((5, 24), (5, 4), (4, 24))]


def test_a_step_multiplies_nothing_by_scales(monkeypatch):
    x = mx.ones((5, 64))
    both = beside(layer(), thirds(), [Placed(low_rank(24, 64, scale=0.3))], strengths=[0.5, -2.0])
    both(x)
    for name in ("__mul__", "__rmul__"):
        monkeypatch.setattr(mx.array, name, lambda *_: pytest.fail("multiplied"))
    both(x)


def test_a_bias_is_added():
    own, x = layer(), mx.ones((5, 64))
    bias = [Placed(BiasDifference(mx.arange(12), 0.5), slice(6, 18))]
    expected = mx.concatenate([mx.zeros(6), mx.arange(12) / 4, mx.zeros(6)])
    assert mx.allclose(beside(own, bias, strengths=[0.5])(x) - own(x), expected, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("shape", [(12, 1), (1, 64)])
def test_dora_scales_the_weight_that_the_layer_has(shape, bits, monkeypatch):
    monkeypatch.setattr("flux2_mlx.adapters._SLICE", 5 * 64)
    own, x = layer(), mx.random.normal((5, 64), key=mx.random.key(1))
    own.bias = mx.ones(24)
    weight, rows = own.weight, slice(8, 20)
    if bits is not None:
        own = own.to_quantized(64, bits, "affine")
        weight = mx.dequantize(own.weight, own.scales, own.biases, 64, bits)
    placed = [Placed(Decomposed(low_rank(12, 64), 1 + mx.random.uniform(shape=shape, key=mx.random.key(2))), rows)]
    other = [Placed(low_rank(24, 64, seed=5))]
    ours = beside(own, placed, other, strengths=[0.7, 1.0])(x)
    expected = folded(folded(weight, placed, 0.7), other)
    assert relative_error(ours, x @ expected.T + own.bias) <= 1e-5


def test_dora_has_its_lengths_at_any_scale_but_0():
    own, x = layer(), mx.random.normal((5, 64), key=mx.random.key(1))
    placed = (Placed(Decomposed(low_rank(24, 64), mx.ones((24, 1)))),)
    whole = branches([{"x": placed}], [1.0])
    whole.beside("x", own)
    for scale in (0.5, -2.0, 1.0):
        ours = whole.scaled(scale).beside("x", own)(x)
        scaled = own.weight + scale * placed[0].change.change.weight()
        assert relative_error(ours, x @ (scaled / mx.linalg.norm(scaled, axis=1, keepdims=True)).T) <= 1e-5
        assert mx.array_equal(ours, branches([{"x": placed}], [scale]).beside("x", own)(x))
    assert mx.array_equal(whole.scaled(0.0).beside("x", own)(x), own(x))


def test_lengths_of_rows_are_worked_out_once(monkeypatch):
    asked, ratio = [], Decomposed.ratio
    monkeypatch.setattr(Decomposed, "ratio", lambda *args: asked.append(1) or ratio(*args))
    own, changing = layer(), branches([{"x": (Placed(Decomposed(low_rank(24, 64), mx.ones((24, 1)))),)}], [1.0])
    for _ in range(2):
        changing.beside("x", own)
    assert asked == [1]


def test_what_is_in_memory_is_counted_once():
    one, two = low_rank(24, 64), low_rank(24, 64, seed=1)
    assert branches([{"x": (Placed(one),)}], [1.0]).nbytes == one.nbytes
    assert branches([{"x": (Placed(one),)}, {"x": (Placed(two),), "y": (Placed(one),)}], [1, 1]).nbytes == (
        2 * (one.nbytes + two.nbytes)  # those of `x` side by side besides
    )


def test_what_a_run_with_steps_weighs_anew_is_counted():
    one, two = low_rank(24, 64), low_rank(24, 64, seed=1)
    pair = [AtWork(Adapter(x, {"transformer": {"x": (Placed(form),)}})) for x, form in (("a", one), ("b", two))]
    stepped = Branches("transformer", [replace(pair[0], steps=(1, 2)), pair[1]])
    assert stepped.nbytes - Branches("transformer", pair).nbytes == one.up.nbytes + two.up.nbytes


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_branches_compute_in_the_dtype_of_their_layers(dtype):
    cast = [
        {name: (Placed(changes[0].change.cast(dtype)),) for name, changes in layers.items()}
        for layers in (FIRST, THIRD)
    ]
    ours = velocity(adapted(transformer(dtype), branches(cast, [1.0, 0.5])), dtype)
    expected = velocity(merged(transformer(), [FIRST, THIRD], [1.0, 0.5]))
    assert ours.dtype == dtype
    assert relative_error(ours, expected) <= {mx.float16: 0.003, mx.bfloat16: 0.03}[dtype]


@pytest.mark.parametrize(
    "name", ["double_blocks.0.img_attn.proj", "double_blocks.0.img_mlp.2", "single_blocks.0.linear2"]
)
def test_under_float16_a_bias_is_in_the_units_of_the_stream(name):
    layers = {name: (Placed(BiasDifference(mx.linspace(-30, 30, SHAPES[name][0]))),)}
    exact = velocity(adapted(transformer(), branches([layers], [1.0])))
    half = velocity(adapted(transformer(mx.float16), branches([layers], [1.0])), mx.float16)
    assert relative_error(half, exact) <= 0.003
    assert relative_error(velocity(transformer()), exact) > 0.05


def test_large_values_of_float16_stay_numbers():
    own, x = layer(), mx.full((2, 64), 60000.0).astype(mx.float16)
    own.set_dtype(mx.float16)
    huge = [Placed(LowRank(mx.full((2, 64), 10.0), mx.full((24, 2), 10.0)).cast(mx.float16)), Placed(kronecker(24, 64))]
    assert not mx.isnan(beside(own, huge)(x)).any()


@pytest.mark.parametrize("quant", ["qint8", "qint4"])
def test_beside_packed_weights_the_error_is_that_of_the_packing(quant):
    plain, packed = transformer(), transformer()
    bits = {"qint8": 8, "qint4": 4}[quant]
    nn.quantize(packed, 64, bits, class_predicate=lambda _, x: isinstance(x, Linear) and x.weight.shape[1] % 64 == 0)
    error = relative_error(velocity(packed), velocity(plain))
    ours = velocity(adapted(packed, branches([FIRST], [1.0])))
    assert 0 < relative_error(ours, velocity(merged(plain, [FIRST], [1.0]))) <= 1.5 * error


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("quant", ["bf16", "qint4"])
def test_streamed_blocks_compute_the_same_bits(small_model, quant, resident, tmp_path):
    official = small_model(text=SHALLOW_TEXT)
    folder = convert(official, tmp_path / quant, quant=quant, text_quant="bf16", variant=SHALLOW_VARIANT)
    component = Checkpoint.open(folder).components["transformer"]
    shapes = linear_shapes(replace(component, quantization=None).build())
    dora = {
        name: (Placed(Decomposed(changes[0].change, mx.ones((shapes[name][0], 1)))),)
        for name, changes in on_all(shapes, seed=3).items()
    }
    component = replace(component, adapters=branches([on_all(shapes), dora], [1.0, 0.5]))
    expected = velocity(component.load(mx.float32))
    network = load_streamed(component, mx.float32, resident, Reading())
    assert [mx.array_equal(velocity(network), expected) for _ in range(2)] == [True, True]
    plain = velocity(replace(component, adapters=None).load(mx.float32))
    assert relative_error(plain, expected) > 0.1


def test_a_network_keeps_the_names_of_its_weights():
    network = transformer()
    whole = adapted(network, branches([FIRST], [1.0]))
    assert len(tree_flatten(whole.parameters())) == len(tree_flatten(network.parameters()))
    assert whole.img_in.layer is network.img_in
