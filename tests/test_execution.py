"""The ways in which a pass of the transformer is computed: what each takes and gives, and which one a plan chooses."""

import gc
import re
from dataclasses import replace

import count_step
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import fake_gpu
from helpers.fake_gpu import pretend
from helpers.mlx_state import randomized
from PIL import Image

from flux2_mlx import Flux2Pipeline, device, layers
from flux2_mlx.config import VARIANTS, TransformerConfig
from flux2_mlx.layers import OPERATIONS_PER_CHUNK, Linear, project_sum, project_to
from flux2_mlx.memory import PhasePlan, Plan, Workload
from flux2_mlx.metering import limits
from flux2_mlx.networks import Networks
from flux2_mlx.transformer import Flux2Transformer, TransformerCost, blocks, image_ids, kernel, rope_table, text_ids
from flux2_mlx.transformer.execution import PLAIN, TOKENS_PER_PART, Execution, Waits, executions

RELEASED = [name for name, variant in VARIANTS.items() if variant.repo]
KLEIN = VARIANTS["klein-4b"].transformer
SMALL = TransformerConfig(2, 3, 2, 64, 32, 16, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)
TEXT, HEIGHT, WIDTH, OWN = 7, 5, 8, 24
ROUNDING = {mx.float32: 1e-6, mx.bfloat16: 1e-2, mx.float16: 1e-3}


def fastest(monkeypatch, config: TransformerConfig = KLEIN, metal: bool = True) -> Execution:
    with monkeypatch.context() as patch:
        pretend(patch, metal)
        return next(executions(config))


@pytest.mark.parametrize(
    ("side", "waits", "kernels", "gigabytes"), [(512, 177, 938, 10.2), (1024, 339, 2325, 31.2)], ids=str
)
def test_what_a_step_takes_on_a_gpu(side, waits, kernels, gigabytes, monkeypatch):
    """Counted in the full geometry of klein-4b: before, and in a way of a GPU."""
    before = fake_gpu.count_step(monkeypatch, KLEIN, side, PLAIN)
    assert (before.waits, before.kernels, round(before.nbytes / 1e9, 1)) == (waits, kernels, gigabytes)
    after = fake_gpu.count_step(monkeypatch, KLEIN, side, fastest(monkeypatch))
    print(before, after)
    blocks_of_it = KLEIN.num_layers + KLEIN.num_single_layers
    assert (after.waits, after.kernels) == (blocks_of_it, 320)
    assert after.asked > blocks_of_it
    assert after.nbytes < 0.53 * before.nbytes
    by_block = fake_gpu.count_step(monkeypatch, KLEIN, side, replace(fastest(monkeypatch), waits=Waits.BLOCKS))
    assert by_block.waits == blocks_of_it


def test_the_table_of_what_a_step_takes():
    assert re.fullmatch(
        r"\| demo \| 64² \| (\d+) → (\d+) \| (\d+) → (\d+) \| \S+ → \S+ \|", count_step.row("demo", 64, "M3 Max")
    )


def test_a_cpu_has_one_way():
    assert list(executions(KLEIN)) == [PLAIN]


@pytest.mark.parametrize("name", RELEASED)
def test_no_product_of_a_gpu_is_long(name, monkeypatch):
    """Or macOS would stop it; and no way takes smaller parts than memory asks for."""
    pretend(monkeypatch)
    config = VARIANTS[name].transformer
    ways = list(executions(config))
    for way in ways:
        product = 2 * way.part * config.hidden_size * (3 * config.hidden_size + 2 * config.mlp_hidden_size)
        assert product <= OPERATIONS_PER_CHUNK
        assert way.part >= TOKENS_PER_PART
    assert [way.waits for way in ways] == [Waits.BEFORE, Waits.BLOCKS, Waits.PARTS]
    assert ways[-1].part == TOKENS_PER_PART


@pytest.mark.parametrize(("chip", "part"), [("Apple M1", 1471), ("Apple M3 Max", 8036), ("Apple M99", 2263)])
def test_faster_chips_take_larger_parts(chip, part, monkeypatch):
    """In as much time as the slowest one takes for its own."""
    pretend(monkeypatch)
    monkeypatch.setattr(device, "chip", lambda: chip)
    assert next(executions(VARIANTS["dev"].transformer)).part == pytest.approx(part, rel=1e-3)


def test_columns_of_a_weight_are_no_copy_on_metal_alone(monkeypatch):
    assert fastest(monkeypatch).summed
    assert not fastest(monkeypatch, metal=False).summed


def planned(monkeypatch, limit: int) -> Plan:
    pretend(monkeypatch)
    networks = Networks.open(VARIANTS["klein-4b"], dtype="bfloat16")
    return networks.needs(Workload(1024, 1024, 512)).plan(limit)


