"""Sentences that describe scenes, and the way back from a sentence to its scene."""

from __future__ import annotations

import re

import numpy as np
from scenes import COLOURS, Scene, Shape

# The first phrase of each entry is the canonical one; the others are paraphrases, drawn less often.
SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "donut"),
    "cross": ("cross", "plus sign"),
}
COLOUR_WORDS = {name: (name,) for name in COLOURS} | {"purple": ("purple", "violet")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("", "medium"), "large": ("large", "big", "huge")}
# "next to" and "and" do not say which side; reading them as "left of" gives them one picture.
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of", "next to", "and"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath", "underneath"),
}
SINGLE_FORMS = (
    "{what} on a {background} background",
    "{what} on {background}",
    "{what}, {background} background",
    "{what} with a {background} background",
    "{what} in front of a {background} background",
    "on a {background} background there is {what}",
    "there is {what} on a {background} background",
    "{background} background, {what}",
)
PREFIXES = ("a picture of ", "an image of ", "a drawing of ")


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def canonical_prompt(scene: Scene) -> str:
    """The plainest sentence for `scene`, such as "a small red circle on a blue background"."""
    background = with_article(f"{scene.background} background")
    if scene.is_pair:
        first = with_article(f"{scene.first.colour} {scene.first.name}")
        second = with_article(f"{scene.second.colour} {scene.second.name}")
        return f"{first} {scene.relation} {second} on {background}"
    size = SIZE_WORDS[scene.size][0]
    return f"{with_article(f'{size} {scene.first.colour} {scene.first.name}'.strip())} on {background}"


def default_background(*shapes: Shape) -> str:
    """The background a sentence stands for that names none."""
    return "black" if any(shape.colour == "white" for shape in shapes) else "white"


def sample_prompt(scene: Scene, rng: np.random.Generator, plain: float = 0.4) -> str:
    """A sentence for `scene`: the canonical one with probability `plain`, else a paraphrase."""
    if rng.random() < plain:
        return canonical_prompt(scene)
    article = "" if rng.random() < 0.2 else "the" if rng.random() < 0.1 else "a"
    what = _noun(scene.first, scene.size if not scene.is_pair else "medium", article, rng)
    if scene.is_pair:
        verb = "is " if rng.random() < 0.1 and article else ""
        what += f" {verb}{pick_word(RELATION_WORDS[scene.relation], rng)} {_noun(scene.second, 'medium', article, rng)}"
    what = what.replace(" is and ", " and ")
    form = pick_word(SINGLE_FORMS, rng, first=0.2) if " is " not in what else SINGLE_FORMS[int(rng.integers(3))]
    shapes = (scene.first, scene.second) if scene.is_pair else (scene.first,)
    if scene.background == default_background(*shapes) and rng.random() < 0.25:
        form = "{what}"
    background = pick_word(COLOUR_WORDS[scene.background], rng, first=0.9)
    prompt = form.format(what=what, background=background).replace("a orange background", "an orange background")
    if article == "a" and prompt.startswith("a") and rng.random() < 0.06:
        prompt = PREFIXES[int(rng.integers(len(PREFIXES)))] + prompt
    return _finish(prompt, rng)


def pick_word(choices: tuple[str, ...], rng: np.random.Generator, first: float = 0.5) -> str:
    """One of `choices`, the first with probability `first`."""
    if len(choices) == 1 or rng.random() < first:
        return choices[0]
    return choices[int(rng.integers(1, len(choices)))]


def _noun(shape: Shape, size: str, article: str, rng: np.random.Generator) -> str:
    size_word = pick_word(SIZE_WORDS[size], rng, first=0.9 if size == "medium" else 0.5)
    colour = pick_word(COLOUR_WORDS[shape.colour], rng, first=0.9)
    phrase = f"{size_word} {colour} {pick_word(SHAPE_WORDS[shape.name], rng, first=0.9)}".strip()
    return with_article(phrase) if article == "a" else f"{article} {phrase}".strip()


def _finish(prompt: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.3:
        prompt = prompt[0].upper() + prompt[1:]
    return prompt + "." if rng.random() < 0.25 else prompt


def _meanings(words: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {phrase: name for name, phrases in words.items() for phrase in phrases if phrase}


def _alternatives(meanings: dict[str, str]) -> str:
    return "|".join(sorted(meanings, key=len, reverse=True))


_SHAPE, _COLOUR = _meanings(SHAPE_WORDS), _meanings(COLOUR_WORDS)
_SIZE, _RELATION = _meanings(SIZE_WORDS), _meanings(RELATION_WORDS)
_NOUN = re.compile(rf"(?:({_alternatives(_SIZE)}) )?({_alternatives(_COLOUR)}) ({_alternatives(_SHAPE)})\b")


def parse_prompt(prompt: str) -> Scene:
    """The scene a sentence of this world describes.

    Raises ValueError if the sentence does not name one shape, or two shapes with a relation.
    """
    text = re.sub(r"[^a-z ]", "", prompt.lower())
    nouns = list(_NOUN.finditer(text))
    if not 1 <= len(nouns) <= 2:
        raise ValueError(f"not a sentence about one or two shapes: {prompt!r}")
    shapes = [Shape(_SHAPE[noun[3]], _COLOUR[noun[2]]) for noun in nouns]
    named = re.search(rf"\b({_alternatives(_COLOUR)})\b", _NOUN.sub(" ", text))
    background = _COLOUR[named[1]] if named else default_background(*shapes)
    if len(shapes) == 1:
        return Scene(background, shapes[0], _SIZE.get(nouns[0][1], "medium"))
    between = text[nouns[0].end() : nouns[1].start()]
    relation = re.search(rf"\b({_alternatives(_RELATION)})\b", between)
    if relation is None:
        raise ValueError(f"no relation between the two shapes: {prompt!r}")
    return Scene(background, shapes[0], None, _RELATION[relation[1]], shapes[1])
