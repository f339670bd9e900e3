"""Packed weights that are unpacked for many rows: when, how often, with what result, and within what is planned."""

import gc
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.branches import linear_shapes, on_all
from helpers.checkpoints import LARGE_TRANSFORMER, SHALLOW_TEXT, SHALLOW_VARIANT, convert, save_small
from helpers.fake_gpu import pretend
from helpers.mlx_state import randomized

from flux2_mlx import Flux2Pipeline, device, layers
from flux2_mlx.adapters import Adapter
from flux2_mlx.branches import AtWork, Branches
from flux2_mlx.config import VARIANTS, TransformerConfig
from flux2_mlx.device import rows_to_unpack
from flux2_mlx.layers import Linear, QuantizedLinear, adapted, dense, project_to, unpacked
from flux2_mlx.memory import Workload
from flux2_mlx.networks import Networks
from flux2_mlx.text import TextCost
from flux2_mlx.transformer import PLAIN, Execution, Flux2Transformer, image_ids, rope_table, text_ids
from flux2_mlx.transformer.execution import Waits, executions

CONFIG = TransformerConfig(2, 3, 2, 64, 64, 64, axes_dims_rope=(16, 16, 16, 16), guidance_embeds=False)
TEXT, HEIGHT, WIDTH = 7, 5, 8
DENSE = Execution(part=18, dense=True)
KLEIN = VARIANTS["klein-4b"]


def on_chip(monkeypatch, name: str, metal: bool = True) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(device, "on_metal", lambda: metal)
    monkeypatch.setattr(mx, "device_info", lambda *device: {"device_name": name})


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *(("Apple M1", 256), ("Apple M2 Ultra", 256), ("Apple M3 Max", 1024), ("Apple M4 Pro", 1024)),
        *(("Apple M5", math.inf), ("Apple M5 Max", math.inf), ("Apple M10", math.inf), ("Apple M19 Pro", math.inf)),
        *(("Apple A18 Pro", math.inf), ("Apple Paravirtual device", math.inf), ("", math.inf)),
    ],
)
def test_chips_without_matrix_units_unpack_for_many_rows(name, rows, monkeypatch):
    on_chip(monkeypatch, name)
    assert rows_to_unpack() == rows


def test_cards_never_unpack_and_cpus_do_early(monkeypatch):
    assert 1 < rows_to_unpack() <= 64
    on_chip(monkeypatch, "Apple M1", metal=False)
    assert rows_to_unpack() == math.inf


@pytest.fixture
def unpackings(monkeypatch):
    """The packed weights that are unpacked."""
    seen, dequantize = [], mx.dequantize

    def spied(weight, *how, **named):
        seen.append(weight)
        return dequantize(weight, *how, **named)

    monkeypatch.setattr(mx, "dequantize", spied)
    return seen


@pytest.fixture
def gpu(monkeypatch):
    """Have packed layers take this device for a GPU that is faster with dense weights, from 8 rows on."""
    monkeypatch.setattr(layers, "on_gpu", lambda: True)
    monkeypatch.setattr(layers, "rows_to_unpack", lambda: 8)


def packed_layer(bits: int, bias: bool = False) -> QuantizedLinear:
    return randomized(Linear(128, 96, bias)).to_quantized(64, bits, "affine")


def relative_error(a: mx.array, b: mx.array) -> float:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_cpu_unpacks_in_slices(bits, bias, unpackings, monkeypatch):
    monkeypatch.setattr(layers, "UNPACKED", 40 * 128)
    layer, x = packed_layer(bits, bias), mx.random.normal((2, 20, 128), key=mx.random.key(1))
    y = layer(x)
    assert [len(weight) for weight in unpackings] == [40, 40, 16]
    assert relative_error(y, nn.QuantizedLinear.__call__(layer, x)) < 1e-6
    assert mx.array_equal(layer(x[:, :3]), nn.QuantizedLinear.__call__(layer, x[:, :3]))
    assert len(unpackings) == 3


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_cpu_multiplies_in_float32(bits, dtype, rows):
    """Sums in 16 bits would be off by 5 % in bfloat16, and modulations have a single row."""
    layer = randomized(Linear(2048, 64)).to_quantized(64, bits, "affine")
    x = mx.random.uniform(shape=(rows, 2048), key=mx.random.key(1)).astype(dtype)
    y, part = layer(x), project_to(layer, x, slice(16, 48))
    assert y.dtype == part.dtype == dtype
    assert relative_error(y, x.astype(mx.float32) @ dense(layer, mx.float32).T) < 2e-3
    assert relative_error(part, y[:, 16:48]) < 2e-3


