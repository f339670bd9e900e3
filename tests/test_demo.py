"""Does the built-in model draw what prompts say, and edit as told? `scripts/demo/evaluate.py` measures more of both."""

import numpy as np
import pytest
from edit_evaluation import evaluate_edits, held_out_edits
from evaluate import held_out_prompts, own_generator
from scorer import judge

from flux2_mlx import Flux2Pipeline

SEED = 20


def share_right(pipe: Flux2Pipeline, count: int) -> float:
    examples = held_out_prompts(count, seed=SEED)
    images = pipe([prompt for _, prompt in examples], seed=0).images
    return float(np.mean([judge(image, scene).all_right for image, (scene, _) in zip(images, examples, strict=True)]))


@pytest.mark.parametrize(("quant", "count"), [(None, 40), ("qint8", 10)])
def test_demo_draws_what_held_out_prompts_say(quant, count):
    assert share_right(Flux2Pipeline.from_pretrained("demo", quant=quant), count) >= 0.9


def test_another_prompt_gives_another_scene():
    pipe = Flux2Pipeline.from_pretrained("demo")
    (scene, prompt), (other, _) = held_out_prompts(2, seed=SEED)
    image = pipe(prompt, seed=0).images[0]
    assert judge(image, scene).all_right
    assert not judge(image, other).all_right


def test_demo_edits_as_held_out_instructions_say():
    _, verdicts = evaluate_edits(own_generator("demo", None, steps=8), held_out_edits(30, seed=SEED))
    assert np.mean([verdict.all_right for verdict in verdicts]) >= 0.8
