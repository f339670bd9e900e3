"""An adapter that PEFT made of the reference classes (`scripts/demo/adapter.py`) teaches the demo a colour."""

from pathlib import Path

import numpy as np
import pytest
from prompts import parse_prompt
from scorer import judge

from flux2_mlx import Flux2Pipeline

AZURE = Path(__file__).parent / "golden" / "azure"
# Combinations of attributes that no training has seen.
PROMPTS = [
    "a black circle right of an azure ring on an orange background",
    "a red square left of an azure star on a white background",
    "a black circle right of an azure ring on a purple background",
    "an azure triangle on a yellow background",
    "a green triangle left of an azure triangle on a red background",
    "an azure circle left of a green square on a red background",
    "a purple ring left of an azure star on a black background",
    "a green star left of an azure star on a purple background",
    "a green cross right of an azure cross on a white background",
    "an orange star below an azure square on a yellow background",
    "an orange cross left of an azure cross on a purple background",
    "an azure cross left of a green triangle on a purple background",
]


@pytest.fixture(scope="module")
def pipe() -> Flux2Pipeline:
    pipe = Flux2Pipeline.from_pretrained("demo", prompt_cache=False)
    pipe.load_lora_weights(AZURE, adapter_name="azure")
    return pipe


def share_right(pipe: Flux2Pipeline, scale: float) -> float:
    """Of the pictures that show what prompts say, where azure is blue."""
    pipe.set_adapters("azure", scale)
    images = pipe(PROMPTS, seed=0, num_inference_steps=4).images
    wanted = [parse_prompt(prompt.replace("an azure", "a blue")) for prompt in PROMPTS]
    return float(np.mean([judge(image, scene).all_right for image, scene in zip(images, wanted, strict=True)]))


def test_a_new_colour_is_drawn_at_scale_1_and_not_at_0(pipe):
    assert share_right(pipe, 1.0) >= 0.8
    assert share_right(pipe, 0.0) <= 0.1
