"""Passes that differ little from an earlier one: what is skipped, what that costs, and what it gives."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import save_for_demo
from helpers.checkpoints import LARGE_TRANSFORMER, SHALLOW_TEXT, SHALLOW_VARIANT, convert, save_small
from helpers.in_memory import demo, taken
from helpers.mlx_state import randomized
from helpers.variants import change_variant
from mlx.utils import tree_flatten

from flux2_mlx import Flux2Pipeline, InputError, memory
from flux2_mlx.advice import checked_plan, workload
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.config import VARIANTS, TransformerConfig
from flux2_mlx.networks import Networks
from flux2_mlx.output import Passes
from flux2_mlx.request import Request
from flux2_mlx.step_cache import StepCaches
from flux2_mlx.streaming import Reading, load_streamed
from flux2_mlx.transformer import Flux2Transformer, image_ids, rope_table, text_ids

SMALL = TransformerConfig(2, 3, 2, 64, 32, 16, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=True)
TEXT, HEIGHT, WIDTH, IMAGE = 7, 3, 4, 12
SIGMA = mx.array([0.5])  # of all passes: to a random network, each noise level is a world of its own
ALWAYS, NEVER = 1e9, 1e-9  # thresholds with which all is skipped that can be, and nothing
FOX = "a red circle"
SETTINGS = {"width": 48, "height": 32, "num_inference_steps": 8, "seed": 5, "output_type": "latent"}


@pytest.fixture(scope="module")
def network() -> Flux2Transformer:
    return randomized(Flux2Transformer(SMALL))


def cached(network: Any, threshold: float, reading: Reading | None = None) -> tuple[Any, Passes]:
    passes = Passes()
    return StepCaches(threshold, passes, reading or Reading()).of(network), passes


def inputs(images: int, tokens: int = IMAGE) -> tuple[mx.array, mx.array]:
    """Two sets of tokens of images, between which passes go."""
    a, b = mx.random.split(mx.random.key(tokens))
    shape = (images, tokens, SMALL.in_channels)
    return mx.random.normal(shape, key=a), mx.random.normal(shape, key=b)


def conditions(images: int, tokens: int = IMAGE) -> tuple[mx.array, mx.array]:
    """Text states, and rotations of all positions."""
    states = mx.random.normal((images, TEXT, SMALL.hidden_size), key=mx.random.key(3))
    ids = [text_ids(TEXT), image_ids(HEIGHT, WIDTH), image_ids(tokens - IMAGE, 1, 10)]
    return states, rope_table(np.concatenate(ids), SMALL)


def run(passing: Any, shares: list[float], images: int = 1, **kwargs: Any) -> list[np.ndarray]:
    """What passes give over tokens so far from the first set to the second one."""
    first, second = inputs(images)
    states, rope = conditions(images)
    guidance = mx.array([4.0])
    return [
        np.array(passing(first + share * (second - first), states, SIGMA, rope, guidance, **kwargs)) for share in shares
    ]


SHARES = [0, 0.01, 0.02, 0.3, 0.31, 0.32, 0.6, 0.9, 0.9]


def test_without_a_threshold_there_is_no_cache(network):
    assert cached(network, 0.0) == (network, Passes())


@pytest.mark.parametrize("images", [1, 2])
def test_nothing_is_skipped_bit_for_bit(network, images):
    passing, passes = cached(network, NEVER)
    for ours, expected in zip(run(passing, SHARES[:-1], images), run(network, SHARES, images), strict=False):
        assert np.array_equal(ours, expected)
    assert passes == Passes(8 * images, 0, 0)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(dtype):
    half = randomized(Flux2Transformer(SMALL))
    half.set_dtype(dtype)
    arguments = (*(x.astype(dtype) for x in (inputs(2)[0], conditions(2)[0])), SIGMA, conditions(2)[1], mx.array([4.0]))
    passing, passes = cached(half, 1e-3)
    expected, whole, skipped = (network(*arguments) for network in (half, passing, passing))
    assert mx.array_equal(whole, expected)
    assert skipped.dtype == dtype
    assert mx.linalg.norm((skipped - expected).astype(mx.float32)) < 0.03 * mx.linalg.norm(expected.astype(mx.float32))
    assert passes == Passes(4, 2)


def test_references_beside_and_read_ones(network):
    past = network.read(inputs(1, 5)[0], rope_table(image_ids(5, 1, 10), SMALL), mx.array([4.0]))
    (expected,), (ours, again) = run(network, [0], past=past), run(cached(network, ALWAYS)[0], [0, 0], past=past)
    assert np.array_equal(ours, expected)
    np.testing.assert_allclose(again, expected, atol=1e-4, rtol=1e-4)
    tokens, (states, rope) = inputs(1, 17)[0], conditions(1, 17)
    arguments = tokens, states, mx.array([0.5]), rope, mx.array([4.0])
    passing, passes = cached(network, ALWAYS)
    whole, ours, again = (np.array(x(*arguments, image=IMAGE)) for x in (network, passing, passing))
    assert np.array_equal(ours, whole)
    np.testing.assert_allclose(again, whole, atol=1e-4, rtol=1e-4)
    assert again.shape == (1, IMAGE, SMALL.in_channels)
    assert passes.skipped == 1


def test_references_do_not_count_for_the_change(network):
    """Tokens that stay the same beside those that change would make the change smaller."""
    (states, rope), (few, _) = conditions(1, 200), inputs(1)
    rest = inputs(1, 188)[0]
    changes = []
    for tokens in (few, few + 0.05 * inputs(1)[1]):
        img = mx.concatenate([tokens, rest], axis=1)
        x, shared = network.begin(img, states, mx.array([0.5]), rope, mx.array([4.0]), image=IMAGE)
        changes.append(np.array((next(network.blocks(shared))(x) - x)[:, shared.wanted]))
    change = np.abs(changes[1] - changes[0]).mean() / np.abs(changes[0]).mean()
    for threshold, skipped in ((0.99 * change, 0), (1.01 * change, 1)):
        passing, passes = cached(network, threshold)
        for tokens in (few, few + 0.05 * inputs(1)[1]):
            img = mx.concatenate([tokens, rest], axis=1)
            mx.eval(passing(img, states, mx.array([0.5]), rope, mx.array([4.0]), image=IMAGE))
        assert passes == Passes(2, skipped)


def test_a_skipped_pass_adds_what_the_others_added(network):
    passing, _ = cached(network, ALWAYS)
    first, second = inputs(1)
    states, rope = conditions(1)
    streams = []
    for tokens, sigma in ((first, 1.0), (second, 0.3)):
        x, shared = network.begin(tokens, states, mx.array([sigma]), rope, mx.array([4.0]))
        blocks = network.blocks(shared)
        x = next(blocks)(x)
        streams.append((x[:, TEXT:], shared))
        for block in blocks if not streams[1:] else ():
            x = block(x)
        if not streams[1:]:
            others = x - streams[0][0]
    expected = network.end(streams[1][0] + others, streams[1][1])
    arguments = states, mx.array([1.0]), rope, mx.array([4.0])
    mx.eval(passing(first, *arguments))
    ours = passing(second, states, mx.array([0.3]), rope, mx.array([4.0]))
    np.testing.assert_allclose(np.array(ours), np.array(expected), atol=1e-5, rtol=1e-5)


def test_the_change_is_that_since_all_was_computed(network):
    """Many small ones are a large one."""
    passing, passes = cached(network, 0.1)
    run(passing, [share / 200 for share in range(100)])
    assert 0 < passes.skipped < 99
    run(passing, [0.5])
    far, counted = cached(network, 0.1)
    run(far, [0, 0.5])
    assert counted.skipped == 0


@pytest.mark.parametrize("threshold", [0.15, 0.3])
def test_an_image_is_the_same_alone_and_beside_others(network, threshold):
    """Though one needs all blocks where the other does not."""
    first, second = inputs(2)
    pace = mx.array([1.0, 0.2])[:, None, None]  # of each image
    states, rope = conditions(2)
    guidance = mx.array([4.0])

    def go(passing: Any, places: slice) -> list[np.ndarray]:
        return [
            np.array(passing((first + share * pace * (second - first))[places], states[places], SIGMA, rope, guidance))
            for share in np.linspace(0, 1, 20).tolist()
        ]

    both, passes = cached(network, threshold)
    together = go(both, slice(0, 2))
    alone = [cached(network, threshold) for _ in range(2)]
    apart = [go(passing, slice(place, place + 1)) for place, (passing, _) in enumerate(alone)]
    skipped = [counted.skipped for _, counted in alone]
    assert 0 < skipped[0] < skipped[1] < 19
    assert passes == Passes(40, sum(skipped))
    for step in range(20):
        for place in range(2):
            np.testing.assert_allclose(together[step][place], apart[place][step][0], atol=1e-4, rtol=1e-4)


def test_nothing_that_was_added_is_no_small_change(network):
    still = randomized(Flux2Transformer(SMALL))
    still.double_stream_modulation_img.lin.weight = mx.zeros_like(still.double_stream_modulation_img.lin.weight)
    passing, passes = cached(still, ALWAYS)
    run(passing, [0, 0])
    assert passes.skipped == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    source = save_small(folder / "official", transformer=LARGE_TRANSFORMER, text=SHALLOW_TEXT)
    return convert(source, folder / "ours", variant=SHALLOW_VARIANT)


@pytest.mark.parametrize(("resident", "reads"), [(0, 6 + 3 + 1), (1, 5 + 1), (3, 3 + 1), (6, 0)])
def test_a_skipped_pass_reads_no_more_than_its_first_block(folder, resident, reads):
    """And what is read ahead for the next one stays until it is wanted."""
    component = Checkpoint.open(folder).components["transformer"]
    config, reading = component.config, Reading()
    streamed = load_streamed(component, mx.float32, resident, reading)
    sizes = [sum(x.nbytes for x in weights) for weights in block_weights(component)]
    each = sum(sizes[resident:])
    rope = mx.ones((17, 2, config.attention_head_dim))
    tokens = mx.random.normal((1, 12, config.in_channels), key=mx.random.key(0))
    text = mx.random.normal((1, 5, config.hidden_size), key=mx.random.key(1))
    whole = component.load(mx.float32)
    ours, passes = cached(streamed, ALWAYS, reading)
    theirs, _ = cached(whole, ALWAYS)
    asked = []
    read = type(streamed.double_blocks)._read
    for blocks in (streamed.double_blocks, streamed.single_blocks):
        blocks._read = lambda number, blocks=blocks: asked.append((blocks._name, number)) or read(blocks, number)
    for sigma in (1.0, 0.9, 0.8, 0.7):
        got, expected = (x(tokens, text, mx.array([sigma]), rope) for x in (ours, theirs))
        assert np.array_equal(np.array(got), np.array(expected))
    first = sizes[0] if resident == 0 else 0
    assert reading.nbytes == each + 3 * first
    assert passes == Passes(4, 3, 3 * (each - first))
    assert len(asked) == reads


def block_weights(component: Any) -> list[list[mx.array]]:
    network = component.load(mx.float32)
    blocks = [*network.double_blocks, *network.single_blocks]
    return [[x for _, x in tree_flatten(block.parameters())] for block in blocks]


@pytest.fixture(scope="module")
def pipe() -> Flux2Pipeline:
    return demo()


@pytest.fixture(scope="module")
def guided() -> Flux2Pipeline:
    """The same weights as a model with classifier-free guidance."""
    return change_variant(demo(), distilled=False)


def test_a_run_tells_what_was_skipped_and_makes_nearly_the_same(pipe):
    whole, none, some = (pipe(FOX, step_cache=share, **SETTINGS) for share in (None, 0, 0.2))
    assert np.array_equal(whole.images, none.images)
    assert (whole.passes, none.passes) == (Passes(), Passes())
    assert some["passes"].all == 8
    assert 0 < some.passes.skipped < 7
    error = np.linalg.norm(some.images - whole.images) / np.linalg.norm(whole.images)
    assert 0 < error < 0.15
    assert np.array_equal(pipe(FOX, step_cache=0.2, **SETTINGS).images, some.images)
    assert [one.settings[0].get("step_cache") for one in (whole, none, some)] == [None, None, 0.2]


@pytest.mark.parametrize(("guidance", "passes"), [(3.0, Passes(16, 14)), (1.0, Passes(8, 7))])
def test_each_pass_of_guidance_has_its_own_cache(guided, guidance, passes):
    output = guided(FOX, step_cache=ALWAYS, guidance_scale=guidance, **SETTINGS)
    assert output.passes == passes
    whole = guided(FOX, guidance_scale=guidance, **SETTINGS)
    near = guided(FOX, step_cache=0.1, guidance_scale=guidance, **SETTINGS)
    assert np.linalg.norm(near.images - whole.images) < 0.05 * np.linalg.norm(whole.images)


def test_images_of_a_batch_are_those_of_single_runs(pipe, monkeypatch):
    settings = SETTINGS | {"step_cache": 0.2, "seed": 8}
    batch = pipe([FOX, "a green star"], num_images_per_prompt=2, **settings)
    alone = [
        pipe(prompt, **settings | {"seed": 8 + place})
        for place, prompt in enumerate([FOX, FOX, "a green star", "a green star"])
    ]
    assert batch.passes == Passes(32, sum(one.passes.skipped for one in alone))
    for image, one in zip(batch.images, alone, strict=True):
        np.testing.assert_allclose(image, one.images[0], atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(memory, "_TOKENS_PER_PASS", 1)
    turns = pipe([FOX, "a green star"], num_images_per_prompt=2, **settings)
    np.testing.assert_array_equal(turns.images, np.concatenate([one.images for one in alone]))


def test_other_adapters_need_all_blocks(tmp_path):
    pipe = demo()
    pipe.load_lora_weights(save_for_demo(tmp_path / "a.safetensors"), scale=0.1, steps=(3, 4))
    # All is computed at the first step, at the third and at the fifth.
    assert pipe(FOX, step_cache=ALWAYS, **SETTINGS).passes == Passes(8, 8 - 3)


def test_a_picture_that_is_painted_over(pipe, image):
    settings = {"num_inference_steps": 8, "seed": 5, "strength": 0.8, "output_type": "latent"}
    whole, some = (pipe(FOX, image=image.resize((64, 64)), step_cache=share, **settings) for share in (0, 0.2))
    assert 0 < some.passes.skipped < 7
    assert np.linalg.norm(some.images - whole.images) < 0.1 * np.linalg.norm(whole.images)


def test_a_streamed_run_says_what_it_need_not_read(folder):
    free = Flux2Pipeline.from_pretrained(folder, dtype="float32", prompt_cache=False, keep=False)
    change_variant(free, steps=8)
    request = free.request([FOX], width=64, height=48, steps=4, seed=1, max_sequence_length=40, step_cache=ALWAYS)
    pipe = Flux2Pipeline.from_pretrained(
        folder, dtype="float32", prompt_cache=False, keep=False, memory_limit=free.plan(request).peak_memory * 3 // 4
    )
    change_variant(pipe, steps=8)
    expected, output = (one.run(request, output_type="np") for one in (free, pipe))
    assert np.array_equal(output.images, expected.images)
    took = next(phase for phase in output.timings if phase.name == "transformer")
    assert output.passes.skipped == 3
    assert 0 < output.passes.unread == 4 * took.streamed - took.read
    assert expected.passes == Passes(4, 3, 0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_plan_counts_what_is_kept(guided, guidance):
    sizes = {"width": 256, "height": 256, "guidance": guidance, "seed": 0, "steps": 2}
    plans = [guided.plan(guided.request([FOX], **sizes, step_cache=share)).phase("transformer") for share in (0, 1)]
    added = 2 * 16 * 16 * 128 * 4
    assert plans[1].peak_memory - plans[0].peak_memory == (2 if guidance > 1 else 1) * added


def test_a_run_stays_within_its_plan():
    pipe = demo(keep=False)
    pipe(FOX, width=16, height=16, num_inference_steps=1, seed=0)  # what stays of any run is no run's
    request = pipe.request([FOX], width=96, height=64, steps=4, seed=0, step_cache=0.2, images_per_prompt=3)
    planned, base = pipe.plan(request).phase("transformer"), taken()
    output = pipe.run(request, output_type="latent")
    peak = next(phase.peak_memory for phase in output.timings if phase.name == "transformer")
    assert 0 < output.passes.skipped < 9
    assert peak - base <= planned.peak_memory


def test_what_does_not_fit_would_without_a_cache():
    networks = Networks.open(VARIANTS["dev"])
    work = workload(Request.checked(networks.checkpoint.variant, 16, [FOX], step_cache=0.1))
    least = networks.needs(work).plan(0)
    assert least.worst.name == "transformer"
    with pytest.raises(InputError, match=r"the transformer needs .*; without a step cache it would fit"):
        checked_plan(networks, work, least.peak_memory - 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.1, "step_cache must be a number of 0 or more, got -0.1"),
        (float("nan"), "step_cache must be a number of 0 or more, got nan"),
        (float("inf"), "step_cache must be a number of 0 or more, got inf"),
        ("0.1", "step_cache must be a number, got '0.1'"),
        (True, "step_cache must be a number, got True"),
    ],
)
def test_what_is_no_threshold_is_refused(pipe, value, message):
    with pytest.raises(InputError, match=message):
        pipe(FOX, step_cache=value)


@pytest.mark.parametrize("name", VARIANTS)
def test_models_of_few_steps_have_none(name):
    few = name in ("klein-4b", "klein-9b", "klein-9b-kv")
    assert Request.checked(VARIANTS[name], 16, [FOX], step_cache=0).step_cache == 0
    if few:
        with pytest.raises(
            InputError, match=f"{name} is distilled to 4 steps, .* leave it out, or choose one of demo, k"
        ):
            Request.checked(VARIANTS[name], 16, [FOX], step_cache=0.1)
    else:
        assert Request.checked(VARIANTS[name], 16, [FOX], step_cache=0.1).step_cache == 0.1
