"""Dev's vision tower against transformers, and how images are made ready for it."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from flux2_mlx.convert.naming import read
from flux2_mlx.convert.rules import kernels_last
from helpers.checkpoints import DEV_TEXT, DEV_VISION
from helpers.parity import NETWORK, random_tensor, randomize, relative_error, to_mx
from helpers.references import mistral
from mlx.utils import tree_flatten
from PIL import Image
from transformers import Mistral3ForConditionalGeneration
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from flux2_mlx.config import VisionConfig
from flux2_mlx.text import PixtralVision
from flux2_mlx.text.pixtral import preprocess
from flux2_mlx.upsampling import shown
from flux2_mlx.weights import TensorInfo

RELEASED = VisionConfig(5120)


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width + 10_000 * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def reference_inputs(image: Image.Image, config: VisionConfig) -> dict[str, torch.Tensor]:
    cell = {"height": config.cell_size, "width": config.cell_size}
    processor = PixtralImageProcessorPil(size={"longest_edge": config.image_size}, patch_size=cell)
    return processor(image, return_tensors="pt")


@pytest.mark.parametrize(
    "size",
    [(28, 28), (1, 1), (1, 90), (90, 1), (29, 27), (100, 57), (139, 141), (140, 140), (141, 60), (60, 500)],
    ids=str,
)
def test_preprocess(size):
    image = picture(*size)
    ours, expected = preprocess(image, DEV_VISION), reference_inputs(image, DEV_VISION)
    assert list(ours.shape[:2]) == expected["image_sizes"][0].tolist()
    assert ours.dtype == np.float32
    assert np.array_equal(ours.transpose(2, 0, 1), expected["pixel_values"][0].numpy())


def test_a_side_that_would_vanish_stays():
    """The reference fails here: it rounds the shorter side down to nothing."""
    assert preprocess(picture(1000, 3), DEV_VISION).shape == (28, 140, 3)


@pytest.mark.parametrize("size", [(768, 768), (2000, 700), (333, 1541)], ids=str)
def test_preprocess_at_the_released_size(size):
    image = picture(*size)
    expected = reference_inputs(image, RELEASED)["pixel_values"][0].numpy()
    assert np.array_equal(preprocess(image, RELEASED).transpose(2, 0, 1), expected)


@pytest.fixture(scope="module")
def networks() -> tuple[Mistral3ForConditionalGeneration, PixtralVision]:
    reference, ours = randomize(mistral(DEV_TEXT, DEV_VISION)), PixtralVision(DEV_VISION)
    state = reference.state_dict()
    reading = read({name: TensorInfo("F32", tuple(x.shape)) for name, x in state.items()}, "x")["text_encoder"]
    state = {reading.canonical(name): x for name, x in state.items()}
    weights = []
    for name, array in tree_flatten(ours.parameters()):
        rule = kernels_last(name, array.shape)
        weights.append((name, rule.apply(*(to_mx(state[source]) for source in rule.sources))))
    return reference, ours.load_weights(weights).eval()


@pytest.mark.parametrize("size", [(56, 56), (28, 84), (140, 28), (100, 61), (400, 300)], ids=str)
def test_features(size, networks):
    reference, ours = networks
    image = picture(*size)
    inputs = reference_inputs(image, DEV_VISION)
    (expected,) = reference.get_image_features(
        pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"]
    ).pooler_output
    got = ours(mx.array(preprocess(image, DEV_VISION)))
    height, width = (int(side) // DEV_VISION.cell_size for side in inputs["image_sizes"][0])
    assert got.shape == (height * width, DEV_VISION.text_hidden_size)
    error = relative_error(got, expected)
    print(f"relative error of the features: {error:.1e}")
    assert error <= NETWORK


def test_the_reference_sees_pixels():
    """Features of two pictures differ, so that agreement on one means something."""
    reference = randomize(mistral(DEV_TEXT, DEV_VISION))
    a, b = (
        reference.get_image_features(pixel_values=random_tensor(1, 3, 56, 56, seed=seed), image_sizes=[(56, 56)])
        for seed in (1, 2)
    )
    assert relative_error(a.pooler_output[0], b.pooler_output[0]) > 0.1


@pytest.mark.parametrize(
    "sizes",
    [
        [(64, 48)],
        [(768, 768)],
        [(769, 768)],
        [(2000, 1000)],
        [(5000, 1)],
        [(90, 50), (31, 150)],
        [(31, 150), (90, 51), (10, 10)],
        [(900, 700), (300, 1200)],
    ],
    ids=str,
)
def test_shown_images(sizes):
    images = [picture(*size) for size in sizes]
    joined = Flux2ImageProcessor.concatenate_images(images) if len(images) > 1 else images[0]
    expected = Flux2ImageProcessor._resize_if_exceeds_area(joined, 768**2)
    assert np.array_equal(np.asarray(shown(images)), np.asarray(expected))
