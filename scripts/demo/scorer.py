"""Reads a scene off the pixels of a picture, with no learned part, and compares it with the scene asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from PIL import Image, ImageFilter
from scenes import COLOURS, PALETTE, RADII, SHAPES, Placed, Scene, Shape, draw_placed, relation

SIDE = 128
GRID = 32
# Drawn shapes overlap their own template by 0.88 and more, and lead the next by 0.16. Wobbly outlines that are still
# plain to the eye reach less; what is half-formed resembles several templates alike.
LEAST_OVERLAP = 0.6
LEAST_LEAD = 0.04
LEAST_PURITY = 0.75
LEAST_AREA = 0.004
LEAST_DISTANCE = 0.2
# What may become of a shape that an edit leaves alone: a shift as a fraction of the side, a ratio of radii.
MOST_SHIFT = 0.05
MOST_GROWTH = 1.2


@dataclass(frozen=True)
class Found:
    """A shape found in a picture; the centre (y downward) and the radius are fractions of the picture's side.

    `name` is "unclear" if the outline is like none of `SHAPES`, `colour` if the patch has no prevailing colour.
    """

    name: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str:
        """The nearest of the sizes single shapes come in."""
        return min(RADII, key=lambda size: abs(np.log(self.radius / RADII[size])))


@dataclass(frozen=True)
class Reading:
    """The background's colour and the shapes found on it, largest first."""

    background: str
    shapes: tuple[Found, ...]


@dataclass(frozen=True)
class Verdict:
    """Which attributes of a scene a picture shows; None where a scene has no such attribute."""

    background: bool
    count: bool
    colours: bool
    shapes: bool
    size: bool | None
    relation: bool | None
    places: bool | None = None

    @property
    def wrong(self) -> list[str]:
        """The names of the attributes that are wrong."""
        return [name for name, value in vars(self).items() if value is False]

    @property
    def all_right(self) -> bool:
        """Whether no attribute is wrong."""
        return not self.wrong


def read_scene(image: Image.Image) -> Reading:
    """The background and the shapes of an RGB picture of any size."""
    labels = _palette_labels(image)
    background = int(np.bincount(labels.ravel(), minlength=len(COLOURS)).argmax())
    patches = _components(labels != background)
    found = [_describe(patch, labels) for patch in patches if patch.mean() >= LEAST_AREA]
    return Reading(COLOURS[background], tuple(sorted(found, key=lambda shape: -shape.radius)))


def judge(image: Image.Image, scene: Scene) -> Verdict:
    """Compares what `image` shows with `scene`, attribute by attribute."""
    return compare(read_scene(image), scene)


def compare(reading: Reading, scene: Scene) -> Verdict:
    """Compares what was read off a picture with `scene`, attribute by attribute."""
    background = reading.background == scene.background
    wanted = (scene.first, scene.second) if scene.is_pair else (scene.first,)
    if len(reading.shapes) != len(wanted):
        return Verdict(background, False, False, False, *((None, False) if scene.is_pair else (False, None)))
    if not scene.is_pair:
        shape = reading.shapes[0]
        right_shape, right_colour = shape.name == scene.first.name, shape.colour == scene.first.colour
        return Verdict(background, True, right_colour, right_shape, shape.size == scene.size, None)
    options = [_compare_pair(order, wanted, scene.relation) for order in (reading.shapes, reading.shapes[::-1])]
    colours, shapes, place = max(options, key=lambda option: (sum(option[0] + option[1]), option[2]))
    return Verdict(background, True, all(colours), all(shapes), None, place)


def judge_placed(image: Image.Image, background: str, wanted: tuple[Placed, ...]) -> Verdict:
    """Compares what `image` shows with shapes at known places, as an edit should leave them."""
    reading = read_scene(image)
    right = reading.background == background
    if len(reading.shapes) != len(wanted):
        return Verdict(right, False, False, False, None, None, False)
    pairs = [(min(reading.shapes, key=partial(_shift, placed)), placed) for placed in wanted]
    colours = all(found.colour == placed.shape.colour for found, placed in pairs)
    names = all(found.name == placed.shape.name for found, placed in pairs)
    places = all(
        _shift(placed, found) <= MOST_SHIFT and 1 / MOST_GROWTH <= found.radius / placed.radius <= MOST_GROWTH
        for found, placed in pairs
    )
    return Verdict(right, True, colours, names, None, None, places)


def _shift(placed: Placed, found: Found) -> float:
    return float(np.hypot(found.x - placed.x, found.y - placed.y))


