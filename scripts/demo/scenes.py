"""The world of the demonstration model: flat shapes on a flat background, and the sentences that describe them."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "green": (30, 160, 60),
    "blue": (30, 80, 220),
    "yellow": (250, 225, 40),
    "purple": (140, 40, 170),
    "orange": (250, 135, 20),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Radii are fractions of the image's side. "medium" is what a prompt that names no size stands for.
RADII = {"small": 0.16, "medium": 0.25, "large": 0.36}
SIZES = tuple(RADII)
PAIR_RADIUS = 0.185
PAIR_OFFSET = 0.245
RING_HOLE = 0.52
STAR_INNER = 0.45
CROSS_ARM = 0.32
SQUARE_HALF = 0.84
OVERSAMPLING = 4


@dataclass(frozen=True)
class Shape:
    """A coloured shape: `name` is one of `SHAPES`, `colour` one of `COLOURS`."""

    name: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """One or two shapes on a background.

    A single shape has a `size` of `SIZES` and no relation. A pair has a `relation` of `RELATIONS`, which says where
    `first` is as seen from `second`, and no size.
    """

    background: str
    first: Shape
    size: str | None = "medium"
    relation: str | None = None
    second: Shape | None = None

    @property
    def is_pair(self) -> bool:
        """Whether the scene has two shapes."""
        return self.second is not None

    def canonical(self) -> Scene:
        """The same scene told with "left of" or "above", so that equal pictures compare equal."""
        if self.relation in ("right of", "below"):
            return replace(self, first=self.second, second=self.first, relation=OPPOSITE[self.relation])
        return self


@dataclass(frozen=True)
class Placed:
    """A shape with its centre and radius as fractions of the image's side, y downward, both in [0, 1]."""

    shape: Shape
    x: float
    y: float
    radius: float


def held_out(scene: Scene) -> bool:
    """Whether this combination of attributes is kept from training (about one in ten, the same on every machine)."""
    told = scene.canonical()
    parts = [told.first.colour, told.first.name]
    if told.is_pair:
        parts += [told.relation, told.second.colour, told.second.name]
    else:
        parts += [told.background, told.size]
    return zlib.crc32("/".join(parts).encode()) % 10 == 0


def sample_scene(rng: np.random.Generator, pair: bool | None = None) -> Scene:
    """A random scene, held out or not; `pair` forces two shapes or one."""
    pair = rng.random() < 0.6 if pair is None else pair
    background, colour, other = (str(name) for name in rng.permutation(COLOURS)[:3])
    first = Shape(str(rng.choice(SHAPES)), colour)
    if not pair:
        return Scene(background, first, size=str(rng.choice(SIZES)))
    second = Shape(str(rng.choice(SHAPES)), other)
    if rng.random() < 0.15 and second.name != first.name:
        second = Shape(second.name, colour)
    return Scene(background, first, None, str(rng.choice(RELATIONS)), second)


def sample_training_scene(rng: np.random.Generator) -> Scene:
    """A random scene that is not held out."""
    while True:
        scene = sample_scene(rng)
        if not held_out(scene):
            return scene


def sample_held_out_scene(rng: np.random.Generator, pair: bool | None = None) -> Scene:
    """A random scene whose combination of attributes training never sees."""
    while True:
        scene = sample_scene(rng, pair)
        if held_out(scene):
            return scene


def place(scene: Scene, rng: np.random.Generator) -> tuple[Placed, ...]:
    """Where the shapes of `scene` go in one picture of it, with a little jitter."""
    if not scene.is_pair:
        x, y = 0.5 + rng.uniform(-0.04, 0.04, 2)
        return (Placed(scene.first, float(x), float(y), RADII[scene.size] * rng.uniform(0.96, 1.04)),)
    dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[scene.relation]
    placed = []
    for shape, sign in ((scene.first, 1), (scene.second, -1)):
        x, y = 0.5 + rng.uniform(-0.025, 0.025, 2)
        radius = PAIR_RADIUS * rng.uniform(0.96, 1.04)
        placed.append(Placed(shape, x + sign * dx * PAIR_OFFSET, y + sign * dy * PAIR_OFFSET, radius))
    return tuple(placed)


def relation(across: float, down: float) -> str:
    """Where a shape is as seen from another whose centre is so far to its left and above it."""
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def draw(scene: Scene, rng: np.random.Generator, side: int = 128) -> Image.Image:
    """An anti-aliased RGB picture of `scene`, `side` x `side` pixels."""
    return draw_placed(scene.background, place(scene, rng), side)


def draw_placed(background: str, shapes: tuple[Placed, ...], side: int = 128) -> Image.Image:
    """An anti-aliased RGB picture, `side` x `side` pixels, of shapes at given places."""
    scale = side * OVERSAMPLING
    image = Image.new("RGB", (scale, scale), PALETTE[background])
    canvas = ImageDraw.Draw(image)
    for placed in shapes:
        _draw_shape(canvas, placed, scale, PALETTE[background])
    return image.reduce(OVERSAMPLING)


def _draw_shape(canvas: ImageDraw.ImageDraw, placed: Placed, scale: int, background: tuple[int, int, int]) -> None:
    x, y, radius = placed.x * scale, placed.y * scale, placed.radius * scale
    fill = PALETTE[placed.shape.colour]
    if placed.shape.name in ("circle", "ring"):
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        if placed.shape.name == "ring":
            hole = radius * RING_HOLE
            canvas.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
        return
    outline = [(x + radius * px, y + radius * py) for px, py in outline_points(placed.shape.name)]
    canvas.polygon(outline, fill=fill)


def outline_points(name: str) -> list[tuple[float, float]]:
    """Corners of a polygonal shape in units of its radius, y downward."""
    if name == "square":
        half = SQUARE_HALF
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if name == "triangle":
        # An equilateral triangle's box is not centred on its centroid: shifted down so that the box is nearly.
        return [(0.0, -0.85), (1.0, 0.85), (-1.0, 0.85)]
    if name == "star":
        radii = [1.0 if corner % 2 == 0 else STAR_INNER for corner in range(10)]
        angles = [math.pi * corner / 5 - math.pi / 2 for corner in range(10)]
        return [(r * math.cos(a), r * math.sin(a) + 0.05) for r, a in zip(radii, angles, strict=True)]
    arm = CROSS_ARM
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    # Each turn by 90 degrees takes (x, y) to (-y, x); a quarter holds one arm's end and one inner corner.
    points = []
    for _ in range(4):
        points += quarter
        quarter = [(-py, px) for px, py in quarter]
    return points
