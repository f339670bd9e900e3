"""What the phases of a run are said to need, against what they take."""

import gc
import json
import re
import threading
from pathlib import Path

import bench_memory
import mlx.core as mx
import numpy as np
import pytest
from helpers.checkpoints import LARGE_TRANSFORMER, SHALLOW_TEXT, SHALLOW_VARIANT, convert, save_small
from helpers.mlx_state import mlx_limits, plan_ratios, randomized
from helpers.variants import change_variant
from mlx.utils import tree_map
from PIL import Image

from flux2_mlx import Flux2Pipeline, memory, metering
from flux2_mlx.advice import workload
from flux2_mlx.config import QUANTIZATIONS, VARIANTS, TransformerConfig
from flux2_mlx.device import parse_memory
from flux2_mlx.errors import InputError
from flux2_mlx.layers import WIDENED
from flux2_mlx.memory import PhasePlan, Plan, Workload
from flux2_mlx.metering import limits
from flux2_mlx.networks import Networks
from flux2_mlx.text import TOKENIZERS
from flux2_mlx.transformer import (
    PLAIN,
    Execution,
    Flux2Transformer,
    TransformerCost,
    image_ids,
    rope_table,
    text_ids,
)
from flux2_mlx.transformer.execution import Waits

ROOT = Path(__file__).parent.parent
GIB = 2**30
# Of activations alone, without weights: MLX waits when nine tenths of them are there.
NEAR = 1.12


def measured_peak(
    config: TransformerConfig, batch: int, side: int, text: int, dtype: mx.Dtype, wide: bool, predicted: int
) -> int:
    """Bytes that a pass takes above the weights under the limits of MLX that follow from what it is `predicted` to."""
    model = randomized(Flux2Transformer(config))
    model.set_dtype(dtype)
    if not wide:
        narrow = tree_map(lambda x: x.astype(mx.bfloat16) if x.ndim == 2 else x, model.parameters())
        model.update(narrow)
    tokens = mx.random.normal((batch, side * side, config.in_channels)).astype(dtype)
    states = mx.random.normal((batch, text, config.hidden_size)).astype(dtype)
    rope = rope_table(np.concatenate([text_ids(text), image_ids(side, side)]), config)
    mx.eval(model.parameters(), tokens, states, rope)
    gc.collect()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    planned = PhasePlan("transformer", 0, predicted)
    # How far MLX allocates ahead of its computing differs, so often enough for the most that it may be.
    for attempt in range(60):
        mx.clear_cache()
        with limits(planned, 0, held):
            mx.eval(model(tokens, states, mx.array([0.5]), rope))
        if attempt >= 2 and predicted <= NEAR * (mx.get_peak_memory() - held):
            break
    return mx.get_peak_memory() - held


@pytest.mark.parametrize(
    ("heads", "batch", "side", "text", "dtype", "wide"),
    [
        (4, 1, 16, 64, mx.float32, True),
        (4, 1, 32, 64, mx.float32, True),
        (8, 1, 32, 256, mx.float32, True),
        (4, 3, 16, 64, mx.float32, True),
        (2, 1, 52, 64, mx.float32, True),
        (2, 1, 24, 64, mx.bfloat16, True),
        (2, 1, 46, 64, mx.bfloat16, True),
        (8, 1, 24, 64, mx.float32, False),
        (12, 1, 8, 64, mx.float32, False),
        (12, 1, 28, 64, mx.float32, False),
    ],
)
def test_the_prediction_is_near_the_peak_and_never_below(heads, batch, side, text, dtype, wide):
    config = TransformerConfig(1, 2, heads, 64, guidance_embeds=False)
    widened = 0 if wide else 4 * min(WIDENED, Flux2Transformer(config).single_blocks[0].linear1.weight.size)
    predicted = TransformerCost(config, dtype).passing(batch * (side * side + text), batch, widened)
    measured = measured_peak(config, batch, side, text, dtype, wide, predicted)
    print(f"measured {measured}, predicted {predicted}: {predicted / measured:.3f}")
    assert measured <= predicted <= NEAR * measured


