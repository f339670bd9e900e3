"""Runs of many images: what is finished early, what is kept, and what is checked on the way out of each network."""

import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from flux2_mlx import Flux2Pipeline, RangeError, memory
from flux2_mlx.checkpoint import Component
from flux2_mlx.embedding_cache import UNFINISHED
from flux2_mlx.run import Run

PROMPT = "a red ring"
SIZE = {"width": 32, "height": 32, "steps": 2}


@pytest.fixture(autouse=True)
def an_image_a_pass(monkeypatch):
    monkeypatch.setattr(memory, "_TOKENS_PER_PASS", 1)


@pytest.fixture
def pipe(tmp_path) -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", dtype="float32", models_dir=tmp_path, keep=False)


@pytest.fixture
def narrow(pipe) -> Flux2Pipeline:
    """Within a limit that the VAE does not fit into beside the whole transformer."""
    planned = pipe.plan(pipe.request([PROMPT], **SIZE))
    pipe.memory_limit = planned.peak_memory + 100_000
    return pipe


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    names, load = [], Component.load

    def recorded(component, *arguments):
        names.append(component.name)
        return load(component, *arguments)

    monkeypatch.setattr(Component, "load", recorded)
    return names


def hear(heard: list, stop: tuple[int, int] | None = None):
    """A listener that notes what is denoised and finished, and interrupts at a step of an image."""

    def on_progress(progress):
        if progress.step is not None:
            heard.append(("step", *progress.images, progress.step.number))
            if (*progress.images, progress.step.number) == stop:
                raise KeyboardInterrupt
        if progress.image is not None:
            heard.append(("image", *progress.images))

    return on_progress


def finished(heard: list) -> list[int]:
    return [event[1] for event in heard if event[0] == "image"]


def pixels(output) -> list[bytes]:
    return [image.tobytes() for image in output.images]


def test_an_image_is_finished_before_the_next_is_denoised(pipe, loads):
    heard = []
    pipe.run(pipe.request([PROMPT], images_per_prompt=3, seed=1, **SIZE), on_progress=hear(heard))
    assert heard == [(kind, i, *n) for i in range(3) for kind, *n in [("step", 1), ("step", 2), ("image",)]]
    assert loads == ["text_encoder", "transformer", "vae"]


def test_the_images_are_those_of_runs_of_one(pipe):
    several = pipe.run(pipe.request([PROMPT, "a star"], images_per_prompt=2, seed=1, **SIZE))
    for place, prompt in enumerate([PROMPT, PROMPT, "a star", "a star"]):
        single = pipe.run(pipe.request([prompt], seed=1 + place, **SIZE))
        assert pixels(single) == [pixels(several)[place]]


def test_phases_that_interrupt_each_other_are_told_apart(pipe):
    output = pipe.run(pipe.request([PROMPT], images_per_prompt=3, seed=1, **SIZE))
    assert [phase.name for phase in output.timings] == ["text_encoder", "transformer", "vae"]
    assert all(phase.seconds > 0 and phase.peak_memory > 0 for phase in output.timings)


def test_what_is_finished_before_an_interruption_was_handed_out(pipe):
    heard = []
    with pytest.raises(KeyboardInterrupt):
        pipe.run(pipe.request([PROMPT], images_per_prompt=5, seed=1, **SIZE), on_progress=hear(heard, (3, 1)))
    assert finished(heard) == [0, 1, 2]


def test_without_room_for_both_the_images_wait(narrow, loads):
    heard = []
    request = narrow.request([PROMPT], images_per_prompt=3, seed=1, **SIZE)
    assert not narrow.plan(request).beside
    narrow.run(request, on_progress=hear(heard), resume=True)
    assert [event[0] for event in heard] == ["step"] * 6 + ["image"] * 3
    assert loads == ["text_encoder", "transformer", "vae"]


def test_images_that_wait_are_still_finished_after_an_interruption(narrow, monkeypatch):
    heard, alive, load = [], [], Component.load

    def recorded(component, *arguments):
        gc.collect()
        alive.append((component.name, mx.get_active_memory()))
        return load(component, *arguments)

    monkeypatch.setattr(Component, "load", recorded)
    request = narrow.request([PROMPT], images_per_prompt=5, seed=1, **SIZE)
    with pytest.raises(KeyboardInterrupt):
        narrow.run(request, on_progress=hear(heard, (3, 1)), resume=True)
    assert finished(heard) == [0, 1, 2]
    before = dict(alive)
    assert before["vae"] < before["transformer"] + 1_000_000  # the transformer has made room