def matches(image: Image.Image, scene: Scene) -> bool:
    """Whether `image` shows `scene`: every attribute right, nothing more and nothing less."""
    return judge(image, scene).all_right


def _compare_pair(
    found: tuple[Found, ...], wanted: tuple[Shape, ...], side: str
) -> tuple[list[bool], list[bool], bool]:
    colours = [shape.colour == other.colour for shape, other in zip(found, wanted, strict=True)]
    names = [shape.name == other.name for shape, other in zip(found, wanted, strict=True)]
    return colours, names, _relation(found[0], found[1]) == side


def _relation(first: Found, second: Found) -> str | None:
    across, down = first.x - second.x, first.y - second.y
    return None if max(abs(across), abs(down)) < LEAST_DISTANCE else relation(across, down)


def _palette_labels(image: Image.Image) -> np.ndarray:
    """Indices into `COLOURS` (128, 128) of the nearest colours, thin seams at outlines removed."""
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.int32)
    palette = np.array(list(PALETTE.values()), dtype=np.int32)
    distance = ((pixels[:, :, None] - palette) ** 2).sum(-1)
    nearest = Image.fromarray(distance.argmin(-1).astype(np.uint8))
    return np.asarray(nearest.filter(ImageFilter.ModeFilter(5)))


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected parts of a boolean (H, W) mask, each as a mask."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        height, width = mask.shape
        windows = [padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
        spread = np.where(mask, np.maximum.reduce(windows), 0)
        # Following a label to the label at its own place halves the distances left, so that few rounds are needed.
        flat = np.concatenate([[0], spread.ravel()])
        spread = np.where(mask, flat[spread], 0)
        if np.array_equal(spread, labels):
            return [labels == value for value in np.unique(labels) if value]
        labels = spread


def _describe(patch: np.ndarray, labels: np.ndarray) -> Found:
    # A soft outline between red and yellow is orange: the colour is that of the inside.
    inside = np.asarray(Image.fromarray(patch.astype(np.uint8)).filter(ImageFilter.MinFilter(5)), dtype=bool)
    counts = np.bincount(labels[inside if inside.any() else patch], minlength=len(COLOURS))
    colour = COLOURS[int(counts.argmax())] if counts.max() >= LEAST_PURITY * counts.sum() else "unclear"
    rows, columns = np.flatnonzero(patch.any(1)), np.flatnonzero(patch.any(0))
    x, y = (columns[0] + columns[-1] + 1) / (2 * SIDE), (rows[0] + rows[-1] + 1) / (2 * SIDE)
    grid, aspect = _to_grid(patch), len(rows) / len(columns)
    scores = [(_overlap(grid, aspect, *template), name, unit) for name, template, unit in _templates()]
    score, name, unit_area = max(scores)
    clear = score >= LEAST_OVERLAP and score - max(other[0] for other in scores if other[1] != name) >= LEAST_LEAD
    radius = float(np.sqrt(patch.mean() / unit_area))
    return Found(name if clear else "unclear", colour, float(x), float(y), radius)


def _to_grid(patch: np.ndarray) -> np.ndarray:
    """The mask's bounding box as (32, 32) coverages in [0, 1]."""
    rows, columns = np.flatnonzero(patch.any(1)), np.flatnonzero(patch.any(0))
    box = patch[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scaled = Image.fromarray(box.astype(np.uint8) * 255).resize((GRID, GRID), Image.Resampling.BILINEAR)
    return np.asarray(scaled, dtype=np.float32) / 255


def _overlap(grid: np.ndarray, aspect: float, template: np.ndarray, template_aspect: float) -> float:
    """Intersection over union in [0, 1], lowered for another ratio of height to width."""
    union = np.maximum(grid, template).sum()
    return float(np.minimum(grid, template).sum() / union) * min(aspect / template_aspect, template_aspect / aspect)


@cache
def _templates() -> tuple[tuple[str, tuple[np.ndarray, float], float], ...]:
    """Name, (grid, aspect) and area at radius 1 of each shape at each size, seen as pictures are seen."""
    made = []
    for name in SHAPES:
        for radius in RADII.values():
            image = draw_placed("white", (Placed(Shape(name, "black"), 0.5, 0.5, radius),), SIDE)
            patch = _palette_labels(image) == COLOURS.index("black")
            rows, columns = np.flatnonzero(patch.any(1)), np.flatnonzero(patch.any(0))
            template = (_to_grid(patch), len(rows) / len(columns))
            made.append((name, template, float(patch.mean()) / radius**2))
    return tuple(made)