def compare(pipe: Flux2Pipeline, images=(), most: float = 1.1, **settings) -> None:
    """Every phase's peak must be at most as planned, and the plan at most `most` times the peak."""
    edit = pipe.edit(images)
    request = pipe.request(settings.pop("prompts", ["a red ring"]), edit=edit, steps=1, seed=0, **settings)
    planned = pipe.plan(request, edit)
    pipe("a red ring", width=16, height=16, num_inference_steps=1, seed=0)  # what stays of any run is no run's
    ratios = plan_ratios(planned, lambda: pipe.run(request, edit).timings, most, attempts=40)
    assert all(1 <= ratio <= most for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    ("dtype", "quant", "size"),
    [
        ("float32", None, (128, 128)),
        ("float32", None, (256, 192)),
        ("float32", None, (448, 384)),  # whose picture is decoded in strips
        ("bfloat16", None, (128, 128)),
        ("float16", None, (128, 128)),
        ("float32", "qint8", (128, 128)),
        ("float32", "qint6", (128, 128)),
        ("bfloat16", "qint6", (128, 128)),
        ("float32", "mixed4", (64, 64)),
        ("float32", "qint4", (64, 64)),
    ],
)
def test_a_plan_is_near_what_a_run_takes_and_never_below(dtype, quant, size):
    options = {"dtype": dtype, "quant": quant, "text_quant": quant}
    pipe = Flux2Pipeline.from_pretrained("demo", **options, prompt_cache=False, keep=False)
    compare(pipe, width=size[0], height=size[1])


def test_a_plan_counts_prompts_and_images():
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, keep=False)
    prompts = [f"a red ring on a {colour} background" for colour in ("white", "blue", "black")]
    compare(pipe, prompts=prompts, images_per_prompt=2, most=1.2)


@pytest.mark.parametrize("sizes", [[(256, 192)], [(128, 144), (320, 256)]])
def test_a_plan_counts_references(sizes):
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, keep=False)
    compare(pipe, [Image.new("RGB", size, "teal") for size in sizes], width=128, height=128)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    source = save_small(folder / "official", transformer=LARGE_TRANSFORMER, text=SHALLOW_TEXT)
    return convert(source, folder / "ours", variant=SHALLOW_VARIANT)


@pytest.fixture
def kv_pipe(small_folder):
    pipe = Flux2Pipeline.from_pretrained(small_folder, dtype="float32", prompt_cache=False, keep=False)
    return change_variant(pipe, kv_cache=True)


def test_a_plan_counts_the_keys_and_values_of_references(kv_pipe):
    compare(kv_pipe, [Image.new("RGB", (384, 320), "teal")] * 2, width=64, height=64, most=1.15)


def compare_previews(pipe: Flux2Pipeline, images=(), **settings) -> None:
    """The same for a run with an image after every step, which is decoded beside the transformer."""
    edit = pipe.edit(images)
    request = pipe.request(["a red ring"], edit=edit, steps=2, seed=0, **settings)
    planned = pipe.plan(request, edit, previews=True)
    assert planned.phase("vae").weights > pipe.plan(request, edit).phase("vae").weights

    def on_progress(progress):
        if progress.step is not None:
            progress.preview()

    def run():
        return pipe.run(request, edit, on_progress=on_progress, previews=True).timings

    ratios = plan_ratios(planned, run, 1.12, attempts=40)
    assert all(1 <= ratio <= 1.12 for ratio in ratios.values()), ratios


def test_a_plan_counts_keys_and_values_beside_previews(kv_pipe):
    compare_previews(kv_pipe, [Image.new("RGB", (256, 192), "teal")] * 2, width=128, height=128)


def test_a_plan_counts_prompts_given_as_embeds():
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, keep=False)
    embeds = mx.concatenate([pipe.encode_prompt("a red ring")] * 100).astype(mx.bfloat16)
    mx.eval(embeds)
    gc.collect()
    base = mx.get_active_memory()
    output = pipe(prompt_embeds=embeds, width=16, height=16, num_inference_steps=1, seed=0)
    request = pipe.request([""] * 100, width=16, height=16, steps=1)
    planned = pipe.networks.needs(workload(request, texts=(100, 1, 48))).plan(pipe.memory_limit)
    measured = max(phase.peak_memory for phase in output.timings if phase.name != "vae") - base
    assert measured <= planned.phase("transformer").peak_memory <= 1.2 * measured
    tight = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, keep=False, memory_limit="20MB")
    with pytest.raises(InputError, match="the transformer needs "):
        tight(prompt_embeds=embeds, width=16, height=16, num_inference_steps=1, seed=0)


