"""Streamed networks: the same bits as from memory, in less of it."""

import gc
import json
import os
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.checkpoints import LARGE_TRANSFORMER, SHALLOW_TEXT, SHALLOW_VARIANT, convert, save_small
from helpers.cli_runner import PROMPT, done, pixels, refusal
from helpers.mlx_state import mlx_limits
from mlx.utils import tree_flatten

from flux2_mlx import Flux2Pipeline, InputError, streaming
from flux2_mlx.advice import checked_plan, workload
from flux2_mlx.checkpoint import Checkpoint, Component
from flux2_mlx.errors import CheckpointError
from flux2_mlx.footprints import footprint
from flux2_mlx.loading import Footprint, module_tensors
from flux2_mlx.streaming import Reading, load_streamed
from flux2_mlx.weights import READER

SETTINGS = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 3, "max_sequence_length": 40}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "official"
    return save_small(folder, transformer=LARGE_TRANSFORMER, text=SHALLOW_TEXT)


@pytest.fixture(scope="module", params=["bf16", "qint8"])
def folder(request, official):
    target = official.with_name(request.param)
    return convert(official, target, quant=request.param, text_quant=request.param, variant=SHALLOW_VARIANT)


def open_pipe(folder, **options) -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained(folder, dtype="float32", prompt_cache=False, keep=False, **options)


def test_the_footprint_is_what_loading_takes(folder):
    for component in Checkpoint.open(folder).components.values():
        mx.clear_cache()
        before = mx.get_active_memory()
        network = component.load(mx.float32)
        taken = mx.get_active_memory() - before
        del network
        size = footprint(component, mx.float32)
        assert size.all <= taken <= 1.05 * size.all + 2**19
    assert len(footprint(Checkpoint.open(folder).components["transformer"], mx.float32).blocks) == 6


def test_what_stays():
    network = Footprint(10, (4, 4, 2, 2))
    assert (network.all, network.held(0)) == (22, 18)
    assert [network.held(count) for count in range(5)] == [18, 22, 22, 22, 22]
    assert [Footprint(10, (4, 4, 2, 2), 3).held(count) for count in range(5)] == [21, 25, 25, 25, 22]
    long = Footprint(10, (2,) * 8)
    assert [long.resident(budget) for budget in (0, 13, 14, 16, 24, 25, 26, 100)] == [0, 0, 0, 1, 5, 5, 8, 8]


@pytest.mark.parametrize("resident", [0, 1, 3, 5, 6])
def test_streamed_blocks_compute_the_same_bits(folder, resident):
    component = Checkpoint.open(folder).components["transformer"]
    whole, streamed = component.load(mx.float32), load_streamed(component, mx.float32, resident, Reading())
    config = component.config
    tokens, text = mx.random.normal((1, 12, config.in_channels)), mx.random.normal((1, 5, config.hidden_size))
    rope = mx.ones((17, 2, config.attention_head_dim))
    for sigma in (1.0, 0.5):
        expected, ours = (network(tokens, text, mx.array([sigma]), rope) for network in (whole, streamed))
        assert np.array_equal(np.array(ours), np.array(expected))
    references = [np.array(part) for pair in whole.read(tokens, rope[:12]) for part in pair]
    streamed_references = [np.array(part) for pair in streamed.read(tokens, rope[:12]) for part in pair]
    assert all(np.array_equal(a, b) for a, b in zip(references, streamed_references, strict=True))


def test_a_limit_changes_memory_and_not_the_image(folder):
    free = open_pipe(folder)
    expected = free("a fox", output_type="np", **SETTINGS)
    request = free.request(["a fox"], width=64, height=48, steps=2, max_sequence_length=40)
    whole = free.plan(request)
    assert all(phase.streamed == 0 for phase in whole.phases)
    limit = whole.peak_memory * 3 // 4
    pipe = open_pipe(folder, memory_limit=limit)
    planned = pipe.plan(request)
    assert planned.phase("transformer").streamed > 0
    base = mx.get_active_memory()
    output = pipe("a fox", output_type="np", **SETTINGS)
    assert np.array_equal(output.images, expected.images)
    peaks = {phase.name: phase.peak_memory - base for phase in output.timings}
    print(f"limit {limit}, planned {planned.peak_memory}, peaks {peaks}")
    assert max(peaks.values()) <= limit
    assert expected.peak_memory - base > limit


