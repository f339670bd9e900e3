"""Measures how often the demonstration model does what an instruction says, and nothing else, to a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from edits import KINDS, Edit, sample_held_out_edit
from evaluate import SEED, Generate, describe, rates, report_adherence
from instructions import sample_instruction
from PIL import Image
from scorer import Verdict, judge_placed

if TYPE_CHECKING:
    from flow_stage import TextToVelocity

Example = tuple[Edit, str]


def held_out_edits(count: int, seed: int = SEED, plain: float = 0.5) -> list[Example]:
    """`count` edits from or to held-out combinations, of all kinds in turn, with an instruction each."""
    rng = np.random.default_rng(seed)
    edits = [sample_held_out_edit(rng, KINDS[k % len(KINDS)]) for k in range(count)]
    return [(edit, sample_instruction(edit, rng, plain)) for edit in edits]


def judge_edit(image: Image.Image, edit: Edit) -> Verdict:
    """Compares `image` with what `edit` should make of its picture: what it does not name must stay in its place."""
    return judge_placed(image, edit.after.background, edit.after.shapes)


def evaluate_edits(generate: Generate, examples: Sequence[Example]) -> tuple[list[Image.Image], list[Verdict]]:
    """The examples' pictures edited, the k-th with seed k, and what the scorer says of them."""
    images = [
        generate([instruction], [seed], edit.before.draw())[0] for seed, (edit, instruction) in enumerate(examples)
    ]
    return images, [judge_edit(image, edit) for image, (edit, _) in zip(images, examples, strict=True)]


def describe_kinds(examples: Sequence[Example], verdicts: Sequence[Verdict]) -> str:
    """The rates overall and of each kind of edit in percent on one line."""
    shares = rates(verdicts)
    for kind in KINDS:
        right = [verdict.all_right for verdict, (edit, _) in zip(verdicts, examples, strict=True) if edit.kind == kind]
        shares |= {f"({kind})": float(np.mean(right))} if right else {}
    return describe(shares)


def report_edits(work: Path, model: TextToVelocity, count: int = 30) -> str:
    """The rates of a model in training on a few held-out edits and prompts."""
    from export_stage import assemble, generate

    pipeline = assemble(work, model)
    examples = held_out_edits(count, seed=SEED + 1)
    _, verdicts = evaluate_edits(partial(generate, pipeline), examples)
    return f"edits: {describe_kinds(examples, verdicts)}; prompts: {report_adherence(work, model)}"