def test_a_prompt_that_is_repeated_is_held_once():
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, keep=False)
    compare(pipe, prompts=["a red ring"] * 60, width=16, height=16, most=1.3)


def test_a_plan_counts_previews():
    compare_previews(
        Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, keep=False), width=128, height=96
    )


def test_a_plan_counts_images_that_are_decoded_while_others_wait(monkeypatch):
    monkeypatch.setattr(memory, "_TOKENS_PER_PASS", 100)  # an image of 192×128 a pass
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, keep=False)
    compare(pipe, width=192, height=128, images_per_prompt=3, most=1.12)


@pytest.mark.parametrize("fails", [False, True])
def test_the_limits_of_mlx_follow_the_plan_and_come_back(fails, monkeypatch):
    wired, seen, before = [7], {}, mlx_limits()
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: wired.append(limit) or wired[-2])
    monkeypatch.setattr(metering, "on_gpu", lambda: True)
    monkeypatch.setattr(metering, "on_metal", lambda: True)
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, keep=False, memory_limit="30MB")
    request = pipe.request(["a red ring"], width=64, height=64, steps=1)
    planned = pipe.plan(request)
    others = mx.ones(1000)
    mx.eval(others)
    gc.collect()
    held = mx.get_active_memory()

    def on_progress(progress):
        seen[progress.phase] = mlx_limits()
        if fails and progress.phase == "transformer":
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            pipe.run(request, on_progress=on_progress)
    else:
        pipe.run(request, on_progress=on_progress)
    phases = planned.phases[: 2 if fails else 3]
    room = [planned.limit - phase.peak_memory for phase in phases]
    for phase, free, (most, cache) in zip(phases, room, seen.values(), strict=True):
        assert held + phase.weights < most < held + phase.peak_memory
        assert cache == min(before[1], free)
    assert any(free < before[1] for free in room)
    assert mlx_limits() == before
    assert wired[1:] == [limit for phase in phases for limit in (phase.peak_memory, 7)]


@pytest.mark.parametrize(
    ("gpu", "spare", "expected"), [(True, 0, 300), (True, 200, 300), (True, 500, 500), (False, 0, 0), (False, 200, 200)]
)
def test_a_gpu_keeps_freed_buffers_under_a_tight_limit_too(gpu, spare, expected, monkeypatch):
    """Counted in the plan: those of all kinds stay within the memory limit, which is below what is planned."""
    monkeypatch.setattr(metering, "on_gpu", lambda: gpu)
    before = mlx_limits()
    with limits(PhasePlan("transformer", 1000, 300), spare, 50):
        most, cache = mlx_limits()
        assert cache == expected
        assert 1050 < most <= 1350
    assert mlx_limits() == before


@pytest.mark.parametrize(("execution", "is_free"), [(PLAIN, False), (Execution(waits=Waits.BLOCKS), True)])
def test_a_phase_that_keeps_to_its_plan_has_the_memory_of_the_run(execution, is_free, monkeypatch):
    """A lower limit would have buffers given back within each block; the others need it."""
    monkeypatch.setattr("flux2_mlx.transformer.cost.executions", lambda *_: [execution])
    seen = {}
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, keep=False, memory_limit="200MB")
    request = pipe.request(["a red ring"], width=64, height=64, steps=1)
    planned = pipe.plan(request)
    gc.collect()
    held = mx.get_active_memory()
    pipe.run(request, on_progress=lambda progress: seen.update({progress.phase: mlx_limits()[0] - held}))
    for phase in planned.phases:
        has_all = is_free and phase.name == "transformer"
        assert (planned.limit * 0.98 < seen[phase.name] <= planned.limit) == has_all
        assert has_all or phase.weights < seen[phase.name] < phase.peak_memory


def test_the_limits_of_mlx_come_back_though_its_work_fails(monkeypatch):
    def fail():
        raise RuntimeError("lost")

    before = mlx_limits()
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, keep=False)
    monkeypatch.setattr(mx, "synchronize", fail)
    with pytest.raises(RuntimeError, match="lost"):
        pipe("a red ring", width=64, height=64, num_inference_steps=1)
    assert mlx_limits() == before