def test_streaming_reads_one_block_ahead_and_keeps_none(folder):
    component = Checkpoint.open(folder).components["transformer"]
    network = load_streamed(component, mx.float32, 1, Reading())
    mx.clear_cache()
    held = mx.get_active_memory()
    sizes = footprint(component, mx.float32).blocks
    assert (len(network.double_blocks), len(network.single_blocks)) == (2, 4)
    for part, left in ((network.double_blocks, max(sizes)), (network.single_blocks, 0)):
        for block in part:
            mx.eval(block.parameters())
            mx.synchronize()
            assert mx.get_active_memory() - held <= 2.05 * max(sizes)
        mx.synchronize(READER)
        mx.clear_cache()
        assert mx.get_active_memory() - held <= 1.05 * left + 2**16


@pytest.mark.parametrize(
    ("resident", "expected"),
    [
        (0, "read d0, read d1, use d0, read s0, use d1, read s1, use s0, read s2, use s1, read s3, use s2, use s3"),
        (1, "read d1, use d0, read s0, use d1, read s1, use s0, read s2, use s1, read s3, use s2, use s3"),
        (4, "read s2, use d0, use d1, use s0, use s1, read s3, use s2, use s3"),
        (6, "use d0, use d1, use s0, use s1, use s2, use s3"),
    ],
)
def test_each_block_is_read_while_the_one_before_it_is_used(folder, resident, expected):
    component, events = Checkpoint.open(folder).components["transformer"], []
    network = load_streamed(component, mx.float32, resident, Reading())

    def recorded(name, read):
        return lambda number: events.append(f"read {name[0]}{number}") or read(number)

    lists = {name: getattr(network, name) for name in ("double_blocks", "single_blocks")}
    for name, blocks in lists.items():
        blocks._read = recorded(name, blocks._read)
    for _ in range(2):
        events.clear()
        for name, blocks in lists.items():
            for number, _ in enumerate(blocks):
                events.append(f"use {name[0]}{number}")
        assert ", ".join(events) == expected


def test_a_run_beyond_the_limit_is_refused_before_anything_is_loaded(folder, monkeypatch):
    pipe = open_pipe(folder, memory_limit="1MB")
    monkeypatch.setattr(streaming.Component, "load", None)
    with pytest.raises(InputError, match=r"needs [\d.]+ MiB, the limit is 0\.954 MiB; no size fits"):
        pipe("a fox", **SETTINGS)


def test_encoding_alone_keeps_to_the_limit(folder):
    free = open_pipe(folder)
    request = free.request(["a fox"], max_sequence_length=40)
    planned = free.plan(request).phase("text_encoder")
    pipe = open_pipe(folder, memory_limit=f"{(planned.peak_memory - 1) / 1000:.3f}kB")
    gc.collect()
    mx.clear_cache()
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    states = pipe.encode_prompt("a fox", max_sequence_length=40)
    assert mx.get_peak_memory() - base < planned.peak_memory
    assert pipe.networks.reading.nbytes > 0
    assert np.array_equal(states, free.encode_prompt("a fox", max_sequence_length=40))
    with pytest.raises(InputError, match=r"the text encoder needs .*; choose a smaller model"):
        open_pipe(folder, memory_limit="100kB").encode_prompt("a fox", max_sequence_length=40)


