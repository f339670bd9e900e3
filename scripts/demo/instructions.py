"""Sentences that ask for edits."""

from __future__ import annotations

import numpy as np
from edits import Edit, Picture, relation_to_other
from prompts import COLOUR_WORDS, RELATION_WORDS, SHAPE_WORDS, pick_word, with_article
from scenes import Shape

# The first form of each kind is the plainest. {it} is the shape that changes, {new} what it becomes.
FORMS = {
    "background": (
        "make the background {new}",
        "change the background to {new}",
        "turn the background {new}",
        "set the background to {new}",
        "paint the background {new}",
        "change the colour of the background to {new}",
        "{new} background",
        "put it on {new}",
    ),
    "colour": (
        "make {it} {new}",
        "change {it} to {new}",
        "turn {it} {new}",
        "paint {it} {new}",
        "colour {it} {new}",
        "recolour {it} {new}",
        "change the colour of {it} to {new}",
    ),
    "shape": (
        "turn {it} into {new}",
        "change {it} into {new}",
        "change {it} to {new}",
        "make {it} {new}",
        "replace {it} with {new}",
    ),
    "swap": (
        "swap the colours",
        "swap the colours of the shapes",
        "swap their colours",
        "switch the colours",
        "exchange the colours",
        "swap the colors",
    ),
    "remove": ("remove {it}", "delete {it}", "erase {it}", "take {it} away", "take away {it}"),
    "add": ("add {new} {where}", "put {new} {where}", "draw {new} {where}", "place {new} {where}"),
}
# Where a new shape goes when the sentence does not name the other one.
PLACE_WORDS = {
    "left of": ("on the left", "to the left", "to the left of it"),
    "right of": ("on the right", "to the right", "to the right of it"),
    "above": ("above", "above it", "over it"),
    "below": ("below", "below it", "under it"),
}
# The further words of a prompt's relation leave the side open or have no place after "add".
SIDE_WORDS = 3


def canonical_instruction(edit: Edit) -> str:
    """The plainest sentence for `edit`, such as "make the circle green"."""
    return _fill(FORMS[edit.kind][0], edit, None)


def sample_instruction(edit: Edit, rng: np.random.Generator, plain: float = 0.4) -> str:
    """A sentence for `edit`: the canonical one with probability `plain`, else a paraphrase."""
    if rng.random() < plain:
        return canonical_instruction(edit)
    sentence = _fill(pick_word(FORMS[edit.kind], rng, first=0.3), edit, rng)
    if rng.random() < 0.3:
        sentence = sentence[0].upper() + sentence[1:]
    return sentence + "." if rng.random() < 0.25 else sentence


def _fill(form: str, edit: Edit, rng: np.random.Generator | None) -> str:
    """The form's sentence, in the plainest words if `rng` is None."""
    if edit.kind == "swap":
        return form
    if edit.kind == "background":
        return form.format(new=_word(COLOUR_WORDS[edit.after.background], rng))
    if edit.kind == "add":
        return form.format(new=with_article(_noun(edit.after.shapes[edit.index].shape, rng)), where=_where(edit, rng))
    lone = len(edit.before.shapes) == 1 and rng is not None and rng.random() < 0.25
    it = "it" if lone else _reference(edit.before, edit.index, rng)
    if edit.kind == "remove":
        return form.format(it=it)
    after = edit.after.shapes[edit.index].shape
    new = _word(COLOUR_WORDS[after.colour], rng)
    if edit.kind == "shape":
        new = with_article(_word(SHAPE_WORDS[after.name], rng))
    return form.format(it=it, new=new)


def _word(choices: tuple[str, ...], rng: np.random.Generator | None) -> str:
    return choices[0] if rng is None else pick_word(choices, rng, first=0.9)


def _noun(shape: Shape, rng: np.random.Generator | None) -> str:
    return f"{_word(COLOUR_WORDS[shape.colour], rng)} {_word(SHAPE_WORDS[shape.name], rng)}"


def _reference(picture: Picture, index: int, rng: np.random.Generator | None) -> str:
    """The name of one of the picture's shapes, with its colour where the name alone would not tell it."""
    shape = picture.shapes[index].shape
    alone = sum(placed.shape.name == shape.name for placed in picture.shapes) == 1
    if alone and (rng is None or rng.random() < 0.7):
        return f"the {_word(SHAPE_WORDS[shape.name], rng)}"
    return f"the {_noun(shape, rng)}"


def _where(edit: Edit, rng: np.random.Generator | None) -> str:
    told = relation_to_other(edit)
    if rng is not None and rng.random() < 0.4:
        return PLACE_WORDS[told][int(rng.integers(len(PLACE_WORDS[told])))]
    side = RELATION_WORDS[told][0] if rng is None else pick_word(RELATION_WORDS[told][:SIDE_WORDS], rng)
    return f"{side} {_reference(edit.before, 0, rng)}"
