"""The edits that the demonstration model learns, their sentences and their scorer, on pictures that are drawn."""

from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from edit_evaluation import describe_kinds, held_out_edits, judge_edit
from edit_stage import change_weights
from edits import KINDS, Edit, Picture, edits_of, sample_held_out_edit, sample_picture, sample_training_family
from flow_stage import flow_loss
from geometry import TEXT_LENGTH
from instructions import canonical_instruction, sample_instruction
from scenes import Placed, Shape, place, sample_scene
from scorer import matches
from tokenizer import chat_text
from tokenizers import Tokenizer

STAR = Placed(Shape("star", "red"), 0.26, 0.5, 0.18)
RING = Placed(Shape("ring", "white"), 0.74, 0.5, 0.18)
PAIR = Picture("blue", (STAR, RING))


def recoloured(placed: Placed, colour: str) -> Placed:
    return replace(placed, shape=replace(placed.shape, colour=colour))


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    rng = np.random.default_rng(0)
    return [sample_held_out_edit(rng, kind) for kind in KINDS for _ in range(8)]


def test_the_drawn_outcome_is_right_and_the_picture_itself_is_wrong(edits):
    for edit in edits:
        assert judge_edit(edit.after.draw(), edit).all_right, edit
        assert not judge_edit(edit.before.draw(), edit).all_right, edit


@pytest.mark.parametrize(
    ("outcome", "wrong"),
    [
        (replace(PAIR, background="green"), ["background", "colours"]),
        (Picture("blue", (recoloured(STAR, "green"), recoloured(RING, "black"))), ["colours"]),
        (Picture("blue", (replace(STAR, shape=Shape("cross", "green")), RING)), ["shapes"]),
        (Picture("blue", (recoloured(replace(STAR, y=0.4), "green"), RING)), ["places"]),
        (Picture("blue", (recoloured(STAR, "green"), replace(RING, radius=0.24))), ["places"]),
        (Picture("blue", (recoloured(STAR, "green"),)), ["count", "colours", "shapes", "places"]),
    ],
)
def test_the_verdict_names_what_is_wrong(outcome, wrong):
    edit = Edit("colour", PAIR, Picture("blue", (recoloured(STAR, "green"), RING)))
    assert judge_edit(outcome.draw(), edit).wrong == wrong


def test_places_are_compared_at_any_resolution(edits):
    assert all(judge_edit(edit.after.draw(256), edit).all_right for edit in edits)


def test_an_edit_changes_what_it_says_and_nothing_else():
    rng = np.random.default_rng(1)
    for edit in (edit for _ in range(200) for edit in edits_of(sample_picture(rng), rng)):
        before, after = edit.before, edit.after
        assert (before.background != after.background) == (edit.kind == "background")
        if edit.kind == "remove":
            assert set(before.shapes) - set(after.shapes) == {before.shapes[edit.index]}
            continue
        changed = [k for k, (old, new) in enumerate(zip(before.shapes, after.shapes, strict=True)) if old != new]
        assert changed == {"background": [], "swap": [0, 1]}.get(edit.kind, [edit.index])
        assert [(p.x, p.y, p.radius) for p in before.shapes] == [(p.x, p.y, p.radius) for p in after.shapes]


def test_undoing_twice_is_the_edit(edits):
    assert all(edit.backward().backward() == edit for edit in edits)


def test_pictures_know_their_scenes():
    rng = np.random.default_rng(2)
    for scene in [sample_scene(rng) for _ in range(100)]:
        picture = Picture(scene.background, place(scene, rng))
        assert picture.scene == scene
        assert matches(picture.draw(), scene)
    assert Picture("blue", (STAR,)).scene is None


def test_training_never_sees_a_held_out_combination(edits):
    rng = np.random.default_rng(3)
    trained = [edit for _ in range(100) for edit in sample_training_family(rng)]
    assert not any(picture.held_out for edit in trained for picture in (edit.before, edit.after))
    assert all(edit.held_out for edit in edits)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (Edit("background", PAIR, replace(PAIR, background="yellow")), "make the background yellow"),
        (Edit("colour", PAIR, Picture("blue", (recoloured(STAR, "green"), RING))), "make the star green"),
        (
            Edit("shape", PAIR, Picture("blue", (replace(STAR, shape=Shape("cross", "red")), RING))),
            "turn the star into a cross",
        ),
        (Edit("swap", PAIR, Picture("blue", (recoloured(STAR, "white"), recoloured(RING, "red")))), "swap the colours"),
        (Edit("remove", PAIR, Picture("blue", (RING,)), 0), "remove the star"),
        (Edit("add", Picture("blue", (RING,)), PAIR, 0), "add a red star left of the ring"),
        (Edit("add", Picture("blue", (STAR,)), PAIR, 1), "add a white ring right of the star"),
    ],
)
def test_known_instructions(edit, sentence):
    assert canonical_instruction(edit) == sentence


def test_equal_shapes_are_told_apart_by_their_colours():
    twins = Picture("blue", (STAR, recoloured(replace(RING, shape=STAR.shape), "white")))
    edit = Edit("remove", twins, Picture("blue", (STAR,)), 1)
    assert canonical_instruction(edit) == "remove the white star"


def test_instructions_fit_the_text_length(edits):
    tokenizer = Tokenizer.from_file(str(files("flux2_mlx.demo") / "tokenizer" / "tokenizer.json"))
    rng = np.random.default_rng(4)
    sentences = [sample_instruction(edit, rng, plain=0.0) for edit in edits for _ in range(20)]
    assert max(len(tokenizer.encode(chat_text(sentence)).ids) for sentence in sentences) <= TEXT_LENGTH


def test_tokens_that_an_edit_changes_count_more():
    reference = torch.zeros(2, 64, 32)
    clean = reference.clone()
    clean[0, :16] = 1
    weights = change_weights(clean, reference)
    assert weights.mean(1).tolist() == pytest.approx([1, 1])
    assert (weights[0, 0] / weights[0, 16]).item() == pytest.approx(8)
    assert len(set(weights[1].tolist())) == 1
    predicted = torch.randn(2, 64, 32)
    torch.manual_seed(0)
    noise = torch.randn_like(clean)
    torch.manual_seed(0)
    loss = flow_loss(lambda *_: predicted, torch.tensor([0.5, 0.9]), clean, None, None, reference, weights=weights)
    assert loss.item() == pytest.approx((weights[..., None] * (predicted - (noise - clean)) ** 2).mean().item())


def test_evaluation_edits_are_stable_and_of_every_kind():
    examples = held_out_edits(12)
    assert examples == held_out_edits(12)
    assert [edit.kind for edit, _ in examples] == [*KINDS, *KINDS]


def test_rates_are_given_for_each_kind():
    examples = held_out_edits(6)
    verdicts = [judge_edit(edit.after.draw(), edit) for edit, _ in examples]
    assert describe_kinds(examples, verdicts).startswith("all 100.0, background 100.0, count 100.0")
    assert "(swap) 100.0" in describe_kinds(examples, verdicts)
