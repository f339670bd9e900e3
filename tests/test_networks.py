"""Networks that stay in memory between runs: which, that they change nothing but the loading, and who gives way."""

import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import save_for_demo
from helpers.checkpoints import convert
from helpers.in_memory import demo, taken
from helpers.mlx_state import mlx_limits
from PIL import Image

from flux2_mlx import DeviceError, Flux2Pipeline, upsampling
from flux2_mlx.checkpoint import Component
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.memory import PhasePlan, Plan

PHASES = ["text_encoder", "transformer", "vae"]
SETTINGS = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 3}


def planned_with_kept(pipe: Flux2Pipeline, **settings) -> Plan:
    planned = pipe.plan(pipe.request(["a fox"], width=64, height=48, **settings))
    return planned.keeping(pipe.networks.may_stay, pipe.networks.kept.names)


def pixels(pipe: Flux2Pipeline, prompt: str = "a fox", **settings) -> bytes:
    return pipe(prompt, **(SETTINGS | settings)).images[0].tobytes()


def test_a_loop_loads_each_network_once(loads):
    pipe = demo()
    images = {pixels(pipe, prompt) for prompt in ("a fox", "a cat", "a hen") for _ in range(3)}
    pipe.encode_prompt("a dog")
    pipe.decode(np.zeros((1, 8, 12, 16), np.float32))
    assert loads == PHASES
    assert len(images) == 3


def test_adapters_and_sizes_change_and_nothing_is_loaded_again(loads, tmp_path):
    pipe, path = demo(), save_for_demo(tmp_path / "a.safetensors")
    plain = pixels(pipe)
    for name in "ab":
        pipe.load_lora_weights(path, adapter_name=name)
    images = []
    for weights in ({"a": 20.0}, {"b": -9.0}, {"a": 20.0, "b": 20.0}, {"a": 20.0}):
        pipe.set_adapters(list(weights), list(weights.values()))
        images.append(pixels(pipe))
        pixels(pipe, width=32)
    pipe.unload_lora_weights()
    assert pixels(pipe) == plain
    assert loads == PHASES
    assert (len({plain, *images}), images[0]) == (4, images[3])


def test_without_keep_each_is_loaded_for_its_phase(loads):
    pipe, before = demo(keep=False), taken()
    for _ in range(2):
        pixels(pipe)
        assert taken() <= before + 2**12
    assert loads == 2 * PHASES
    with pytest.raises(InputError, match="keep must be True or False, got str"):
        demo(keep="yes")


@pytest.mark.parametrize("options", [{}, {"quant": "qint8", "text_quant": "qint4"}, {"dtype": "float16"}])
def test_pixels_are_the_same(options):
    kept, plain, picture = demo(**options), demo(keep=False, **options), Image.new("RGB", (80, 64), "teal")
    for settings in ({}, {"image": picture}, {"image": picture, "strength": 0.5}, {"num_images_per_prompt": 3}, {}):
        settings |= {"width": 80, "height": 64, "num_inference_steps": 2, "seed": 3, "output_type": "np"}
        assert np.array_equal(kept("a fox", **settings).images, plain("a fox", **settings).images)


def test_previews_load_no_vae_again_and_again(loads):
    def look(pipe, step, timestep, tensors):
        request = pipe.request(["a fox"], width=64, height=48)
        assert pipe.preview(request, tensors["latents"])[0].size == (64, 48)

    pipe = demo()
    pipe("a fox", **(SETTINGS | {"num_inference_steps": 6}), callback_on_step_end=look)
    assert sorted(loads) == sorted(PHASES)


def test_a_prompt_of_the_cache_needs_no_encoder(models, loads):
    pipe = demo(prompt_cache=True)
    pixels(pipe)
    pipe.release()
    pixels(pipe)
    assert loads == [*PHASES, "transformer", "vae"]
    assert pipe.networks.kept_bytes < pipe.plan(pipe.request(["a"])).phase("transformer").weights * 2


def test_the_plan_counts_what_is_kept():
    base, pipe = taken(), demo()
    planned = planned_with_kept(pipe)
    assert planned.kept == ("transformer", "vae", "text_encoder")
    alone = pipe.plan(pipe.request(["a fox"], width=64, height=48))
    whole = sum(phase.weights for phase in alone.phases)
    assert [phase.weights for phase in planned.phases] == [whole] * 3
    pipe("a fox", **SETTINGS)
    for _ in range(40):  # how far MLX allocates ahead differs
        timings = pipe("a cat", **SETTINGS).timings
        ratios = [
            phase.peak_memory / (took.peak_memory - base) for phase, took in zip(planned.phases, timings, strict=True)
        ]
        assert min(ratios) >= 1
        if max(ratios) <= 1.1:
            break
    assert max(ratios) <= 1.1


