"""Pictures that a run starts from or looks at: size, crop and mask before, pasting after.

Source: diffusers' `Flux2KleinPipeline` and `Flux2KleinInpaintPipeline` with their image processors.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from .colors import matched
from .errors import InputError, SettingError
from .images import MAX_INPUT_PIXELS, flattened

# diffusers' own bounds; larger pictures are scaled down to this area.
MIN_SIDE = 64
MAX_ASPECT = 8
MAX_AREA = 1024 * 1024
MAX_REFERENCES = 100  # ten times what is recommended for any model
_LANCZOS = Image.Resampling.LANCZOS
Box = tuple[int, int, int, int]


def check_picture(width: int, height: int) -> None:
    """Raise InputError if a picture of this size is too small or too narrow for the model to make sense of."""
    if min(width, height) < MIN_SIDE:
        raise InputError(f"an image of {width}×{height} is too small; each side must have at least {MIN_SIDE} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"an image of {width}×{height} is too narrow; the sides may differ by a factor of {MAX_ASPECT}"
        )


def fit_reference(image: Image.Image, token_size: int) -> Image.Image:
    """`image` at no more than `MAX_AREA`, its middle cut out to sides that are multiples of `token_size`."""
    image = _shrunk(image)
    width, height = _floored(image.size, token_size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_pixels(image: Image.Image) -> np.ndarray:
    """An RGB image as float32 `[1, H, W, 3]` in −1..1."""
    return np.asarray(image, dtype=np.float32)[None] / 255 * 2 - 1


def whole_pixels(name: str, value: Any) -> int:
    """A number of pixels of any type; InputError, which names the setting, if it is no whole one."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} must be a whole number of pixels, got {value!r:.40}") from error


def _shrunk(image: Image.Image) -> Image.Image:
    area = image.width * image.height
    if area <= MAX_AREA:
        return image
    scale = math.sqrt(MAX_AREA / area)
    return image.resize((int(image.width * scale), int(image.height * scale)), _LANCZOS)


def _floored(size: tuple[int, int], token_size: int) -> tuple[int, int]:
    return size[0] // token_size * token_size, size[1] // token_size * token_size


@dataclass(frozen=True)
class Canvas:
    """A picture that is painted over, in whole or where a mask says.

    `picture` is what the model starts from, with sides that are multiples of a token; `tokens` `[h, w]` says in 0..1
    which of them are painted anew (None: all). `original` and `mask` (`L`, 255 is painted over) have their full size,
    `box` is the part of them that `picture` shows.
    """

    picture: Image.Image
    original: Image.Image
    mask: Image.Image | None
    tokens: np.ndarray | None
    box: Box
    feather: int

    @classmethod
    def checked(
        cls,
        image: Image.Image,
        mask: Image.Image | None,
        token_size: int,
        *,
        mask_crop: int | None = None,
        feather: int = 0,
    ) -> "Canvas":
        """Prepare an RGB image and its mask.

        Args:
            image: the original, of a size that `check_picture` lets pass.
            mask: of the same size; what is lighter than middle grey is painted over. None: everything.
            token_size: pixels per token along one side.
            mask_crop: work on the mask's surroundings only, so many pixels around it. None: on the whole image.
            feather: pixels inside the mask over which the original fades into what was painted.

        Raises:
            InputError: sizes differ, or the mask marks nothing.
        """
        if mask is None:
            return cls(fit_reference(image, token_size), image, None, None, (0, 0, *image.size), feather)
        small = _shrunk(image)
        width, height = _floored(small.size, token_size)
        mask = _binary(mask, image.size)
        if mask_crop is None:
            box = (0, 0, *image.size)
            picture, shown = small.resize((width, height), _LANCZOS), mask.resize((width, height), _LANCZOS)
        else:
            box = crop_box(mask, width / height, mask_crop)
            picture, shown = (_filled(layer.crop(box), width, height) for layer in (image, mask))
        tokens = _token_mask(np.asarray(shown) >= 128, token_size)
        if not tokens.any():
            least = math.ceil(token_size * max((box[2] - box[0]) / width, (box[3] - box[1]) / height))
            raise InputError(f"the mask marks too little: make the white parts at least {least} pixels wide")
        return cls(picture, image, mask, tokens, box, feather)

    @property
    def keeps_nothing(self) -> bool:
        """Whether a mask marks the whole image."""
        return self.mask is not None and self.mask.getextrema() == (255, 255)

    def paste(self, painted: Image.Image, match_colors: bool = False) -> Image.Image:
        """The original with `painted`, of `picture`'s size, in the mask's place; all other pixels are untouched.

        With `match_colors` (see `colors.matched`) what is painted gets the colours that the rest of it has in the
        original.
        """
        if self.mask is None:
            return painted
        left, top, right, bottom = self.box
        layer = self.original.copy()
        shown = _unfilled(painted, right - left, bottom - top)
        if match_colors:
            shown = matched(shown, self.original.crop(self.box), np.asarray(self.mask.crop(self.box)) == 0)
        layer.paste(shown, (left, top))
        return Image.composite(layer, self.original, _feathered(self.mask, self.feather))