def test_a_cpu_unpacks_of_a_layer_what_is_wanted(unpackings):
    layer, x = packed_layer(8), mx.random.normal((40, 128), key=mx.random.key(1))
    assert mx.allclose(project_to(layer, x, slice(16, 48)), layer(x)[:, 16:48], rtol=1e-5, atol=1e-6)
    assert [len(weight) for weight in unpackings] == [32, 96]


@pytest.mark.parametrize("bias", [False, True])
def test_an_unpacked_part_shares_all_else(bias, gpu, unpackings):
    layer, plain = packed_layer(8, bias), randomized(Linear(128, 4))
    part, x = nn.Sequential(plain, layer), mx.random.normal((8, 128))
    assert unpacked(part, x[:7]) is part
    dense = unpacked(part, x)
    assert dense.layers[0] is plain
    assert type(dense.layers[1]) is Linear
    assert type(part.layers[1]) is QuantizedLinear
    assert relative_error(dense.layers[1](x), layer(x)) < 1e-6
    assert len(unpackings) == 1


def packed_transformer(dtype: mx.Dtype = mx.float32) -> Flux2Transformer:
    model = randomized(Flux2Transformer(CONFIG))
    model.set_dtype(dtype)
    nn.quantize(model, 64, 8, class_predicate=lambda name, layer: "blocks." in name and hasattr(layer, "to_quantized"))
    mx.eval(model.parameters())
    return model


def velocity(model: Flux2Transformer, execution: Execution, dtype: mx.Dtype = mx.float32, past: bool = False):
    img, txt = (
        mx.random.normal(shape, key=mx.random.key(1)).astype(dtype)
        for shape in ((1, HEIGHT * WIDTH, 64), (1, TEXT, CONFIG.hidden_size))
    )
    rope = rope_table(np.concatenate([text_ids(TEXT), image_ids(HEIGHT, WIDTH)]), CONFIG)
    seen = model.read(img[:, :20], rope[:20], execution=execution) if past else None
    return model(img, txt, mx.array([0.5]), rope, past=seen, image=24, execution=execution)


def packed_layers(model: nn.Module) -> int:
    return sum(isinstance(layer, QuantizedLinear) for _, layer in model.named_modules())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("waits", Waits)
def test_a_weight_is_unpacked_once_a_block_and_not_once_a_part(waits, dtype, gpu, unpackings, monkeypatch):
    model = packed_transformer(dtype)
    expected = velocity(model, PLAIN, dtype)
    mx.eval(expected)
    assert not unpackings
    got = velocity(model, Execution(18, waits, dense=True), dtype)
    # The text is too short for what a GPU unpacks.
    text = sum("txt_" in name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear))
    assert len(unpackings) == packed_layers(model) - text
    assert len({id(weight) for weight in unpackings}) == len(unpackings)
    assert relative_error(got, expected) < {mx.float32: 1e-5, mx.bfloat16: 2e-2, mx.float16: 2e-3}[dtype]


def test_references_are_read_with_unpacked_weights(gpu, unpackings):
    model = packed_transformer()
    expected = velocity(model, PLAIN, past=True)
    mx.eval(expected)
    assert not unpackings
    assert relative_error(velocity(model, DENSE, past=True), expected) < 1e-5
    assert unpackings


@pytest.mark.parametrize("execution", [PLAIN, DENSE], ids=["packed", "unpacked"])
def test_adapters_run_beside_unpacked_weights(execution, gpu, unpackings):
    adapter = Adapter("a", {"transformer": on_all(linear_shapes(Flux2Transformer(CONFIG)))}, None)
    branches = Branches.of("transformer", [AtWork(adapter)])
    model = packed_transformer()
    plain = velocity(model, PLAIN)
    changed = velocity(adapted(model, branches), execution)
    assert relative_error(changed, plain) > 0.01
    assert (len(unpackings) > 0) == execution.dense
    assert relative_error(changed, velocity(adapted(model, branches), PLAIN)) < 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    source = save_small(path / "official", transformer=LARGE_TRANSFORMER, text=SHALLOW_TEXT)
    return convert(source, path / "ours", quant="qint8", text_quant="qint8", variant=SHALLOW_VARIANT)