def test_the_limits_of_mlx_count_what_is_kept_once():
    pipe, seen = demo(memory_limit="60MB"), {}
    others = mx.ones(10**6)
    mx.eval(others)
    base = taken()
    pipe("a fox", **SETTINGS)
    request = pipe.request(["a fox"], width=64, height=48, steps=1)
    pipe.run(request, on_progress=lambda progress: seen.update({progress.phase: mlx_limits()[0]}))
    for phase in planned_with_kept(pipe).phases:
        assert base + phase.weights < seen[phase.name] <= base + phase.peak_memory + 2**18  # allocations are rounded


@pytest.mark.parametrize("share", [1.0, 1.2, 1.6, 2.5])
def test_only_what_fits_is_kept(share, loads):
    alone = demo().plan(demo().request(["a fox"], width=64, height=48))
    base, limit = taken(), int(alone.peak_memory * share)
    pipe = demo(memory_limit=limit)
    planned = planned_with_kept(pipe)
    for _ in range(3):
        output = pipe("a fox", **SETTINGS)
        assert max(phase.peak_memory for phase in output.timings) - base <= limit
    assert loads == PHASES + 2 * [name for name in PHASES if name not in planned.kept]
    assert taken() - base <= 1.1 * sum(alone.phase(name).weights for name in planned.kept) + 2**20
    if share == 1:
        assert "transformer" not in planned.kept


def test_a_larger_run_has_its_room(loads):
    limit = demo().plan(demo().request(["a fox"], width=256, height=192)).peak_memory
    base, pipe = taken(), demo(memory_limit=limit)
    pixels(pipe)
    assert set(planned_with_kept(pipe).kept) == set(PHASES)
    output = pipe("a fox", **(SETTINGS | {"width": 256, "height": 192}))
    assert max(phase.peak_memory for phase in output.timings) - base <= limit


def test_what_is_streamed_is_not_kept():
    pipe = demo(memory_limit="4.5MB")
    request = pipe.request(["a fox"], width=16, height=16)
    assert pipe.plan(request).phase("transformer").streamed > 0
    for _ in range(2):
        pipe.run(request)
        assert pipe.networks.kept_bytes < pipe.plan(request).phase("transformer").streamed


def test_release_gives_memory_back(loads):
    base, pipe = taken(), demo()
    expected = pixels(pipe)
    assert mx.get_active_memory() > base + 4 * 10**6
    pipe.release()
    assert taken() <= base + 2**12
    assert pixels(pipe) == expected
    assert loads == 2 * PHASES
    del pipe
    assert taken() <= base + 2**12  # and so does a pipeline that is no more


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_keeps_nothing(method, loads):
    base, pipe = taken(), demo()
    pixels(pipe)
    getattr(pipe, method)()
    assert taken() <= base + 2**12
    pixels(pipe)
    assert taken() <= base + 2**12
    assert loads == 2 * PHASES


@pytest.mark.parametrize("limit", [None, "12MB"])
def test_another_pipeline_that_needs_the_room_gets_it(limit, loads):
    first = demo()
    pixels(first)
    pixels(demo(memory_limit=limit), width=16, height=16)
    loads.clear()
    pixels(first)
    assert loads == ([] if limit is None else PHASES)


def test_other_networks_share_nothing(loads):
    pipe = demo()
    pixels(pipe)
    other = pipe.networks.quantized("qint8", "qint8")
    assert (other.kept_bytes, pipe.networks.kept_bytes > 0) == (0, True)
    assert other.load("transformer") is not pipe.networks.load("transformer")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_whole_networks(error, loads):
    def stop(pipe, step, timestep, tensors):
        raise error

    pipe = demo()
    with pytest.raises(error):
        pipe("a fox", **SETTINGS, callback_on_step_end=stop)
    assert pixels(pipe) == pixels(demo(keep=False))
    assert loads[:4] == [*PHASES, "text_encoder"]  # those of the other pipeline follow


