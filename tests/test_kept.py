"""Runs within others, which a callback makes: they have what the outer one leaves of the memory, and take nothing of
it away."""

import mlx.core as mx
import pytest
from helpers.in_memory import demo, taken

from flux2_mlx.errors import InputError

OUTER = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 3}
INNER = {"width": 16, "height": 16, "num_inference_steps": 1, "seed": 5}


@pytest.fixture(scope="module")
def alone() -> list:
    """The images of both runs by themselves."""
    pipe = demo()
    return [pipe(prompt, **settings).images[0] for prompt, settings in (("a fox", OUTER), ("a hen", INNER))]


@pytest.mark.parametrize(("limit", "refused", "keep"), [("12MB", True, True), ("14MB", False, False)])
def test_a_preview_stays_within_the_limit_or_is_refused(limit, refused, keep, alone):
    heard, base = [], taken()

    def look(pipe, step, timestep, tensors):
        request = pipe.request(["a fox"], width=64, height=48)
        mx.reset_peak_memory()
        if refused:
            with pytest.raises(InputError, match=r"VAE needs 9.2 MiB, and the run that is going on leaves [5-7]"):
                pipe.preview(request, tensors["latents"])
        else:
            assert pipe.preview(request, tensors["latents"])[0].size == (64, 48)
        heard.append(step)

    output = demo(memory_limit=limit, keep=keep)("a fox", **OUTER, callback_on_step_end=look)
    assert heard == [0, 1]
    assert output.peak_memory - base <= {"12MB": 12, "14MB": 14}[limit] * 10**6
    assert output.images[0] == alone[0]


def test_a_preview_has_what_a_run_has_planned_for_it():
    pipe, seen = demo(memory_limit="13MB", keep=False), []
    request = pipe.request(["a fox"], width=64, height=48, steps=2, seed=3)

    def look(progress):
        if progress.step is not None:
            seen.extend(pipe.preview(request, progress.step.estimate))

    (last,) = pipe.run(request, on_progress=look, previews=True).images
    assert seen[1] == last != seen[0]


@pytest.mark.parametrize(("same", "keep"), [(True, True), (False, False)])
def test_the_memory_of_both_is_within_the_limit(same, keep, alone):
    base = taken()
    outer = demo(memory_limit="12MB", keep=keep)
    other = outer if same else demo(memory_limit="12MB", keep=keep)
    peaks = []

    def make(pipe, step, timestep, tensors):
        output = other("a hen", **INNER)
        assert output.images[0] == alone[1]
        peaks.append(max(phase.peak_memory for phase in output.timings) - base)
        assert other.plan(other.request(["a hen"], width=16, height=16)).limit < 8.5 * 10**6
        with pytest.raises(InputError, match="and the run that is going on leaves"):
            other("a hen", **OUTER)

    output = outer("a fox", **OUTER, callback_on_step_end=make)
    assert len(peaks) == 2
    assert max(*peaks, output.peak_memory - base) <= 12 * 10**6
    assert other.plan(other.request(["a hen"], width=16, height=16)).limit == 12 * 10**6
    assert output.images[0] == alone[0]


def test_another_pipeline_keeps_nothing_more_in_a_run_of_the_first():
    outer, other = demo(), demo()
    other.encode_prompt("a hen")

    def make(pipe, step, timestep, tensors):
        other("a hen", **INNER)
        assert other.networks.kept.names == ("text_encoder",)

    outer("a fox", **(OUTER | {"num_inference_steps": 1}), callback_on_step_end=make)
    assert set(outer.networks.kept.names) == {"text_encoder", "transformer", "vae"}
    other("a hen", **INNER)
    assert set(other.networks.kept.names) == {"text_encoder", "transformer", "vae"}


def test_phases_of_an_inner_run_are_none_of_the_outer_one_s():
    pipe, inner = demo(), []

    def make(pipe, step, timestep, tensors):
        inner.append(pipe("a hen", **(INNER | {"width": 128, "height": 128})))

    outer = pipe("a fox", **(OUTER | {"num_inference_steps": 1}), callback_on_step_end=make)
    largest = max(output.peak_memory for output in inner)
    transformer = next(phase for phase in outer.timings if phase.name == "transformer")
    assert 0 < transformer.peak_memory < largest