def test_runs_of_two_threads_take_turns():
    before, images = mlx_limits(), {}

    def run(seed: int) -> None:
        pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)
        images[seed] = [pipe("a red ring", width=64, height=64, seed=seed).images[0].tobytes() for _ in range(2)]

    def run_in_thread(seed: int) -> None:
        run(seed)

    threads = [threading.Thread(target=run_in_thread, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mlx_limits() == before
    for seed, (first, second) in images.items():
        run(seed)
        assert images[seed] == [first, second] == [first] * 2


def test_what_fits():
    phases = (PhasePlan("text_encoder", 3, 1), PhasePlan("transformer", 4, 2))
    assert (Plan(phases, 6).peak_memory, Plan(phases, 6).fits, Plan(phases, 5).fits) == (6, True, False)


@pytest.mark.parametrize("family", ["qwen3", "mistral3"])
def test_the_tokenizer_of_the_benchmark_is_one(family, tmp_path):
    bench_memory.write_tokenizer(tmp_path, family)
    assert TOKENIZERS[family](tmp_path / "tokenizer.json").count("a") > 0


def readme_tables() -> list[list[list[str]]]:
    """The cells of the tables that `scripts/bench_memory.py` writes, without their heads."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text.partition("<!-- memory -->")[2].partition("<!-- end of memory -->")[0]
    tables = re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE)
    return [[[x.strip(" `") for x in line.split("|")[1:-1]] for line in table.splitlines()[2:]] for table in tables]


def test_the_table_of_the_readme_is_the_plan():
    rows = readme_tables()[0]
    assert {(row[0], row[1]) for row in rows} == {
        (name, quant) for name, variant in VARIANTS.items() if variant.repo for quant in QUANTIZATIONS
    }
    for name, quant, whole, documented, within, measured, least in rows:
        variant = VARIANTS[name]
        work = Workload(1024, 1024, variant.max_sequence_length)
        needs = Networks.open(variant, quant=quant, dtype="bfloat16").needs(work)
        limits = {whole: 2**50, least: 10**6} | ({} if documented == "–" else {within: float(documented) * GIB})
        for figure, limit in limits.items():
            planned = needs.plan(int(limit)).peak_memory / GIB
            assert float(figure) == pytest.approx(planned, rel=0.02, abs=0.06), (name, quant, figure)
        weights = max(phase.weights for phase in needs.plan(2**50).phases) / GIB
        assert float(whole) <= weights + max(0.15 * weights, 1.2)
        for figure in (within, measured):
            assert figure == "–" or float(figure) <= float(documented)
        assert float(least) < 8


def test_the_table_of_default_limits():
    """Of Macs by their memory; what fits into less fits into more."""
    head, _, *lines = bench_memory.limits_table().splitlines()
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in lines]
    assert [(int(row[0]), float(row[1])) for row in rows] == [
        *((8, 4), (16, 10), (24, 16), (36, 27), (64, 48), (96, 72), (128, 96), (192, 144))
    ]
    assert len(rows[0]) == head.count("|") - 1 == 2 + 3 * len(bench_memory.COLUMNS)
    for column in list(zip(*rows, strict=True))[2:]:
        read = [{"–": "1024", "in memory": "0"}.get(cell, cell) for cell in column]
        read = list(map(float, read))
        assert read == sorted(read, reverse=True)
    assert rows[0][2:5] == ["4.1", "0.5", "in memory"]  # klein-4b on a Mac of 8 GiB
    assert rows[0][8] == "–"  # dev in bf16
    assert set(rows[-1][2:]) == {"in memory"}


def test_recorded_runs_stayed_within_their_limit_and_near_their_plan():
    rows = readme_tables()[1]
    recorded = json.loads((ROOT / "scripts" / "bench_memory.json").read_text())
    assert len(rows) == len(recorded) > 0
    for row, run in zip(rows, recorded, strict=True):
        assert [*row[:4]] == [
            run["model"],
            f"{run['quant']}, text {run['text_quant']}",
            f"{run['side']}²",
            run["limit"] or "–",
        ]
        for cell, phase in zip(row[4:7], ("text_encoder", "transformer", "vae"), strict=True):
            peak, planned = map(float, cell.split(" / "))
            measured = run["phases"][phase]
            assert (peak, planned) == pytest.approx((measured["peak"], measured["planned"]), abs=0.006)
            assert measured["peak"] <= measured["planned"] <= 1.1 * measured["peak"]
            assert run["limit"] is None or peak <= parse_memory(run["limit"]) / GIB