def test_without_memory_nothing_is_kept(monkeypatch):
    pipe, base = demo(), taken()
    expected = pixels(pipe)

    def fail(*arguments):
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")

    with monkeypatch.context() as patch:
        patch.setattr("flux2_mlx.vae.VAE.decode", fail)
        with pytest.raises(DeviceError) as caught:
            pixels(pipe)
    del caught
    assert taken() <= base + 2**12
    assert pixels(pipe) == expected


def test_a_network_that_can_not_be_loaded_is_not_kept(monkeypatch):
    pipe, load = demo(), Component.load
    expected = pixels(demo(keep=False))

    def broken(component, *arguments):
        if component.name == "transformer":
            raise CheckpointError("damaged")
        return load(component, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Component, "load", broken)
        with pytest.raises(CheckpointError, match="damaged"):
            pixels(pipe)
    assert pixels(pipe) == expected


def test_threads_use_the_same_networks(loads):
    pipe, images = demo(), {}

    def run(seed: int) -> None:
        images[seed] = [pixels(pipe, seed=seed) for _ in range(2)]

    for seeds in ((1, 2), (3,)):  # the last one uses what a thread has loaded that is no more
        threads = [threading.Thread(target=run, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert loads == PHASES
    plain = demo(keep=False)
    assert images == {seed: [pixels(plain, seed=seed)] * 2 for seed in (1, 2, 3)}


def test_a_run_within_another_one_keeps_no_more_than_that():
    limit = demo().plan(demo().request(["a fox"], width=256, height=192)).peak_memory
    pipe, inner = demo(memory_limit=limit), []

    def nested(pipe, step, timestep, tensors):
        inner.append(pixels(pipe))
        assert set(pipe.networks.kept.names) <= {"vae"}

    pipe("a fox", **(SETTINGS | {"width": 256, "height": 192}), callback_on_step_end=nested)
    assert inner == [pixels(demo(keep=False))] * 2
    pixels(pipe)
    assert set(pipe.networks.kept.names) == set(PHASES)


def test_a_language_model_has_the_encoder_that_is_there(official, tmp_path, monkeypatch, loads):
    monkeypatch.setattr(upsampling, "UPSAMPLE_T2I", "upsample")
    folder, writing = convert(official, tmp_path / "mlx"), {"seed": 7, "max_new_tokens": 12, "temperature": 1.0}
    options = {"dtype": "float32", "prompt_cache": False}
    pipe, plain = (Flux2Pipeline.from_pretrained(folder, **options, keep=keep) for keep in (True, False))
    expected = plain.upsample_prompt("a red fox", **writing), pixels(plain, max_sequence_length=40)
    assert loads == ["text_encoder", "language_model", *PHASES]
    loads.clear()
    for _ in range(2):
        assert (pipe.upsample_prompt("a red fox", **writing), pixels(pipe, max_sequence_length=40)) == expected
    assert loads == ["text_encoder", "language_model", "transformer", "vae"]


def test_what_a_plan_keeps():
    phases = PhasePlan("text_encoder", 6, 1), PhasePlan("transformer", 8, 4), PhasePlan("vae", 1, 9)
    weights = {"transformer": 8, "vae": 1, "text_encoder": 6}

    def kept(limit: int, phases=phases, **options) -> tuple[str, ...]:
        return Plan(phases, limit, **options).keeping(weights).kept

    assert [kept(limit) for limit in (12, 13, 18, 19, 24)] == [
        *((), ("vae",), ("transformer", "vae"), ("transformer", "vae"), ("transformer", "vae", "text_encoder"))
    ]
    assert kept(11) == ()  # of a run that does not fit itself
    streamed = (*phases[:1], replace(phases[1], streamed=3), phases[2])
    assert kept(100, streamed) == ("vae", "text_encoder")
    both = (phases[0], replace(phases[1], weights=9), replace(phases[2], weights=9))
    assert kept(18, both, beside=True) == ("transformer", "vae")
    whole = Plan(phases, 24).keeping(weights)
    assert [phase.weights for phase in whole.phases] == [15, 15, 15]
    assert whole.peak_memory == 24


def test_who_gives_way_to_a_language_model():
    writing = Plan((PhasePlan("vision", 2, 1), PhasePlan("language_model", 10, 2)), 20)
    weights = {"transformer": 8, "vae": 1, "text_encoder": 6, "language_model": 4}
    assert writing.keeping(weights).kept == ("text_encoder", "language_model")  # what it has no use for is not loaded
    planned = writing.keeping(weights, ["transformer", "vae"])
    assert planned.kept == ("transformer", "text_encoder")
    assert [phase.peak_memory for phase in planned.phases] == [17, 20]
