"""Edits of pictures: one change to one picture, with everything else left in its place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scenes import COLOURS, OPPOSITE, RADII, SHAPES, Placed, Scene, draw_placed, held_out, place, relation, sample_scene

KINDS = ("background", "colour", "shape", "swap", "remove", "add")
BACKWARD = {"remove": "add", "add": "remove"}
PAIR_KINDS = ("swap", "remove", "add")
# Shapes of a pair are further from the middle than this fraction of the side, single ones nearer.
MIDDLE = 0.12


@dataclass(frozen=True)
class Picture:
    """A background's colour and one or two shapes at their places."""

    background: str
    shapes: tuple[Placed, ...]

    def draw(self, side: int = 128) -> Image.Image:
        """The RGB picture, `side` x `side` pixels."""
        return draw_placed(self.background, self.shapes, side)

    @property
    def scene(self) -> Scene | None:
        """What a prompt would say of the picture; None for what is left of a pair, which no prompt describes."""
        first, *others = self.shapes
        if others:
            second = others[0]
            told = relation(first.x - second.x, first.y - second.y)
            return Scene(self.background, first.shape, None, told, second.shape)
        if max(abs(first.x - 0.5), abs(first.y - 0.5)) > MIDDLE:
            return None
        size = min(RADII, key=lambda size: abs(first.radius - RADII[size]))
        return Scene(self.background, first.shape, size)

    @property
    def held_out(self) -> bool:
        """Whether training never sees this picture's combination of attributes."""
        return self.scene is not None and held_out(self.scene)


@dataclass(frozen=True)
class Edit:
    """One change of a kind of `KINDS`; `index` says which shape changes, counted in the picture that has more."""

    kind: str
    before: Picture
    after: Picture
    index: int = 0

    def backward(self) -> Edit:
        """The edit that undoes this one."""
        return Edit(BACKWARD.get(self.kind, self.kind), self.after, self.before, self.index)

    @property
    def held_out(self) -> bool:
        """Whether training sees neither this edit nor one that undoes it."""
        return self.before.held_out or self.after.held_out


def relation_to_other(edit: Edit) -> str:
    """Where the shape that is added or removed is as seen from the one that stays."""
    told = max(edit.before, edit.after, key=lambda picture: len(picture.shapes)).scene.relation
    return told if edit.index == 0 else OPPOSITE[told]


def sample_picture(rng: np.random.Generator, pair: bool | None = None) -> Picture:
    """A picture of a random scene, held out or not; `pair` forces two shapes or one."""
    scene = sample_scene(rng, pair)
    return Picture(scene.background, place(scene, rng))


def edits_of(picture: Picture, rng: np.random.Generator) -> list[Edit]:
    """Every kind of change to `picture`, a whole scene, once for each shape it can be made to; no additions."""
    edits = [Edit("background", picture, replace(picture, background=_unused_colour(picture, rng)))]
    for index, placed in enumerate(picture.shapes):
        name = str(rng.choice([name for name in SHAPES if name != placed.shape.name]))
        edits.append(_reshaped("colour", picture, index, colour=_unused_colour(picture, rng)))
        edits.append(_reshaped("shape", picture, index, name=name))
        if len(picture.shapes) == 2:
            edits.append(Edit("remove", picture, replace(picture, shapes=(picture.shapes[1 - index],)), index))
    if len({placed.shape.colour for placed in picture.shapes}) == 2:
        edits.append(_with_swapped_colours(picture))
    return edits


def _unused_colour(picture: Picture, rng: np.random.Generator) -> str:
    used = {picture.background} | {placed.shape.colour for placed in picture.shapes}
    return str(rng.choice([colour for colour in COLOURS if colour not in used]))


def _reshaped(kind: str, picture: Picture, index: int, **changes: str) -> Edit:
    shapes = list(picture.shapes)
    shapes[index] = replace(shapes[index], shape=replace(shapes[index].shape, **changes))
    return Edit(kind, picture, replace(picture, shapes=tuple(shapes)), index)


def _with_swapped_colours(picture: Picture) -> Edit:
    first, second = picture.shapes
    shapes = (
        replace(first, shape=replace(first.shape, colour=second.shape.colour)),
        replace(second, shape=replace(second.shape, colour=first.shape.colour)),
    )
    return Edit("swap", picture, replace(picture, shapes=shapes))


def sample_training_family(rng: np.random.Generator) -> list[Edit]:
    """The edits of one random picture that are not held out, at least one."""
    while True:
        edits = [edit for edit in edits_of(sample_picture(rng), rng) if not edit.held_out]
        if edits:
            return edits


def sample_held_out_edit(rng: np.random.Generator, kind: str) -> Edit:
    """A random edit of `kind` from or to a combination of attributes that training never sees."""
    while True:
        edits = edits_of(sample_picture(rng, pair=True if kind in PAIR_KINDS else None), rng)
        edits += [edit.backward() for edit in edits]
        fitting = [edit for edit in edits if edit.kind == kind and edit.held_out]
        if fitting:
            return fitting[int(rng.integers(len(fitting)))]