def test_a_killed_run_is_gone_on_with(narrow, tmp_path, monkeypatch, loads):
    request = narrow.request([PROMPT, "a star"], images_per_prompt=2, seed=1, **SIZE)
    expected = pixels(narrow.run(request))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_finish", lambda run: None)  # as a kill would, nothing is decoded
        with pytest.raises(KeyboardInterrupt):
            narrow.run(request, on_progress=hear([], (2, 1)), resume=True)
    assert len(list((tmp_path / UNFINISHED).iterdir())) == 2
    heard = []
    assert pixels(narrow.run(request, on_progress=hear(heard), resume=True)) == expected
    assert {event[1] for event in heard if event[0] == "step"} == {2, 3}
    assert finished(heard) == [0, 1, 2, 3]
    assert list((tmp_path / UNFINISHED).iterdir()) == []


def test_images_of_one_pass_are_kept_until_they_are_decoded(narrow, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_TOKENS_PER_PASS", 4096)
    request, kept = narrow.request([PROMPT], images_per_prompt=3, seed=1, **SIZE), []

    def on_progress(progress):
        if progress.phase == "vae":
            kept.append(len(list((tmp_path / UNFINISHED).iterdir())))

    planned = narrow.plan(request)
    narrow.memory_limit = planned.peak_memory + 100_000
    assert not narrow.plan(request).beside
    narrow.run(request, on_progress=on_progress, resume=True)
    assert kept == [3, 3, 2, 1]


@pytest.mark.parametrize("changed", [{"seed": 9}, {"steps": 3}, {"prompts": ["a star"]}, {"guidance": 2.0}])
def test_what_is_kept_of_other_settings_is_not_gone_on_with(changed, narrow, monkeypatch):
    settings = {"prompts": [PROMPT], "images_per_prompt": 2, "seed": 1, **SIZE}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_finish", lambda run: None)
        with pytest.raises(KeyboardInterrupt):
            narrow.run(narrow.request(**settings), on_progress=hear([], (1, 2)), resume=True)
    heard = []
    narrow.run(narrow.request(**settings | changed), on_progress=hear(heard), resume=True)
    assert {event[1] for event in heard if event[0] == "step"} == {0, 1}


def test_images_between_the_steps_load_the_decoder_once(pipe, loads):
    previews = []

    def on_progress(progress):
        if progress.step is not None:
            previews.append(progress.preview())

    request = pipe.request([PROMPT], seed=1, width=32, height=32, steps=4)
    output = pipe.run(request, on_progress=on_progress, previews=True)
    assert loads == ["text_encoder", "transformer", "vae"]
    assert previews[-1][0].tobytes() == pixels(output)[0] != previews[0][0].tobytes()


def test_a_plan_has_both_networks_where_both_are_in_memory(pipe):
    one, several = (pipe.plan(pipe.request([PROMPT], images_per_prompt=n, **SIZE)) for n in (1, 3))
    vae = pipe.plan(pipe.request([PROMPT], **SIZE)).phase("vae").weights
    assert (one.beside, several.beside) == (False, True)
    assert (
        several.phase("transformer").weights == several.phase("vae").weights == one.phase("transformer").weights + vae
    )


def spoil(monkeypatch, network: str, change) -> None:
    """`change` the weights of a network whenever it is loaded."""
    load = Component.load

    def spoiled(component, *arguments):
        module = load(component, *arguments)
        if component.name == network:
            change(module)
        return module

    monkeypatch.setattr(Component, "load", spoiled)


def one_weight(path: str, value: float):
    def change(module) -> None:
        for part in path.split(".")[:-1]:
            module = module[int(part)] if part.isdecimal() else module[part]
        name = path.split(".")[-1]
        weight = np.array(module[name].astype(mx.float32))
        weight.flat[0] = value
        module[name] = mx.array(weight)

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, -1e38])
@pytest.mark.parametrize("weight", ["decoder.conv_in.weight", "decoder.conv_out.bias", "bn.running_mean"])
def test_one_damaged_weight_of_the_decoder_is_told(weight, value, pipe, monkeypatch):
    spoil(monkeypatch, "vae", one_weight(weight, value))
    with pytest.raises(RangeError, match=r"the VAE gave .*`flux2_mlx.verification.verify` tells whether"):
        pipe.run(pipe.request([PROMPT], **SIZE))