def test_a_plan_gives_up_nothing_for_the_fastest_way(monkeypatch):
    free = planned(monkeypatch, 2**40)
    assert free.execution == fastest(monkeypatch)
    needed = free.phase("transformer").peak_memory
    assert planned(monkeypatch, needed).execution == free.execution
    tight = planned(monkeypatch, needed - 1)
    assert tight.execution.waits is Waits.BLOCKS
    assert 1.4e9 < needed - tight.phase("transformer").peak_memory < 1.7e9
    tightest = planned(monkeypatch, tight.phase("transformer").peak_memory - 1)
    assert (tightest.execution.part, tightest.execution.waits) == (TOKENS_PER_PART, Waits.PARTS)
    assert all(plan.fits and not plan.phase("transformer").streamed for plan in (free, tight, tightest))


@pytest.mark.parametrize("gigabytes", [1, 2, 3, 5])
def test_streamed_blocks_are_waited_for(gigabytes, monkeypatch):
    streamed = planned(monkeypatch, gigabytes * 10**9)
    assert streamed.phase("transformer").streamed
    assert streamed.execution.blocks == 1
    monkeypatch.setattr("flux2_mlx.transformer.cost.executions", lambda *_: [streamed.execution])
    assert planned(monkeypatch, gigabytes * 10**9).phase("transformer") == streamed.phase("transformer")


def velocity(execution: Execution, dtype: mx.Dtype, image: int | None = None, past: bool = False) -> mx.array:
    model = randomized(Flux2Transformer(SMALL))
    model.set_dtype(dtype)
    img, txt = (mx.random.normal((2, *shape)).astype(dtype) for shape in ((HEIGHT * WIDTH, 16), (TEXT, 64)))
    rope = rope_table(np.concatenate([text_ids(TEXT), image_ids(HEIGHT, WIDTH)]), SMALL)
    seen = model.read(img[:1, :6], rope_table(image_ids(2, 3, 10), SMALL), execution=execution) if past else None
    return model(img, model.txt_in(txt), mx.array([0.5]), rope, past=seen, image=image, execution=execution)


def assert_rounded(a: mx.array, b: mx.array) -> None:
    """Equal but for rounding."""
    bound = ROUNDING[b.dtype]
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    assert mx.linalg.norm(a - b) <= bound * mx.linalg.norm(b)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("part", [6, 18, 2048])
def test_parts_and_waits_and_what_is_wanted_change_nothing(part, past, dtype):
    expected = velocity(Execution(part), dtype, past=past)
    assert_rounded(expected, velocity(PLAIN, dtype, past=past))
    for waits in (Waits.BLOCKS, Waits.BEFORE):
        assert mx.array_equal(velocity(Execution(part, waits), dtype, past=past), expected)
        assert_rounded(velocity(Execution(part, waits), dtype, OWN, past), expected[:, :OWN])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_two_products_are_one_within_rounding(dtype):
    assert_rounded(velocity(Execution(summed=True), dtype), velocity(PLAIN, dtype))


def layer(kind: str) -> nn.Module:
    linear = randomized(Linear(128, 64))
    if kind == "packed":
        return linear.to_quantized(64, 8, "affine")
    if kind == "narrow":
        linear.weight = linear.weight.astype(mx.bfloat16)
    return nn.Sequential(linear) if kind == "another" else linear


@pytest.mark.parametrize("kind", ["plain", "narrow", "packed", "another"])
def test_parts_of_a_layer(kind):
    linear, x = layer(kind), mx.random.normal((2, 3, 128), key=mx.random.key(1))
    assert mx.allclose(project_to(linear, x, slice(16, 48)), linear(x)[..., 16:48], rtol=1e-5, atol=1e-6)
    summed = project_sum(linear, x[..., :64], x[..., 64:])
    assert mx.allclose(summed, linear(x), rtol=1e-5, atol=1e-6)
    assert kind == "plain" or mx.array_equal(summed, linear(x))


def test_a_layer_is_cut_and_not_its_output(monkeypatch):
    linear, x = layer("plain"), mx.ones((1, 128))
    monkeypatch.setattr(Linear, "__call__", None)
    assert project_to(linear, x, slice(16, 48)).shape == (1, 32)
    assert project_sum(linear, x[:, :32], x[:, 32:]).shape == (1, 64)


@pytest.mark.parametrize(("head_dim", "fused", "used"), [(128, True, 1), (64, True, 1), (32, True, 0), (128, False, 0)])
def test_the_kernel_makes_heads_where_it_can_and_may(head_dim, fused, used, monkeypatch):
    """Gradients need the plain path, which is the default."""
    calls = []

    def made(inputs, output_shapes, output_dtypes, **_):
        calls.append(inputs)
        return [mx.zeros(*made) for made in zip(output_shapes, output_dtypes, strict=True)]

    pretend(monkeypatch)
    monkeypatch.setattr(kernel, "is_right", lambda dtype: True)
    monkeypatch.setattr(kernel, "_kernel", lambda: made)
    norm = blocks.QKNorm(head_dim, 1e-6)
    table = mx.ones((5, 2, head_dim))
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "rotate", lambda x, table: x)
        heads = blocks.rotated_heads(mx.ones((1, 5, 7 * head_dim)), 2, norm, table, Execution(fused=fused))
    assert [x.shape for x in heads] == [(1, 2, 5, head_dim)] * 3
    assert len(calls) == used
    norm.query_norm.scale = norm.query_norm.scale.astype(mx.bfloat16)
    assert not kernel.fits(mx.ones((1, 5, 7 * head_dim)), head_dim, *norm.scales)


