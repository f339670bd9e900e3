"""Runs that are cut short: what was finished goes to the caller, whatever ends the run and however it was planned."""

import functools
import gc
import os
import shutil
from pathlib import Path
from traceback import walk_tb

import mlx.core as mx
import numpy as np
import pytest
from helpers.cli_runner import DEMO
from helpers.damage import edit

from flux2_mlx import Flux2Output, Flux2Pipeline, RangeError, memory, run, unfinished
from flux2_mlx.references import Edit

PROMPT = "a red ring"
SIZE = {"width": 32, "height": 32}
RUN = {**SIZE, "steps": 2}


@pytest.fixture(autouse=True)
def an_image_a_pass(monkeypatch):
    monkeypatch.setattr(memory, "_TOKENS_PER_PASS", 1)


@pytest.fixture(params=["beside", "narrow"])
def pipe(request, tmp_path) -> Flux2Pipeline:
    """Images are decoded at once, or wait until the transformer has made room."""
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", models_dir=tmp_path)
    if request.param == "narrow":
        planned = pipe.plan(pipe.request([PROMPT], **RUN))
        pipe.memory_limit = planned.peak_memory + 100_000
    several = pipe.plan(pipe.request([PROMPT], images_per_prompt=5, **RUN))
    assert several.beside == (request.param == "beside")
    return pipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the first three images are, by the type of output, where nothing stops them."""

    @functools.cache
    def made(output_type: str) -> Flux2Output:
        pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", models_dir=tmp_path_factory.mktemp("whole"))
        settings = {"num_inference_steps": 2, "num_images_per_prompt": 3, "seed": 1, "output_type": output_type}
        return pipe(PROMPT, **SIZE, **settings)

    return made


class FullError(OSError):
    """Of a disk, say."""


def stopped(pipe: Flux2Pipeline, error: BaseException, **settings) -> BaseException:
    """What leaves a call whose callback raises an error at the first step of the fourth of five images."""
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        if len(steps) == 7:
            raise error
        return tensors

    with pytest.raises(type(error)) as caught:
        pipe(
            *(PROMPT,),
            **SIZE,
            **settings,
            num_inference_steps=2,
            num_images_per_prompt=5,
            seed=1,
            callback_on_step_end=callback,
        )
    assert caught.value is error
    return error


def same(images, others) -> bool:
    return len(images) == len(others) and all(
        np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(images, others, strict=True)
    )


@pytest.mark.parametrize(
    ("kind", "output_type"),
    [(FullError, "pil"), (FullError, "np"), (FullError, "latent"), (KeyboardInterrupt, "pil"), (SystemExit, "latent")],
)
def test_an_exception_takes_along_what_is_finished(kind, output_type, pipe, whole):
    error = kind()
    partial = stopped(pipe, error, output_type=output_type).partial_output
    assert same(partial.images, whole(output_type).images)
    assert partial.seeds == whole(output_type).seeds == [1, 2, 3]
    assert [phase.name for phase in partial.timings] == ["text_encoder", "transformer", "vae"]
    assert any("3 finished images" in note for note in getattr(error, "__notes__", ["3 finished images"]))


def test_a_debugger_still_sees_what_a_callback_held(pipe):
    error = stopped(pipe, FullError())
    frames = {frame.f_code.co_name: frame.f_locals for frame, _ in walk_tb(error.__traceback__)}
    assert (frames["callback"]["step"], frames["on_progress"]["callback"]) == (0, frames["stopped"]["callback"])


def test_while_an_error_is_handled_nothing_of_its_run_is_in_memory(pipe):
    pipe.keep = False
    pipe(PROMPT, **SIZE, num_inference_steps=1)
    gc.collect()
    before = mx.get_active_memory()
    with pytest.raises(FullError) as caught:
        pipe(PROMPT, **SIZE, num_inference_steps=1, callback_on_step_end=fail)
    gc.collect()
    assert mx.get_active_memory() <= before + 2**16
    del caught


def fail(*step):
    raise FullError


def test_an_output_that_is_given_is_filled_in(pipe):
    output, steps = Flux2Output(), []

    def on_progress(progress):
        steps.append(progress.step)
        if progress.step is not None and list(progress.images) == [3]:
            raise KeyboardInterrupt

    request = pipe.request([PROMPT], images_per_prompt=5, seed=1, **RUN)
    with pytest.raises(KeyboardInterrupt) as caught:
        pipe.run(request, on_progress=on_progress, output=output)
    assert caught.value.partial_output is output
    assert (len(output.images), output.seeds) == (3, [1, 2, 3])
    assert pipe.run(request, output=output) is output
    assert (len(output.images), output.seeds) == (5, [1, 2, 3, 4, 5])


def test_without_a_finished_image_there_is_nothing_to_take_along(pipe):
    def on_progress(progress):
        if progress.step is not None:
            raise KeyboardInterrupt

    output = Flux2Output()
    with pytest.raises(KeyboardInterrupt) as caught:
        pipe.run(pipe.request([PROMPT], **RUN), on_progress=on_progress, output=output)
    assert not hasattr(caught.value, "partial_output")
    assert (output.images, output.seeds) == (None, [])


@pytest.fixture
def three_a_pass(monkeypatch):
    monkeypatch.setattr(memory, "_TOKENS_PER_PASS", 3 * 4)


@pytest.mark.usefixtures("three_a_pass")
def test_an_image_that_can_not_be_saved_is_no_obstacle_to_others(pipe):
    heard = []

    def on_progress(progress):
        if progress.image is not None:
            heard.extend(progress.images)
            if progress.images == (1,):
                raise FullError

    with pytest.raises(FullError) as caught:
        pipe.run(pipe.request([PROMPT], images_per_prompt=3, seed=1, **RUN), on_progress=on_progress)
    assert heard == [0, 1, 2]
    assert caught.value.partial_output.seeds == [1, 2, 3]


@pytest.mark.usefixtures("three_a_pass")
def test_an_interruption_while_one_is_decoded_loses_none_of_its_pass(pipe, monkeypatch):
    decode, calls = run.decode_tokens, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(run, "decode_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        pipe.run(pipe.request([PROMPT], images_per_prompt=3, seed=1, **RUN))
    monkeypatch.undo()
    assert same(
        caught.value.partial_output.images,
        pipe(PROMPT, **SIZE, seed=1, num_inference_steps=2, num_images_per_prompt=3).images,
    )


@pytest.mark.usefixtures("three_a_pass")
def test_one_that_is_no_image_loses_no_other(pipe):
    def on_progress(progress):
        if progress.step is not None and progress.step.number == 2:
            tokens = np.array(progress.step.tokens)
            tokens[1] = 1e36
            return mx.array(tokens)
        return None

    with pytest.raises(RangeError, match="the VAE gave") as caught:
        pipe.run(pipe.request([PROMPT], images_per_prompt=3, seed=1, **RUN), on_progress=on_progress)
    assert caught.value.partial_output.seeds == [1, 3]


def test_pictures_are_hashed_once_in_a_run_and_only_if_images_wait(pipe, monkeypatch):
    real, calls = unfinished._pictures, []
    monkeypatch.setattr(unfinished, "_pictures", lambda edit: (calls.append(edit), real(edit))[1])
    request = pipe.request([PROMPT], images_per_prompt=3, seed=1, **RUN)
    pipe.run(request, resume=True)
    assert len(calls) == (0 if pipe.plan(request).beside else 1)


def flip_and_set_back(name):
    """Change bytes of a file that no sample may meet, and set its time of change back."""

    def change(folder):
        before = (folder / name).stat()
        with (folder / name).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(flip_and_set_back(f"{part}/model.safetensors") for part in ("transformer", "text_encoder", "vae")),
        edit("transformer/config.json", rope_theta=10.0),
        edit("text_encoder/config.json", rope_theta=10.0),
        edit("tokenizer/tokenizer_config.json", padding_side="left"),
    ],
)
def test_images_that_a_changed_model_has_left_are_not_gone_on_with(change, tmp_path):
    folder = Path(shutil.copytree(DEMO, tmp_path / "model"))

    def keys():
        pipe = Flux2Pipeline.from_pretrained(folder)
        return list(unfinished._keys(pipe.networks, pipe.request([PROMPT], seed=1, **RUN), Edit()))

    whole = keys()
    assert keys() == whole
    change(folder)
    assert keys() != whole