def test_a_negative_variance_is_told(pipe, monkeypatch):
    spoil(monkeypatch, "vae", one_weight("bn.running_var", -1.0))
    for output_type in ("pil", "np", "latent"):
        with pytest.raises(RangeError, match="the VAE gave values that are not finite numbers"):
            pipe.run(pipe.request([PROMPT], **SIZE), output_type=output_type)


def test_tokens_that_overflow_in_the_decoder_are_told(pipe):
    def on_progress(progress):
        return mx.full(progress.step.tokens.shape, 1e36) if progress.step else None

    with pytest.raises(RangeError, match="the VAE gave"):
        pipe.run(pipe.request([PROMPT], **SIZE), on_progress=on_progress)


def test_a_damaged_text_encoder_is_told(pipe, monkeypatch):
    spoil(monkeypatch, "text_encoder", one_weight("layers.0.mlp.down_proj.weight", np.nan))
    with pytest.raises(RangeError, match="the text encoder gave values that are not finite numbers"):
        pipe.run(pipe.request(["another prompt"], **SIZE))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_damaged_encoder_of_references_is_told(bad, pipe, monkeypatch):
    from PIL import Image

    spoil(monkeypatch, "vae", one_weight("encoder.conv_in.bias", bad))
    edit = pipe.edit([Image.new("RGB", (64, 64), "teal")])
    with pytest.raises(RangeError, match="the VAE gave values that are not finite numbers"):
        pipe.run(pipe.request([PROMPT], edit=edit, **SIZE), edit)


def test_runs_of_several_threads_take_turns_as_a_whole(tmp_path):
    heard = []

    def work(seed: int) -> None:
        pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", models_dir=tmp_path)
        pipe.run(pipe.request([PROMPT], seed=seed, **SIZE), on_progress=lambda progress: heard.append(seed))

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(work, range(6)))
    turns = [seed for place, seed in enumerate(heard) if place == 0 or heard[place - 1] != seed]
    assert sorted(turns) == list(range(6))


THREADS = """
import threading
from concurrent.futures import ThreadPoolExecutor
from flux2_mlx import Flux2Pipeline

def work(seed):
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)
    return pipe("a red ring", width=32, height=32, num_inference_steps=1, seed=seed).images[0].tobytes()

if {pool}:
    with ThreadPoolExecutor(2) as executor:
        list(executor.map(work, range(4)))
else:
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print("done")
"""


DAEMON = """
import threading
from flux2_mlx import Flux2Pipeline

started = threading.Event()

def work():
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)
    pipe.set_progress_bar_config(disable=True)
    started.set()
    pipe("a red ring", width=64, height=64, num_inference_steps=1000)

threading.Thread(target=work, daemon=True).start()
started.wait()
threading.Event().wait(0.3)
print("done")
"""


# The thread is between two runs, and awake while Python takes itself apart.
BETWEEN = """
import threading, time
from flux2_mlx import Flux2Pipeline

class Late:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)

late, made = Late(), threading.Event()

def work():
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)
    pipe.set_progress_bar_config(disable=True)
    pipe("a red ring", width=32, height=32, num_inference_steps=1)
    made.set()
    while True:
        time.sleep(0.01)

threading.Thread(target=work, daemon=True).start()
made.wait()
print("done")
"""


@pytest.mark.parametrize("script", [DAEMON, BETWEEN])
def test_a_process_that_ends_before_a_daemon_thread_ends_cleanly(script, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("pool", [True, False])
def test_a_process_whose_threads_ran_a_pipeline_ends_cleanly(pool, tmp_path):
    script = THREADS.format(pool=pool)
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_a_thread_that_ran_a_pipeline_leaves_no_streams_behind(pipe, monkeypatch):
    cleared, workers = [], []
    monkeypatch.setattr(mx, "clear_streams", lambda: cleared.append(threading.get_ident()))

    def work() -> None:
        workers.append(threading.get_ident())
        for _ in range(2):
            pipe.run(pipe.request([PROMPT], **SIZE))
        assert cleared == []

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert cleared == workers
