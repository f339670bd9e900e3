"""What `run` and `preview` are given by hand: plans of other runs, and settings that nobody has checked."""

import mlx.core as mx
import pytest
from PIL import Image

from flux2_mlx import Flux2Pipeline, InputError, Request

SIZE = {"width": 64, "height": 48, "steps": 2}


@pytest.fixture(scope="module")
def pipe() -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, keep=False)


@pytest.fixture(scope="module")
def planned(pipe):
    return pipe.plan(pipe.request(["a"], **SIZE))


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr("flux2_mlx.base_pipeline.Run", lambda *_, **__: pytest.fail("it ran"))


OTHERS = {"width": {"width": 128}, "count": {"images_per_prompt": 3}, "length": {"max_sequence_length": 48}}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_plan_of_another_request_is_refused(other, pipe):
    small = pipe.plan(pipe.request(["a"], max_sequence_length=40, **SIZE))
    with pytest.raises(InputError, match=r"^the plan is of another request, edit, previews or memory_limit"):
        pipe.run(pipe.request(["a"], **{**SIZE, "max_sequence_length": 40, **other}), planned=small)


@pytest.mark.usefixtures("nothing_runs")
def test_a_plan_without_the_pictures_or_previews_or_of_more_memory_is_refused(pipe, planned):
    edit = pipe.edit([Image.new("RGB", (64, 64))])
    request = pipe.request(["a"], **SIZE)
    tight = Flux2Pipeline(pipe.networks, memory_limit=planned.peak_memory + 10**6)
    for run in (
        lambda: pipe.run(pipe.request(["a"], edit=edit, **SIZE), edit, planned=planned),
        lambda: pipe.run(request, planned=planned, previews=True),
        lambda: tight.run(request, planned=planned),
    ):
        with pytest.raises(InputError, match=r"^the plan is of another request"):
            run()


def test_a_plan_is_also_one_of_fewer_and_shorter_texts(pipe):
    planned = pipe.plan(pipe.request(["a", "b"], **SIZE))
    embeds = pipe.encode_prompt("a", max_sequence_length=16)
    request = pipe.request(["", ""], seed=1, **SIZE)
    output = pipe.run(request, planned=planned, prompt_embeds=mx.concatenate([embeds, embeds]))
    assert len(output.images) == 2


UNCHECKED = {
    "height 60 must be a positive multiple of 16": {"height": 60},
    "steps must be 1 to 1000, got 0": {"steps": 0},
    "steps must be a whole number, got 'few'": {"steps": "few"},
    "guidance must be a number, got None": {"guidance": None},
    "max_sequence_length must be 1 to 48, got 9999": {"max_sequence_length": 9999},
    "there is no prompt": {"prompts": ()},
    "a prompt must be text, got int": {"prompts": (1,)},
    "2 seeds don't go with 3 prompts; give one for each image": {"prompts": ("a", "b", "c"), "seeds": (1, 2)},
    "1001 images are too many; make at most 1000 at a time": {"seeds": tuple(range(1001))},
    "seed must be a whole number, got None": {"seeds": (None,)},
    "seeds must be 0 to": {"seeds": (-1,)},
    "1 sigmas don't go with 2 steps; give one for each step": {"sigmas": (1.0,), "shift_steps": 50},
    "shift_steps must be a whole number, got None": {"sigmas": (1.0, 0.5)},
    "1 negative prompts don't go with 1 prompts; give 0": {"negative_prompts": ("b",)},
}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("message", "settings"), UNCHECKED.items(), ids=UNCHECKED)
def test_a_request_that_is_built_by_hand_is_checked(message, settings, pipe):
    sound = {"prompts": ("a",), "height": 64, "width": 64, "steps": 2, "guidance": 1.0, "seeds": (1,)}
    request = Request(**{"max_sequence_length": 48, **sound, **settings})
    for run in (lambda: pipe.run(request), lambda: pipe.preview(request, mx.zeros((1, 16, 32)))):
        with pytest.raises(InputError) as caught:
            run()
        assert str(caught.value).startswith(message)


@pytest.mark.usefixtures("nothing_runs")
def test_so_is_what_does_not_go_together(pipe):
    edit = pipe.edit([Image.new("RGB", (64, 64))], on_canvas=True)
    request = pipe.request(["a"], **SIZE)
    for given, message in (
        ((request, edit), "an image that is painted over keeps its size; leave width and height out"),
        (("a fox",), "request must be Request, got str 'a fox'"),
        ((request, [Image.new("RGB", (64, 64))]), "edit must be Edit, got a list of Image"),
    ):
        with pytest.raises(InputError) as caught:
            pipe.run(*given)
        assert str(caught.value) == message


@pytest.mark.usefixtures("nothing_runs")
def test_previewed_tokens_are_checked(pipe):
    size, channels = pipe.token_size, pipe.checkpoint.fitted_variant.vae.token_channels
    request, length = pipe.request(["a"], **SIZE), 64 * 48 // size**2
    with pytest.raises(InputError) as caught:
        pipe.preview(request, mx.zeros((1, length - 1, channels)))
    expected = f"tokens have shape (1, {length - 1}, {channels}), this run needs (any, {length}, {channels})"
    assert str(caught.value) == expected
    with pytest.raises(InputError, match="tokens have values that are not finite numbers"):
        pipe.preview(request, mx.full((1, length, channels), float("nan")))


def test_the_memory_limit_can_be_set_as_text(pipe):
    own = Flux2Pipeline(pipe.networks)
    own.memory_limit = "3MB"
    assert own.memory_limit == 3_000_000
    with pytest.raises(InputError, match=r"^memory_limit must be a size such as 12GB or 7\.5GiB, got 'abc'$"):
        own.memory_limit = "abc"
    assert own.memory_limit == 3_000_000


AS_CALLED = {
    "num_inference_steps must be 1 to 1000, got 0": {"num_inference_steps": 0},
    "num_inference_steps must be a whole number, got 2.5": {"num_inference_steps": 2.5},
    "guidance_scale must be a number of 0 or more, got -1.0": {"guidance_scale": -1},
    "num_images_per_prompt must be 1 or more, got 0": {"num_images_per_prompt": 0},
    "num_images_per_prompt must be a whole number, got None": {"num_images_per_prompt": None},
    "padding_mask_crop must be 0 or more pixels around the mask, got -1": {"padding_mask_crop": -1},
}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("message", "settings"), AS_CALLED.items(), ids=AS_CALLED)
def test_a_call_names_settings_as_its_caller_does(message, settings, pipe):
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(InputError) as caught:
        pipe("a", image=picture, mask_image=Image.new("L", (64, 64), 255), **settings)
    assert str(caught.value) == message


def test_the_setting_of_a_model_that_is_wrong_is_named():
    for name in ("quant", "text_quant"):
        with pytest.raises(InputError, match=f"^{name} must be text, got int 4$"):
            Flux2Pipeline.from_pretrained("demo", **{name: 4})