def test_what_is_quantized_at_loading_stays(official):
    folder = convert(official, official.with_name("plain"), quant="bf16", text_quant="bf16", variant=SHALLOW_VARIANT)
    pipe = open_pipe(folder, quant="qint8")
    planned = pipe.plan(pipe.request(["a fox"], width=64, height=48))
    tight = open_pipe(folder, quant="qint8", memory_limit=planned.peak_memory - 1)
    request = tight.request(["a fox"], width=64, height=48)
    needs = tight.networks.needs(workload(request))
    assert all(phase.streamed == 0 for phase in needs.plan(tight.memory_limit).phases)
    with pytest.raises(
        InputError, match="; convert the model with quant='qint8', text_quant='qint8', which lets it be"
    ):
        checked_plan(tight.networks, workload(request), tight.memory_limit)
    converted = convert(
        official, official.with_name("packed"), quant="qint8", text_quant="qint8", variant=SHALLOW_VARIANT
    )
    packed = open_pipe(converted, memory_limit=planned.peak_memory - 1)
    assert packed.plan(request).fits


def test_what_was_read_is_counted(folder):
    free = open_pipe(folder)
    limit = free.plan(free.request(["a"], width=64, height=48, max_sequence_length=40)).peak_memory * 3 // 4
    pipe = open_pipe(folder, memory_limit=limit)
    for steps in (1, 2):
        phases = {phase.name: phase for phase in pipe("a", **SETTINGS | {"num_inference_steps": steps}).timings}
        took = phases["transformer"]
        assert took.read == steps * took.streamed > 0
        assert 0 <= took.overlap <= 1
        assert (phases["vae"].read, phases["vae"].streamed, phases["vae"].overlap) == (0, 0, None)
    whole = sum(footprint(pipe.checkpoint.components["transformer"], mx.float32).blocks)
    assert took.streamed <= whole


class Clock:
    """Time that passes only where the disk or the computation takes it: reading ends so long after it began."""

    def __init__(self, patch: pytest.MonkeyPatch, seconds: float):
        self.now, self._seconds, self._ready = 0.0, seconds, {}
        self._begin, self._evaluate = mx.async_eval, mx.eval
        patch.setattr(streaming.time, "perf_counter", lambda: self.now)
        patch.setattr(mx, "async_eval", self.begin)
        patch.setattr(mx, "eval", self.evaluate)

    def begin(self, array: mx.array) -> None:
        self._begin(array)
        self._ready[id(array)] = self.now + self._seconds

    def evaluate(self, parameters) -> None:
        self._evaluate(parameters)
        ready = [self._ready.pop(id(x)) for _, x in tree_flatten(parameters) if id(x) in self._ready]
        self.now = max([self.now, *ready])


@pytest.mark.parametrize("reading", [0.001, 1.0, 3.0])
def test_the_overlap_is_what_a_clock_outside_measures(folder, reading, monkeypatch):
    component, counted = Checkpoint.open(folder).components["transformer"], Reading()
    network = load_streamed(component, mx.float32, 0, counted)
    with monkeypatch.context() as patch:
        clock = Clock(patch, reading)
        for work in (0.5, 2.0, 1.0):
            for _ in network.single_blocks:
                clock.now += work
    computing, whole, blocks = 4 * 3.5, clock.now, 12
    assert counted.nbytes == 3 * sum(footprint(component, mx.float32).blocks[2:])
    assert counted.overlap == pytest.approx(1 - (whole - computing) / (blocks * reading))
    assert Reading().overlap is None