@pytest.mark.parametrize("limit", [None, "28MB"])
def test_a_run_unpacks_once_a_block_streamed_or_not(limit, folder, gpu, unpackings, monkeypatch):
    images, counts = [], []
    for execution in (PLAIN, Execution(20, dense=True)):
        monkeypatch.setattr("flux2_mlx.transformer.cost.executions", lambda *_, way=execution: [way])
        pipe = Flux2Pipeline.from_pretrained(
            folder, dtype="float32", prompt_cache=False, keep=False, memory_limit=limit
        )
        output = pipe("a red ring", width=64, height=64, num_inference_steps=2, seed=0, max_sequence_length=40)
        assert any(phase.streamed for phase in output.timings) == (limit is not None)
        images.append(np.asarray(output.images[0]).astype(int))
        counts.append(len(unpackings))
        unpackings.clear()
    text, transformer = (pipe.networks.checkpoint.components[name].config for name in ("text_encoder", "transformer"))
    of_text = 7 * text.num_hidden_layers + 1  # and rows of the embedding
    assert counts == [of_text, of_text + 2 * (8 * transformer.num_layers + 2 * transformer.num_single_layers)]
    assert np.abs(images[0] - images[1]).max() <= 2


def test_ways_with_unpacked_weights_come_first_where_there_are_packed_ones(monkeypatch):
    pretend(monkeypatch)
    for chip, unpacks in (("Apple M3 Max", True), ("Apple M5 Max", False)):
        monkeypatch.setattr("flux2_mlx.transformer.execution.rows_to_unpack", lambda: 1024 if unpacks else math.inf)  # noqa: B023
        plain = list(executions(KLEIN.transformer))
        assert not any(way.dense for way in plain), chip
        packed = list(executions(KLEIN.transformer, True))
        assert [way.dense for way in packed] == [True] * 3 * unpacks + [False] * 3
        assert packed[-3:] == plain


def planned(monkeypatch, quant: str, limit: int):
    pretend(monkeypatch)
    for module in ("device", "layers", "text.cost", "footprints", "transformer.cost", "transformer.execution"):
        for name, value in (("on_gpu", True), ("on_metal", True), ("rows_to_unpack", 512)):
            monkeypatch.setattr(f"flux2_mlx.{module}.{name}", lambda value=value: value, raising=False)
    networks = Networks.open(KLEIN, quant=quant, text_quant=quant, dtype="bfloat16")
    return networks.needs(Workload(1024, 1024, 512)).plan(limit)


def test_the_plan_counts_what_is_unpacked_and_gives_up_nothing_for_it(monkeypatch):
    with monkeypatch.context() as patch:
        free, plain = planned(patch, "qint8", 2**40), planned(patch, "bf16", 2**40)
        assert free.execution.dense
        assert not plain.execution.dense
        D = KLEIN.transformer.hidden_size
        block = 2 * 2 * 13 * D * D  # two streams of 4 matrices and an MLP of 9, in 16 bits
        more = free.phase("transformer").activations - plain.phase("transformer").activations
        assert more == 2 * block  # of two blocks at a time
        needed = free.phase("transformer").peak_memory
        tighter = planned(patch, "qint8", needed - 1)
        assert tighter.execution.dense
        assert tighter.execution.waits is not free.execution.waits
        tightest = planned(patch, "qint8", needed - 2 * block - 1)
        assert tightest.fits
        assert not tightest.phase("transformer").streamed
        streamed = planned(patch, "qint8", 3 * 10**9)
        assert streamed.fits
        assert streamed.phase("transformer").streamed


def test_encoding_counts_a_layer_that_is_unpacked(monkeypatch):
    config = KLEIN.text
    monkeypatch.setattr("flux2_mlx.text.cost.on_gpu", lambda: True)
    monkeypatch.setattr("flux2_mlx.text.cost.rows_to_unpack", lambda: 256)
    costs = [TextCost(config, mx.bfloat16, packed) for packed in (False, True)]
    plain, packed = (cost.encoding(512) for cost in costs)
    assert packed - plain == 2 * 2560 * (2 * (4096 + 1024) + 3 * 9728)
    assert costs[0].encoding(255) == costs[1].encoding(255)
    assert costs[0].reading(512, 0) == costs[1].reading(512, 0) == plain


@pytest.mark.parametrize("quant_bits", [4, 6, 8])
def test_a_layer_of_a_cpu_takes_little_memory(quant_bits):
    layer, x = randomized(Linear(1024, 8192)).to_quantized(64, quant_bits, "affine"), mx.random.normal((64, 1024))
    mx.eval(layer.parameters(), x)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(layer(x))
    assert (
        mx.get_peak_memory() - before
        < 8.5 * layers.UNPACKED + 2 * 64 * 8192 * 4
        < 4 * layer.weight.size * 32 / quant_bits
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_a_cpu_unpacks_all_bits_alike(bits, dtype):
    layer = randomized(Linear(192, 48)).to_quantized(64, bits, "affine")
    parts = [layer.weight, layer.scales.astype(dtype), layer.biases.astype(dtype)]
    assert mx.array_equal(dense(layer, dtype), mx.dequantize(*parts, 64, bits))
    assert mx.array_equal(dense(layer, dtype, slice(7, 9)), dense(layer, dtype)[7:9])