@pytest.mark.parametrize("kind", ["double", "single"])
def test_keys_and_values_are_gone_when_a_block_adds(kind, monkeypatch):
    """In parts, all is computed that is asked for, so that arrays are in memory that someone holds."""
    held = []
    add = blocks.gated_sum

    def adding(x, gate, update):
        mx.eval(x, update)
        gc.collect()
        held.append(mx.get_active_memory() - before)
        return add(x, gate, update)

    config = replace(SMALL, num_attention_heads=4, attention_head_dim=32)
    block = randomized((blocks.DoubleBlock if kind == "double" else blocks.SingleBlock)(config))
    x = mx.random.normal((1, 4096, config.hidden_size))
    mods = [[mx.ones((1, 1, config.hidden_size))] * 6] * 2
    rope = rope_table(image_ids(64, 64), config)
    mx.eval(x, block.parameters(), mods, rope)
    gc.collect()
    before = mx.get_active_memory()
    monkeypatch.setattr(blocks, "gated_sum", adding)
    arguments = (x[:, 512:], x[:, :512], *mods, rope) if kind == "double" else (x, mods[0][:3], rope)
    mx.eval(block(*arguments, execution=Execution(512)))
    # What attended, 3 of the MLP, what is added so far, and a part that is worked on.
    assert max(held[1:]) < (6.5 if kind == "single" else 4) * x.nbytes


def as_one_kernel(projected, heads, norm, rope, execution):
    """Heads as a GPU's kernel makes them: of a projection, three arrays and nothing else."""
    B, L, _ = projected.shape
    qkv = projected[..., : 3 * heads * rope.shape[-1]].reshape(B, L, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    return tuple(mx.contiguous(x) for x in qkv)


@pytest.mark.parametrize("waits", [Waits.BLOCKS, Waits.BEFORE])
@pytest.mark.parametrize("part", [1500, 4000])
@pytest.mark.parametrize("spare", [0, 2**40])
def test_a_gpu_stays_within_what_is_predicted(spare, part, waits, monkeypatch):
    """With MLX's limit of the plan or of the run, and kernels without intermediates, as a GPU has them."""
    monkeypatch.setattr(blocks, "rotated_heads", as_one_kernel)
    monkeypatch.setattr(blocks, "swiglu", lambda gate, x: gate * x)
    monkeypatch.setattr(mx.fast, "layer_norm", lambda x, *_: x + 1)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda q, k, v, scale: mx.depends([q + 1], [k, v])[0])
    monkeypatch.setattr(layers, "fuses_attention", lambda *_: True)
    config = TransformerConfig(1, 3, 2, 64, guidance_embeds=False)
    side, execution = 44, Execution(part, waits)
    cost = TransformerCost(config, mx.float32, execution=execution)
    count = TEXT + side**2
    predicted = cost.passing(count)
    model = randomized(Flux2Transformer(config))
    tokens, states = (mx.random.normal((1, *shape)) for shape in ((side**2, 128), (TEXT, config.hidden_size)))
    rope = rope_table(np.concatenate([text_ids(TEXT), image_ids(side, side)]), config)
    mx.eval(model.parameters(), tokens, states, rope)
    gc.collect()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    plan = PhasePlan("transformer", 0, predicted)
    with limits(plan, spare, held, keeps_to_plan=True):
        for _ in range(3):
            mx.eval(model(tokens, states, mx.array([0.5]), rope, execution=execution))
    ratio = predicted / (mx.get_peak_memory() - held)
    print(f"{ratio:.3f}")
    assert 1 <= ratio < 3


def test_a_run_is_computed_as_planned_and_has_no_velocity_of_references(monkeypatch):
    seen = []
    call = Flux2Transformer.__call__

    def spied(model, *arguments, **how):
        seen.append((arguments[0].shape[1], how["image"], how["execution"]))
        return call(model, *arguments, **how)

    way = Execution(50, Waits.BEFORE)
    monkeypatch.setattr(Flux2Transformer, "__call__", spied)
    monkeypatch.setattr("flux2_mlx.transformer.cost.executions", lambda *_: [way])
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)
    pipe("a red ring", image=Image.new("RGB", (64, 64), "teal"), width=64, height=64, num_inference_steps=1, seed=0)
    assert seen == [(32, 16, way)]