def _feathered(mask: Image.Image, feather: int) -> Image.Image:
    """The mask, rising from nothing at its border over `feather` pixels, except along borders of the image."""
    if not feather:
        return mask
    values = np.asarray(mask)
    margin = 3 * feather
    padded = Image.fromarray(np.pad(values, margin, mode="edge"))
    soft = np.asarray(padded.filter(ImageFilter.GaussianBlur(feather / 2)), dtype=np.float32)
    inner = soft[margin:-margin, margin:-margin]
    # In an inner corner of the mask the blur rises before its border.
    return Image.fromarray(np.minimum(np.clip(2 * inner - 255, 0, 255).astype(np.uint8), values))


def _binary(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    if mask.size != size:
        raise InputError(
            f"the mask has {mask.width}×{mask.height} pixels, its image {size[0]}×{size[1]}; make them equal"
        )
    mask = mask.convert("L").point(lambda value: 255 if value >= 128 else 0)
    _marked(mask)
    return mask


def _marked(mask: Image.Image) -> Box:
    """The box around what a mask marks; InputError if that is nothing."""
    box = mask.getbbox()
    if box is None:
        raise InputError("the mask is black, so nothing would change; make white what is to be painted over")
    return box


def _token_mask(mask: np.ndarray, token_size: int) -> np.ndarray:
    """Share of the middle four pixels of each token that a boolean `[H, W]` mask marks: float32 `[h, w]`.

    PyTorch's bilinear interpolation, which the reference scales masks with, comes down to these four.
    """
    height, width = mask.shape
    cells = mask.reshape(height // token_size, token_size, width // token_size, token_size)
    middle = slice(token_size // 2 - 1, token_size // 2 + 1)
    return cells[:, middle, :, middle].mean(axis=(1, 3), dtype=np.float32)


def crop_box(mask: Image.Image, aspect: float, padding: int) -> Box:
    """What a mask marks with `padding` pixels around it, widened to width / height = `aspect` where there is room."""
    left, top, right, bottom = _marked(mask)
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, mask.width), min(bottom + padding, mask.height)
    if (right - left) / (bottom - top) > aspect:
        top, bottom = _widened(top, bottom, (right - left) / aspect, mask.height)
    else:
        left, right = _widened(left, right, (bottom - top) * aspect, mask.width)
    return left, top, right, bottom


def _widened(start: int, stop: int, length: float, limit: int) -> tuple[int, int]:
    """`start`..`stop` widened on both sides to `length`, moved to lie within 0..`limit`."""
    extra = int(length - (stop - start))
    start, stop = start - extra // 2, stop + extra - extra // 2
    shift = max(0, stop - limit)
    start, stop = start - shift, stop - shift
    return max(start, 0), min(stop - min(start, 0), limit)


def _inner_box(width: int, height: int, inner_width: int, inner_height: int) -> Box:
    """Where a picture of the inner size comes to lie in one of `width`×`height` that it is scaled to fit into."""
    wide = width / height < inner_width / inner_height
    w = width if wide else inner_width * height // inner_height
    h = inner_height * width // inner_width if wide else height
    left, top = width // 2 - w // 2, height // 2 - h // 2
    return left, top, left + w, top + h


def _filled(image: Image.Image, width: int, height: int) -> Image.Image:
    """`image` scaled to fit into `width`×`height`, the rest filled with the pixels of its edges."""
    left, top, right, bottom = _inner_box(width, height, *image.size)
    pixels = np.asarray(image.resize((right - left, bottom - top), _LANCZOS))
    edges = [(top, height - bottom), (left, width - right), (0, 0)]
    return Image.fromarray(np.pad(pixels, edges[: pixels.ndim], mode="edge"))


def _unfilled(image: Image.Image, width: int, height: int) -> Image.Image:
    """The inverse of `_filled`: back to the size that the picture had."""
    return image.resize((width, height), _LANCZOS, box=_inner_box(*image.size, width, height))


def extended(
    image: Image.Image, left: int, right: int, top: int, bottom: int, overlap: int
) -> tuple[Image.Image, Image.Image]:
    """`image` with so many pixels more on each side, filled from its edges, and the mask of what is new.

    The mask reaches `overlap` pixels into the image on the sides that grow, for the seam to fade there.

    Raises:
        InputError: nothing is added or too much, a number is negative, or the overlap leaves nothing of the image.
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    for name, pixels in {**sides, "overlap": overlap}.items():
        if pixels < 0:
            raise InputError(f"{name} must be 0 or more pixels, got {pixels}")
    if not any(sides.values()):
        raise InputError("nothing to add; say how many pixels on the left, right, top or bottom")
    width, height = image.width + left + right, image.height + top + bottom
    check_picture(width, height)
    if width * height > MAX_INPUT_PIXELS:
        raise InputError(f"an image of {width}×{height} is too large; at most {MAX_INPUT_PIXELS:,} pixels can be made")
    seams = ((image.width, (left > 0) + (right > 0)), (image.height, (top > 0) + (bottom > 0)))
    most = min((side - 1) // count for side, count in seams if count)
    if overlap > most:
        raise InputError(
            f"an overlap of {overlap} leaves nothing of an image of {image.width}×{image.height}; choose at most {most}"
        )
    picture = np.pad(np.asarray(image), [(top, bottom), (left, right), (0, 0)], mode="edge")
    mask = np.full(picture.shape[:2], 255, dtype=np.uint8)
    first_row, last_row = top + overlap * (top > 0), top + image.height - overlap * (bottom > 0)
    first_column, last_column = left + overlap * (left > 0), left + image.width - overlap * (right > 0)
    mask[first_row:last_row, first_column:last_column] = 0
    return Image.fromarray(picture), Image.fromarray(mask)


@dataclass(frozen=True)
class Edit:
    """The pictures of a run, prepared: `references` in order; `canvas` is the first of them if it is painted over.
    `match_colors` is whether results get its colours (see `colors.matched`)."""

    references: tuple[Image.Image, ...] = ()
    canvas: Canvas | None = None
    match_colors: bool = False

    @classmethod
    def checked(
        cls,
        images: Sequence[Image.Image],
        token_size: int,
        *,
        mask: Image.Image | None = None,
        on_canvas: bool = False,
        mask_crop: int | None = None,
        feather: int = 0,
        match_colors: bool = False,
    ) -> "Edit":
        """Prepare `images` of any mode and size; with `mask` or `on_canvas` the first is painted over.

        Transparent parts of images are white, those of the mask black, so they are kept.

        Raises:
            InputError: a picture or the mask can't be used, or there are too many.
        """
        if len(images) > MAX_REFERENCES:
            raise InputError(f"{len(images)} images are too many; give at most {MAX_REFERENCES}")
        if mask is None and mask_crop is not None:
            raise InputError("cropping to the mask needs a mask")
        if mask_crop is not None and whole_pixels("mask_crop", mask_crop) < 0:
            raise SettingError(f"mask_crop must be 0 or more pixels around the mask, got {mask_crop}")
        if not isinstance(match_colors, bool):
            raise InputError(f"match_colors must be True or False, got {match_colors!r:.40}")
        if not images:
            if mask is not None or on_canvas:
                raise InputError("a mask or a strength needs an image to start from")
            if match_colors:
                raise InputError("matching colours needs an image whose colours are to be kept")
            return cls()
        images = [flattened(image) for image in images]
        for image in images:
            check_picture(*image.size)
        if mask is None and not on_canvas:
            return cls(tuple(fit_reference(image, token_size) for image in images), match_colors=match_colors)
        mask = None if mask is None else flattened(mask, "black")
        canvas = Canvas.checked(images[0], mask, token_size, mask_crop=mask_crop, feather=feather)
        return cls((canvas.picture, *(fit_reference(image, token_size) for image in images[1:])), canvas, match_colors)

    def working_size(self, width: int | None, height: int | None) -> tuple[int | None, int | None]:
        """Width and height that a run works at if asked for these: by default the first reference's, if there is one.

        InputError if an image that is painted over would get another size.
        """
        own = self.references[0].size if self.references else (None, None)
        size = own[0] if width is None else width, own[1] if height is None else height
        if self.canvas is not None and size != own:
            raise InputError("an image that is painted over keeps its size; leave width and height out")
        if self.match_colors and size != own:
            raise InputError(
                "colours are matched pixel by pixel, so the image keeps its size; leave width and height out"
            )
        return size

    def finished(self, image: Image.Image) -> Image.Image:
        """A decoded image, put into the picture that it paints over, and with its colours matched if asked for."""
        if self.canvas is not None and self.canvas.mask is not None:
            return self.canvas.paste(image, self.match_colors)
        return matched(image, self.references[0]) if self.match_colors else image

    def output_size(self, width: int, height: int) -> tuple[int, int]:
        """Size of the images of a run at `width`×`height`: where there is a mask, that of the original."""
        if self.canvas is not None and self.canvas.mask is not None:
            return self.canvas.original.size
        return width, height

    def token_counts(self, token_size: int) -> list[int]:
        """How many tokens each reference is."""
        return [image.width * image.height // token_size**2 for image in self.references]
