"""Pixels of decoder output as diffusers makes them."""

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor

from flux2_mlx.images import to_pil, to_unit


def test_pixels_are_rounded_as_in_diffusers():
    halves = (np.arange(255) + 0.5) / 255  # where a rule for ties shows
    random = np.random.default_rng(0).random(3 * 1024 - 255 - 4)
    values = np.concatenate([[0, 1, 0.999999, 1e-9], halves, random]).reshape(1, 32, 32, 3).astype(np.float32)
    (ours,), (theirs,) = to_pil(values), VaeImageProcessor.numpy_to_pil(values)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert ours.mode == "RGB"
    assert {0, 255} <= set(np.asarray(ours).flat)


def test_decoder_output_is_scaled_as_in_diffusers():
    values = np.random.default_rng(0).normal(scale=2, size=(1, 3, 8, 8)).astype(np.float32)
    expected = VaeImageProcessor.denormalize(torch.from_numpy(values)).numpy()
    assert np.array_equal(to_unit(values), expected)
    assert to_unit(values).dtype == np.float32
    assert to_unit(values.astype(np.float16)).dtype == np.float32
