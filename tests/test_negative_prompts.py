"""Negative prompts: one for each prompt, in the plan, in the request, and only where there is guidance."""

from typing import Any

import numpy as np
import pytest
from helpers.variants import change_variant

from flux2_mlx import Flux2Pipeline, InputError, unfinished
from flux2_mlx.advice import workload
from flux2_mlx.config import VARIANTS
from flux2_mlx.networks import Networks
from flux2_mlx.references import Edit
from flux2_mlx.request import Request

FOX, CAT, GUIDED = "a fox", "a cat", {"guidance_scale": 3.0}
FEATURES = VARIANTS["demo"].text.output_size
SETTINGS = {"height": 32, "width": 48, "num_inference_steps": 2, "seed": 5, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe() -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)


@pytest.fixture(scope="module")
def guided() -> Flux2Pipeline:
    """The same weights as a model with classifier-free guidance."""
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, keep=False)
    return change_variant(pipe, distilled=False)


def latents(pipe: Flux2Pipeline, *args: Any, **settings: Any) -> np.ndarray:
    return pipe(*args, **SETTINGS | settings).images


def assert_close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_each_prompt_has_its_own(guided, loads):
    two = GUIDED | {"num_images_per_prompt": 2}
    batch = latents(guided, [FOX, CAT], negative_prompt=[CAT, "red"], **two)
    assert loads == ["text_encoder", "transformer", "vae"]
    assert_close(batch[2:], latents(guided, CAT, negative_prompt="red", **two | {"seed": 7}))
    embeds = guided.encode_prompt(["red"])
    assert_close(batch[2:], latents(guided, CAT, negative_prompt_embeds=embeds, **two | {"seed": 7}))
    usual = latents(guided, [FOX, CAT], **two)
    assert min(np.abs(a - b).max() for a, b in zip(batch, usual, strict=True)) > 0.01


def test_one_is_for_all_prompts(guided):
    one = latents(guided, [FOX, CAT], negative_prompt="red", **GUIDED)
    assert_close(one, latents(guided, [FOX, CAT], negative_prompt=["red", "red"], **GUIDED))
    assert_close(one, latents(guided, [FOX, CAT], negative_prompt_embeds=guided.encode_prompt("red"), **GUIDED))


def test_encoded_ones_need_no_text_encoder(guided, loads):
    embeds = guided.encode_prompt([FOX, "red"])
    loads.clear()
    given = latents(guided, prompt_embeds=embeds[:1], negative_prompt_embeds=np.array(embeds[1:]), **GUIDED)
    assert loads == ["transformer", "vae"]
    assert_close(given, latents(guided, FOX, negative_prompt="red", **GUIDED))


def test_they_have_no_effect_without_guidance(guided):
    plain = latents(guided, FOX, guidance_scale=1.0)
    np.testing.assert_array_equal(latents(guided, FOX, negative_prompt="red", guidance_scale=1.0), plain)
    embeds = guided.encode_prompt("red")
    np.testing.assert_array_equal(latents(guided, FOX, negative_prompt_embeds=embeds, guidance_scale=1.0), plain)


def test_a_request_has_one_for_each_prompt(guided):
    request = guided.request([FOX, CAT], negative_prompt=["red", "blue"], images_per_prompt=2, guidance=3.0)
    assert request.negative_prompts == ("red", "blue")
    assert request.only([3, 0]).negative_prompts == ("blue", "red")
    assert guided.request([FOX, CAT], guidance=3.0).negative_prompts == ("", "")
    assert guided.request([FOX, CAT], negative_prompt="red", guidance=1.0).negative_prompts == ()


def test_the_plan_counts_them():
    row = VARIANTS["klein-base-4b"]
    networks = Networks.open(row, quant="qint8", dtype="bfloat16")

    def peak(negative: str | list[str]) -> int:
        request = Request.checked(row, 16, [*"abcdefghi"], negative_prompt=negative)
        return networks.needs(workload(request)).plan(2**40).phase("text_encoder").peak_memory

    assert peak([*"123456789"]) - peak("red") == 8 * row.max_sequence_length * row.text.output_size * 2
    assert peak("red") == peak("")


def test_images_of_another_one_are_not_gone_on_with(guided):
    keys = {
        key
        for negative in ("", "red", "blue")
        for request in [guided.request([FOX], negative_prompt=negative, guidance=3.0, seed=1)]
        for key in unfinished._keys(guided.networks, request, Edit())
    }
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"negative_prompt": ["red"]}, "1 negative prompts don't go with 2 prompts"),
        ({"negative_prompt": 3}, "negative_prompt must be text or a list of texts, got int"),
        ({"negative_prompt": [3, "red"]}, "a negative prompt must be text, got int"),
        ({"negative_prompt": "x" * 10_001}, "a prompt of 10001 characters is too long"),
        ({"negative_prompt_embeds": np.zeros((3, 9, FEATURES))}, "negative_prompt_embeds have 3 rows, not 1 or 2"),
        ({"negative_prompt_embeds": np.zeros((2, 9, 8))}, r"negative_prompt_embeds must be \[prompts, tokens, \d+\]"),
        (
            {"negative_prompt": "red", "negative_prompt_embeds": np.zeros((2, 9, FEATURES))},
            "give either negative_prompt or",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_wrong_ones(settings, match, guided, loads):
    with pytest.raises(InputError, match=match):
        latents(guided, [FOX, CAT], **GUIDED, **settings)
    assert loads == []


@pytest.mark.parametrize("name", ["negative_prompt", "negative_prompt_embeds"])
def test_a_model_without_guidance_has_no_use_for_them(name, pipe, loads):
    value = "red" if name == "negative_prompt" else np.zeros((1, 4, 4))
    with pytest.raises(InputError, match=r"demo has no use for a negative prompt; .* choose one of klein-base-4b, kl"):
        latents(pipe, FOX, **{name: value})
    assert loads == []
    np.testing.assert_array_equal(latents(pipe, FOX, negative_prompt=""), latents(pipe, FOX))
