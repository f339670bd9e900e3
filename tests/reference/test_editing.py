"""Runs with references, strength and masks against diffusers' pipelines, on the same random weights."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinKVPipeline, Flux2KleinPipeline
from diffusers import Flux2Pipeline as Flux2DevPipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from helpers.checkpoints import SHALLOW_TEXT, SHALLOW_VARIANT, convert, write_tokenizer
from helpers.parity import relative_error
from helpers.references import make_dev_source, small_pipeline
from helpers.variants import change_variant
from PIL import Image

from flux2_mlx import Flux2Pipeline
from flux2_mlx.references import Canvas, crop_box, fit_reference, to_pixels

LATENTS = 1e-4
SETTINGS = {"num_inference_steps": 4, "max_sequence_length": 48}
PROMPT = "put the hat on the cat"
SEEDS = [3, 77]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n{{ '\\n' }}"  # Jinja would drop a last newline
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random RGB image."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [picture(83, 70, 1), picture(64, 129, 2), picture(131, 67, 3)]


class Pair:
    """A reference pipeline and ours with the same weights."""

    def __init__(self, reference: Any, ours: Flux2Pipeline, **always: Any):
        self.reference, self.ours, self.always = reference, ours, always

    def run(self, seed: int, kind: str = "latent", reference: dict[str, Any] | None = None, **settings: Any):
        """What ours and the reference give; `reference` are settings that have other names or values there."""
        settings = {"prompt": PROMPT, **SETTINGS, **settings}
        theirs = {**settings, **self.always, **(reference or {})}
        theirs = {name: value for name, value in theirs.items() if value is not None}
        generator = torch.Generator("cpu").manual_seed(seed)
        expected = self.reference(generator=generator, output_type=kind, **theirs).images
        return self.ours(seed=seed, output_type=kind, **settings).images, expected

    def error(self, seed: int, **settings: Any) -> float:
        ours, expected = self.run(seed, **settings)
        error = relative_error(ours, expected)
        print(f"relative error of the latents: {error:.1e}")
        return error


def build(folder: Path, kind: type, distilled: bool, kv_cache: bool) -> Pair:
    source = small_pipeline(write_tokenizer(folder / "tokenizer"), text=SHALLOW_TEXT, distilled=distilled)
    source.save_pretrained(folder / "official")
    converted = convert(folder / "official", folder / "converted", variant=SHALLOW_VARIANT)
    ours = Flux2Pipeline.from_pretrained(converted, dtype="float32")
    change_variant(ours, distilled=distilled, kv_cache=kv_cache, max_sequence_length=512)
    reference = kind(**source.components, is_distilled=distilled)
    reference.set_progress_bar_config(disable=True)
    reference.tokenizer.chat_template = TEMPLATE
    return Pair(reference, ours, text_encoder_out_layers=SHALLOW_TEXT.out_layers)


def pair_fixture(kind: type, distilled: bool = True, kv_cache: bool = False) -> Any:
    @pytest.fixture(scope="module")
    def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
        return build(tmp_path_factory.mktemp("pair"), kind, distilled, kv_cache)

    return pair


klein = pair_fixture(Flux2KleinPipeline)
base = pair_fixture(Flux2KleinPipeline, distilled=False)
kv = pair_fixture(Flux2KleinKVPipeline, kv_cache=True)
inpaint = pair_fixture(Flux2KleinInpaintPipeline)
base_inpaint = pair_fixture(Flux2KleinInpaintPipeline, distilled=False)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_references(count, seed, klein):
    ours, expected = klein.run(seed, image=PICTURES[:count])
    assert ours.shape == (1, 4, 64 // 8, 80 // 8)  # the size of the first reference
    assert relative_error(ours, expected) <= LATENTS
    alone, _ = klein.run(seed, width=80, height=64)
    assert relative_error(alone, ours) > 0.01


@pytest.mark.parametrize("count", [1, 3])
def test_pixels_with_references(count, klein):
    ours, expected = klein.run(SEEDS[0], "pil", image=PICTURES[:count])
    assert np.asarray(expected[0]).std() > 10
    assert np.abs(np.asarray(ours[0], dtype=int) - np.asarray(expected[0], dtype=int)).max() <= 1


def test_size_given_with_a_reference(klein):
    assert klein.error(SEEDS[0], image=PICTURES[0], width=48, height=96) <= LATENTS


def test_large_reference_is_scaled_down(klein):
    large = picture(1500, 900)
    settings = {"image": [large], "width": 32, "height": 32, "num_inference_steps": 1}
    assert klein.error(SEEDS[0], **settings) <= 1e-3  # the reference's own rounding in attention over 4,000 tokens


def test_references_of_a_batch(klein):
    ours = klein.ours([PROMPT, "a fox"], image=PICTURES[:2], seed=5, output_type="latent", **SETTINGS).images
    for prompt, seed, image in zip([PROMPT, "a fox"], [5, 6], ours, strict=True):
        _, expected = klein.run(seed, prompt=prompt, image=PICTURES[:2])
        assert relative_error(image[None], expected) <= LATENTS


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_references_with_classifier_free_guidance(guidance, base):
    assert base.error(SEEDS[0], image=PICTURES[:2], guidance_scale=guidance) <= LATENTS


@pytest.mark.parametrize("count", [0, 1, 2])
def test_kv_cache(count, kv, klein):
    images = PICTURES[:count] or None
    size = {} if count else {"width": 80, "height": 64}
    ours, expected = kv.run(SEEDS[0], image=images, **size)
    assert relative_error(ours, expected) <= LATENTS
    plain, _ = klein.run(SEEDS[0], image=images, **size)  # the same weights, seen the ordinary way
    assert (relative_error(plain, ours) <= LATENTS) == (count == 0)


def test_kv_cache_holds_only_keys_and_values(kv):
    ours = kv.ours
    transformer = ours.checkpoint.components["transformer"].load(mx.float32)
    config, length = transformer.config, 200
    tokens = mx.random.normal((1, length, config.in_channels))
    rope = mx.ones((length, 2, config.attention_head_dim))
    mx.eval(tokens, rope)
    mx.clear_cache()
    before = mx.get_active_memory()
    past = transformer.read(tokens, rope)
    blocks = config.num_layers + config.num_single_layers
    assert len(past) == blocks
    expected = blocks * 2 * length * config.hidden_size * 4
    assert mx.get_active_memory() - before <= 1.02 * expected + 16384 * 2 * blocks


def steps_of(total: int, strength: float) -> dict[str, Any]:
    """What diffusers calls the run whose last steps ours takes."""
    return {"num_inference_steps": total, "strength": strength}


def half_mask(width: int, height: int) -> Image.Image:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 4 :, width // 3 :] = 255
    return Image.fromarray(mask)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("size", "strength", "total"), [((96, 80), 1.0, 4), ((83, 70), 0.5, 8), ((64, 112), 0.8, 5)])
def test_inpainting(seed, size, strength, total, inpaint):
    image, mask = picture(*size), half_mask(*size)
    settings = {"image": image, "mask_image": mask, "strength": strength, "reference": steps_of(total, strength)}
    assert inpaint.error(seed, **settings) <= LATENTS


def test_inpainting_with_another_reference(inpaint):
    image, mask, other = picture(96, 80), half_mask(96, 80), picture(70, 90, 9)
    theirs = {"image": image, "image_reference": other, **steps_of(5, 0.8)}
    settings = {"image": [image, other], "mask_image": mask, "strength": 0.8, "reference": theirs}
    assert inpaint.error(SEEDS[0], **settings) <= LATENTS


def test_inpainting_with_classifier_free_guidance(base_inpaint):
    settings = {"image": picture(96, 80), "mask_image": half_mask(96, 80), "strength": 0.8, "guidance_scale": 3.0}
    assert base_inpaint.error(SEEDS[0], **settings, reference=steps_of(5, 0.8)) <= LATENTS


def test_a_soft_mask_on_token_borders(inpaint):
    mask = np.zeros((80, 96), dtype=np.uint8)
    mask[8:33, 7:24] = 255  # covers some tokens' middle pixels by half
    settings = {"image": picture(96, 80), "mask_image": Image.fromarray(mask), "strength": 1.0}
    assert inpaint.error(SEEDS[0], **settings) <= LATENTS


def test_mask_crop(inpaint):
    image = picture(320, 256)
    mask = np.zeros((256, 320), dtype=np.uint8)
    mask[100:150, 120:190] = 255
    heard: dict[Any, Any] = {}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        heard[pipe] = tensors["latents"]
        return {}

    settings = {"image": image, "mask_image": Image.fromarray(mask), "strength": 1.0, "padding_mask_crop": 5}
    ours, _ = inpaint.run(SEEDS[0], "pil", **settings, callback_on_step_end=keep)
    assert relative_error(heard[inpaint.ours], heard[inpaint.reference]) <= LATENTS
    assert ours[0].size == image.size


def test_pixels_outside_the_mask_are_the_original(inpaint):
    size = (203, 150)
    image, mask = picture(*size), half_mask(*size)
    (ours,) = inpaint.ours(PROMPT, image=image, mask_image=mask, seed=1, **SETTINGS).images
    outside = np.asarray(mask) == 0
    assert ours.size == size
    assert np.array_equal(np.asarray(ours)[outside], np.asarray(image)[outside])
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(image, dtype=int))[~outside].mean() > 5


def test_inpainted_pixels(inpaint):
    image, mask = picture(96, 80), half_mask(96, 80)
    ours, expected = inpaint.run(SEEDS[0], "pil", image=image, mask_image=mask, strength=1.0)
    inside = np.asarray(mask) > 0
    difference = np.abs(np.asarray(ours[0], dtype=int) - np.asarray(expected[0], dtype=int))
    assert difference[inside].max() <= 1


def test_full_strength_is_plain_editing(klein):
    plain = klein.ours(PROMPT, image=picture(96, 80), seed=4, output_type="latent", **SETTINGS).images
    full = klein.ours(PROMPT, image=picture(96, 80), strength=1.0, seed=4, output_type="latent", **SETTINGS).images
    assert relative_error(full, plain) <= 1e-6


def test_strength_equals_a_mask_of_everything(inpaint):
    """Diffusers has no strength of its own for this model; a mask of everything is one."""
    settings = {"image": picture(96, 80), "strength": 0.5}
    theirs = {"mask_image": Image.new("L", (96, 80), "white"), **steps_of(8, 0.5)}
    assert inpaint.error(SEEDS[0], **settings, reference=theirs) <= LATENTS


@pytest.mark.parametrize("guidance", [4.0, 2.5])
def test_dev_with_references(guidance, dev):
    reference, ours, embeds = dev
    settings = {"num_inference_steps": 4, "guidance_scale": guidance, "image": PICTURES[:2]}
    generator = torch.Generator("cpu").manual_seed(3)
    expected = reference(prompt_embeds=embeds, generator=generator, output_type="np", **settings).images
    mine = ours(prompt_embeds=embeds, seed=3, output_type="np", **settings).images
    assert expected.std() > 0.1
    assert np.abs(mine - expected).max() <= 1e-3


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> tuple[Flux2DevPipeline, Flux2Pipeline, torch.Tensor]:
    folder = tmp_path_factory.mktemp("dev")
    reference = make_dev_source(folder / "official")
    converted = convert(folder / "official", folder / "converted", variant="dev")
    embeds = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 40, 192)).astype(np.float32))
    return reference, Flux2Pipeline.from_pretrained(converted, dtype="float32"), embeds


PROCESSOR = Flux2ImageProcessor(vae_scale_factor=16, vae_latent_channels=4)


@pytest.mark.parametrize("size", [(64, 64), (83, 70), (1024, 1024), (1031, 1100), (1500, 200), (4000, 3000)])
def test_a_reference_is_fitted_as_in_diffusers(size):
    image = picture(*size)
    expected = PROCESSOR._resize_if_exceeds_area(image)
    width, height = (side // 16 * 16 for side in expected.size)
    expected = PROCESSOR.preprocess(expected, height=height, width=width, resize_mode="crop")
    assert np.array_equal(to_pixels(fit_reference(image, 16)), expected.permute(0, 2, 3, 1).numpy())


def test_crop_boxes_are_those_of_diffusers():
    random = np.random.default_rng(5)
    for _ in range(300):
        width, height = random.integers(64, 200, 2)
        mask = np.zeros((height, width), dtype=np.uint8)
        left, top = random.integers(0, (width, height))
        mask[top : top + random.integers(1, 90), left : left + random.integers(1, 90)] = 255
        mask, padding = Image.fromarray(mask), int(random.integers(0, 40))
        size = (width // 16 * 16, height // 16 * 16)
        assert crop_box(mask, size[0] / size[1], padding) == PROCESSOR.get_crop_region(mask, *size, pad=padding)


def test_masks_are_scaled_to_tokens_as_in_diffusers():
    mask = np.random.default_rng(6).random((96, 160)) < 0.5
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(mask[None, None].astype(np.float32)), (6, 10), mode="bilinear"
    )
    canvas = Canvas.checked(picture(160, 96), Image.fromarray((mask * 255).astype(np.uint8)), 16)
    assert np.array_equal(canvas.tokens, expected[0, 0].numpy())
