"""Whole runs against diffusers' `Flux2KleinPipeline`: saved by it, converted and loaded by us, same seeds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from helpers.checkpoints import convert, edit_json
from helpers.parity import random_tensor, relative_error
from helpers.references import small_pipeline
from PIL import Image

from flux2_mlx import Flux2Pipeline
from flux2_mlx.config import TextConfig, TransformerConfig

# Qwen's vocabulary, and so its tokenizer, at a very small width; heads · head_dim ≠ hidden_size as in klein-4b.
TEXT = TextConfig("qwen3", 16, 24, 27, 151936, (9, 18, 27), 3, 1, 8)
# Axes of different sizes, so that none can be taken for another.
TRANSFORMER = TransformerConfig(2, 3, 2, 48, 16, 16, axes_dims_rope=(2, 6, 4, 4), guidance_embeds=False)
CAT, FOX = "A cat holding a sign that says hello world", "一只狐狸 🦊 в снегу\n\tتحت القمر <|im_end|>"
LONG = "a very long story of a fox, " * 90
HEIGHT, WIDTH, SEED, STEPS = 48, 80, 1234, 4
# Few text tokens where their number is not what is tested: 512 take most of the time.
SETTINGS = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "max_sequence_length": 48}
# ‖a − b‖ / ‖b‖ of the latents after all steps, the text encoder included. Measured: 1e-6 to 7e-6.
LATENTS = 1e-4


class Pair:
    """The reference pipeline and ours with the same weights."""

    def __init__(self, reference: Flux2KleinPipeline, ours: Flux2Pipeline):
        self.reference, self.ours = reference, ours

    def __call__(self, *, seeds: int = 1, output_type: str = "latent", **settings: Any) -> tuple[Any, Any]:
        """The images of both for the same arguments, which have the same names."""
        settings = SETTINGS | settings
        generators = [torch.Generator("cpu").manual_seed(SEED + k) for k in range(seeds)]
        expected = self.reference(generator=generators, output_type=output_type, **settings).images
        return self.ours(seed=SEED, output_type=output_type, **settings).images, expected

    def error(self, **settings: Any) -> float:
        ours, expected = self(**settings)
        assert np.isfinite(ours).all()
        error = relative_error(ours, expected)
        print(f"relative error of the latents: {error:.1e}")
        return error


@pytest.fixture(scope="module")
def make_pair(qwen3_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    def make(variant: str, distilled: bool | None) -> Pair:
        folder = tmp_path_factory.mktemp(variant)
        reference = small_pipeline(
            qwen3_tokenizer_file.parent, transformer=TRANSFORMER, text=TEXT, distilled=bool(distilled)
        )
        reference.save_pretrained(folder / "official")
        if distilled is None:
            edit_json(folder / "official" / "model_index.json", is_distilled=None)
        converted = convert(folder / "official", folder / "converted", variant=variant)
        return Pair(reference, Flux2Pipeline.from_pretrained(converted, dtype="float32"))

    return make


@pytest.fixture(scope="module")
def klein(make_pair) -> Pair:
    return make_pair("klein-4b", True)


@pytest.fixture(scope="module")
def base(make_pair) -> Pair:
    """A model with classifier-free guidance, saved as the published ones: `is_distilled` is left out."""
    return make_pair("klein-base-4b", None)


@pytest.fixture(params=["klein", "base"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


BATCH = {"prompt": [CAT, FOX], "num_images_per_prompt": 2, "seeds": 4, "guidance_scale": 4.0}


def test_latents_of_a_batch(pair):
    ours, expected = pair(**BATCH)
    assert ours.shape == (4, 4, HEIGHT // 8, WIDTH // 8)
    assert relative_error(ours, expected) <= LATENTS
    for mine, theirs in zip(ours, expected, strict=True):
        assert relative_error(mine, theirs) <= LATENTS


def test_images_of_a_batch(pair):
    ours, expected = pair(output_type="np", **BATCH)
    assert ours.shape == (4, HEIGHT, WIDTH, 3)
    assert expected.std() > 0.1
    assert np.abs(ours - expected).max() <= 1e-3
    ours, expected = pair(output_type="pil", **BATCH)
    for mine, theirs in zip(ours, expected, strict=True):
        assert isinstance(mine, Image.Image)
        assert np.abs(np.array(mine, dtype=int) - np.array(theirs, dtype=int)).max() <= 1


@pytest.mark.parametrize("image", range(4))
def test_an_image_of_a_batch_is_that_of_its_own_seed(image, klein):
    batch = klein.ours([CAT, FOX], num_images_per_prompt=2, seed=SEED, output_type="latent", **SETTINGS).images
    generator = torch.Generator("cpu").manual_seed(SEED + image)
    prompt = [CAT, CAT, FOX, FOX][image]
    expected = klein.reference(prompt=prompt, generator=generator, output_type="latent", **SETTINGS).images
    assert relative_error(batch[image], expected[0]) <= LATENTS


@pytest.mark.parametrize("prompt", ["", FOX, LONG], ids=["empty", "not Latin", "over-long"])
def test_prompts(prompt, klein):
    assert klein.error(prompt=prompt, max_sequence_length=512) <= LATENTS


def test_an_over_long_prompt_beside_the_negative_one(base):
    assert base.error(prompt=LONG, max_sequence_length=512, guidance_scale=4.0) <= LATENTS


def test_guidance_changes_the_image_of_a_base_model_only(klein, base):
    for pair, differ in ((klein, False), (base, True)):
        low, high = (pair(prompt=CAT, guidance_scale=scale)[0] for scale in (1.0, 4.0))
        assert (relative_error(low, high) > 0.01) == differ


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5])
def test_guidance_of_a_base_model(scale, base):
    assert base.error(prompt=CAT, guidance_scale=scale) <= LATENTS


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 160), (128, 32)])
def test_sizes(height, width, klein):
    assert klein.error(prompt=CAT, height=height, width=width) <= LATENTS


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_steps(steps, klein):
    assert klein.error(prompt=CAT, num_inference_steps=steps) <= LATENTS


def test_sigmas(klein):
    assert klein.error(prompt=CAT, num_inference_steps=3, sigmas=[1.0, 0.6509, 0.1893]) <= LATENTS


def test_sigmas_alone_are_shifted_as_for_the_default_number_of_steps(klein):
    settings = {name: value for name, value in SETTINGS.items() if name != "num_inference_steps"}
    settings |= {"prompt": CAT, "sigmas": [1.0, 0.6509, 0.1893], "output_type": "latent"}
    expected = klein.reference(generator=torch.Generator("cpu").manual_seed(SEED), **settings).images
    assert relative_error(klein.ours(seed=SEED, **settings).images, expected) <= LATENTS


def test_sigmas_and_another_number_of_steps(klein):
    assert klein.error(prompt=CAT, num_inference_steps=7, sigmas=[0.9, 0.4]) <= LATENTS


@pytest.mark.parametrize("length", [7, 100])
def test_shorter_text(length, pair):
    assert pair.error(prompt=CAT, max_sequence_length=length, guidance_scale=4.0) <= LATENTS


def test_given_latents(klein):
    assert klein.error(prompt=CAT, latents=random_tensor(1, 16, HEIGHT // 16, WIDTH // 16)) <= LATENTS


@pytest.mark.parametrize(("name", "prompts"), [("klein", [CAT, FOX]), ("base", [CAT])])  # diffusers has one negative
def test_given_prompt_embeds(name, prompts, request):
    pair = request.getfixturevalue(name)
    embeds, _ = pair.reference.encode_prompt(prompts, max_sequence_length=48)
    settings = {"prompt_embeds": embeds, "num_images_per_prompt": 2, "guidance_scale": 4.0}
    assert pair.error(seeds=2 * len(prompts), **settings) <= LATENTS


@pytest.mark.parametrize(("length", "negative"), [(20, 60), (60, 20), (530, 20)])
def test_prompt_embeds_of_another_length_than_the_negative_prompt(length, negative, base):
    embeds, _ = base.reference.encode_prompt([CAT], max_sequence_length=length)
    settings = {"prompt_embeds": embeds, "max_sequence_length": negative, "guidance_scale": 4.0}
    assert base.error(num_inference_steps=2, **settings) <= LATENTS


NEGATIVE = ["blurry, text", "red"]


@pytest.mark.parametrize(("prompts", "negatives"), [([CAT], NEGATIVE[:1]), ([CAT, FOX], NEGATIVE), ([CAT, FOX], "")])
def test_negative_prompts(prompts, negatives, base):
    settings = {"prompt": prompts, "num_images_per_prompt": 2, "guidance_scale": 4.0}
    embeds, _ = base.reference.encode_prompt(negatives or [""] * 2, max_sequence_length=48)
    ours, expected = base(negative_prompt_embeds=embeds, seeds=2 * len(prompts), **settings)
    texts = base.ours(negative_prompt=negatives, seed=SEED, output_type="latent", **SETTINGS, **settings).images
    assert max(relative_error(ours, expected), relative_error(texts, expected)) <= LATENTS
    usual = base(seeds=2 * len(prompts), **settings)[0]
    assert (relative_error(ours, usual) > 0.01) == bool(negatives)


@pytest.mark.parametrize(("given", "negative"), [(None, 20), (60, 20), (20, 60)])
def test_encoded_negative_prompts_of_another_length(given, negative, base):
    embeds, _ = base.reference.encode_prompt([CAT], max_sequence_length=given or 48)
    prompt = {"prompt": CAT} if given is None else {"prompt_embeds": embeds}
    against, _ = base.reference.encode_prompt(NEGATIVE[:1], max_sequence_length=negative)
    assert base.error(**prompt, negative_prompt_embeds=against, guidance_scale=4.0) <= LATENTS


def test_an_encoded_negative_prompt_without_guidance(base):
    against, _ = base.reference.encode_prompt(NEGATIVE[:1], max_sequence_length=48)
    assert base.error(prompt=CAT, negative_prompt_embeds=against, guidance_scale=1.0) <= LATENTS


def test_encode_prompt(klein):
    prompts = [CAT, FOX, "", LONG]
    expected, _ = klein.reference.encode_prompt(prompts, max_sequence_length=60)
    assert relative_error(klein.ours.encode_prompt(prompts, max_sequence_length=60), expected) <= LATENTS


def test_a_callback_that_changes_the_latents(pair):
    heard = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        heard.append((step, float(timestep), tuple(tensors["latents"].shape)))
        assert pipe in (pair.ours, pair.reference)
        return {"latents": tensors["latents"] * 0.8 + 0.1 * step}

    ours, expected = pair(prompt=CAT, guidance_scale=4.0, callback_on_step_end=callback)
    assert relative_error(ours, expected) <= LATENTS
    assert relative_error(ours, pair(prompt=CAT, guidance_scale=4.0)[1]) > 0.01
    theirs, mine = heard[:STEPS], heard[STEPS:]
    assert len(mine) == STEPS
    for a, b in zip(mine, theirs, strict=True):
        assert a == (b[0], pytest.approx(b[1], rel=1e-6), b[2])


def test_bfloat16(klein):
    exact = klein(prompt=CAT)[1]
    half = Flux2Pipeline.from_pretrained(klein.ours.checkpoint.folder, dtype="bfloat16")
    error = relative_error(half(CAT, seed=SEED, output_type="latent", **SETTINGS).images, exact)
    print(f"relative error of the latents: {error:.1e}")
    assert error <= 0.05