def test_command_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = open_pipe(folder)
    limit = pipe.plan(pipe.request(["a"], width=64, height=48)).peak_memory * 3 // 4
    settings = ("t2i", PROMPT, "-m", str(folder), "-W", "64", "-H", "48", "-s", "2", "--seed", "3", "--no-cache")
    done(*settings, "-o", "a.png")
    run = done(*settings, "-o", "b.png", "--memory-limit", str(limit), "--profile", "--json")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    took = next(phase for phase in json.loads(run.stdout)["phases"] if phase["name"] == "transformer")
    assert took["read"] == 2 * took["streamed"] > 0
    lines = [line for line in run.stderr.splitlines() if " a pass, " in line and line.startswith("transformer")]
    assert len(lines) == 1
    assert f"{took['read'] / 2**30:.3f} GiB read" in lines[0]
    assert "the limit is 0.954 MiB" in refusal(*settings, "-o", "c.png", "--memory-limit", "1MB", "--quiet")


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_file_that_is_lost_while_it_is_streamed(folder, tmp_path, damage):
    mine = shutil.copytree(folder, tmp_path / "mine")
    pipe = open_pipe(mine)
    request = pipe.request(["a"], width=64, height=48, steps=3, max_sequence_length=40)
    pipe = open_pipe(mine, memory_limit=pipe.plan(request).peak_memory * 3 // 4)
    weights = mine / "transformer/model.safetensors"

    def on_progress(progress):
        if progress.step is not None:
            weights.unlink() if damage == "gone" else os.truncate(weights, 100_000)

    before = mlx_limits()
    with pytest.raises(CheckpointError, match=r"can't read weights any more: .*; put the files back") as caught:
        pipe.run(request, on_progress=on_progress)
    assert "\n" not in str(caught.value)
    assert mlx_limits() == before


class Low(nn.Module):
    """A stand-in for a layer with an adapter: a low-rank product beside it."""

    def __init__(self, base: nn.Module, down: mx.array, up: mx.array):
        super().__init__()
        self.base, self.down, self.up = base, down, up

    def __call__(self, x: mx.array) -> mx.array:
        return self.base(x) + (x @ self.down) @ self.up


class Factors:
    """Those of some layers, of a rank that differs by block; `asked` are the names that it was asked for."""

    def __init__(self, component: Component):
        self.asked, self._factors = [], {}
        shapes = module_tensors(replace(component, quantization=None).build())
        for key, (name, tensor) in zip(mx.random.split(mx.random.key(0), len(shapes)), shapes.items(), strict=True):
            if len(tensor.shape) == 2 and not name.startswith(
                ("embed", "double_blocks.1.", "single_blocks.2.", "layers.5.")
            ):
                (outputs, inputs), rank = tensor.shape, 1 + sum(map(ord, name)) % 3
                down, up = mx.random.split(key)
                factors = mx.random.normal((inputs, rank), key=down), mx.random.normal((rank, outputs), key=up)
                self._factors[name.removesuffix(".weight")] = [0.1 * factor for factor in factors]

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes for factors in self._factors.values() for factor in factors)

    def beside(self, name: str, layer: nn.Module) -> nn.Module:
        self.asked.append(name)
        return Low(layer, *self._factors[name]) if name in self._factors else layer


def passes(component: Component, network: nn.Module) -> list[np.ndarray]:
    """What a network makes of some tokens, twice."""
    if component.name == "text_encoder":
        ids = mx.arange(12)[None]
        return [np.array(network(ids, ids < 9)) for _ in range(2)]
    config = component.config
    tokens = mx.random.normal((1, 12, config.in_channels), key=mx.random.key(1))
    text = mx.random.normal((1, 5, config.hidden_size), key=mx.random.key(2))
    rope = mx.ones((17, 2, config.attention_head_dim))
    return [np.array(network(tokens, text, mx.array([sigma]), rope)) for sigma in (1.0, 0.5)]


@pytest.mark.parametrize("resident", [0, 3, 40])
@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_layers_with_something_beside_them_are_streamed(folder, name, resident):
    plain = Checkpoint.open(folder).components[name]
    component = replace(plain, adapters=Factors(plain))
    expected = passes(component, component.load(mx.float32))
    names = sorted(component.adapters.asked)
    assert "embed_tokens" in names or {"double_blocks.1.img_attn.qkv", "single_blocks.3.linear2", "img_in"} < {*names}
    component.adapters.asked.clear()
    network = load_streamed(component, mx.float32, resident, Reading())
    ours = passes(component, network)
    assert all(np.array_equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert {*component.adapters.asked} == {*names}
    without = passes(plain, plain.load(mx.float32))
    assert not any(np.array_equal(a, b) for a, b in zip(without, expected, strict=True))
