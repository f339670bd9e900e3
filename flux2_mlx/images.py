"""Pixels to image files and back."""

import hashlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

from .errors import InputError
from .files import opened, read_bytes
from .settings import metadata, stored
from .staging import write

MAX_INPUT_PIXELS = 100_000_000  # such as 12,000 × 8,000, which take 300 MB as RGB
MAX_INPUT_BYTES = 10 * MAX_INPUT_PIXELS  # RGBA of 16 bits takes 8 a pixel
_READ = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_QUALITY = 95  # the most that Pillow advises for JPEG: above it files grow and images hardly change
_MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}  # what libjpeg and libwebp write
_log = logging.getLogger(__name__)


def to_unit(images: np.ndarray) -> np.ndarray:
    """Decoder output in −1..1 to 0..1, clipped, float32."""
    return np.clip(images.astype(np.float32) / 2 + 0.5, 0, 1)


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """RGB images from `[B, H, W, 3]` in 0..1, rounded to 8 bits."""
    return [Image.fromarray(image) for image in np.round(images * 255).astype(np.uint8)]


def open_image(path: Path, ground: str = "white") -> Image.Image:
    """An image file as RGB in sRGB: turned as its EXIF data say, transparency laid on the colour `ground`.

    Raises:
        InputError: not a readable image, an animation, several pages, or more than `MAX_INPUT_PIXELS`.
    """
    return open_hashed(path, ground)[0]


def open_hashed(path: Path, ground: str = "white") -> tuple[Image.Image, str]:
    """The image of `open_image`, and the SHA-256 of the very bytes that it was read from."""
    with _reading(path):
        data = read_bytes(path, MAX_INPUT_BYTES)
        return flattened(_decoded(path, data), ground), hashlib.sha256(data).hexdigest()


def _decoded(path: Path, data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        _check_pixels(path, image)
        # Behind a camera's picture an MPO file, named .jpg, has only a preview or a second view of it.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            if image.format == "TIFF":
                raise InputError(f"{path} has several pages; save one of them as an image")
            raise InputError(f"{path} is an animation; save one of its frames as an image")
        image.load()
        return ImageOps.exif_transpose(image)


@cache
def _formats() -> list[str]:
    """The formats of `_READ` that Pillow was built with. Some of its others start programs such as Ghostscript."""
    Image.init()
    return [name for name in _READ if name in Image.OPEN]


def _check_pixels(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MAX_INPUT_PIXELS:
        raise InputError(f"{path} is too large: {image.width}×{image.height}; scale it down first")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever is raised inside into an InputError about `path`; what can be skipped is not warned of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except UnidentifiedImageError as error:
        phone = path.suffix.lower() in (".heic", ".heif")
        raise InputError(
            f"can't read {path}: {'export it as JPEG or PNG' if phone else 'it is not an image'}"
        ) from error
    except Exception as error:  # what Pillow raises for a damaged file depends on the damage
        raise InputError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from error


def flattened(image: Image.Image, ground: str = "white") -> Image.Image:
    """An image of any mode as RGB in sRGB with nothing attached, transparency laid on the colour `ground`.

    Floating-point numbers are light from 0 to 1, as in float TIFFs. Integers of more than 8 bits are taken for 16 bits,
    and refused if all would be black then.

    Raises:
        InputError: it is no PIL image, its file is damaged, or its numbers are of another range.
    """
    if not isinstance(image, Image.Image):
        raise InputError(f"images must be PIL images, got {type(image).__name__}; open files with PIL.Image.open")
    try:
        image.load()
    except Exception as error:  # what Pillow raises for a damaged file depends on the damage
        raise InputError(f"can't read the image: {getattr(error, 'strerror', None) or error}") from error
    if image.mode == "RGB" and not image.info:
        return image
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode == "F" or image.mode.startswith("I"):
        image = _in_8_bits(image)
    if image.has_transparency_data:
        whole = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image, alpha = whole.convert(Image.getmodebase(image.mode)), whole.getchannel("A")
    flat = _in_srgb(image, profile)
    if alpha is not None:
        flat.putalpha(alpha)
        flat = Image.alpha_composite(Image.new("RGBA", flat.size, ground), flat).convert("RGB")
    flat.info = {}
    return flat


def _in_8_bits(image: Image.Image) -> Image.Image:
    """An image of larger numbers, which Pillow would clip at 255, as `L`, or `LA` if one of them is transparent."""
    values = np.asarray(image)
    least, most = values.min(), values.max()
    if image.mode == "F":
        _check_range(least >= 0 and most <= 1, least, most, "0 to 1")  # NaN is in no range
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    if 0 < most < 257:  # to take them for 8 bits would be a guess
        raise InputError(f"the image has numbers up to {most}, which of 16 bits are all black; save it in 8 bits")
    if image.mode == "I":  # 32 bits, in which Pillow keeps 16 bits, too
        _check_range(least >= 0 and most <= 65535, least, most, "0 to 65535")
    grey = Image.fromarray((values // 257).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255))
    return grey


def _check_range(fits: bool, least: float, most: float, expected: str) -> None:
    if not fits:
        raise InputError(f"the image has numbers from {least:g} to {most:g}, not {expected}; save it in 8 or 16 bits")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An opaque image as RGB, its colours converted from `profile` if that can be used."""
    plain = image.convert("RGB")
    if not profile:
        return plain
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        fits = plain if source.profile.xcolor_space.strip() == "RGB" and image.mode != "CMYK" else image
        converted = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), fits.mode, "RGB").apply(fits)
    except (OSError, ValueError, ImageCms.PyCMSError):  # damaged, or of another kind of colours than the image
        return plain
    # What is in sRGB already differs by rounding alone, and is to stay what it is.
    differs = ImageChops.difference(plain, converted).point(lambda levels: 255 if levels > 2 else 0)
    return converted if differs.getbbox() else plain


def check_output(path: Path, replace: bool = False) -> None:
    """Raise InputError if an image can't be written to `path`: its type, an existing file, its folder.

    A folder that is not there yet must be one that can be made.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"can't write {path}: the name must end in {', '.join(FORMATS)}, or in / to be a folder")
    if path.is_dir():
        raise InputError(f"can't write {path}: it is a folder")
    if os.path.lexists(path) and not replace:
        raise InputError(f"{path} exists; choose another name or pass replace=True to replace it")
    folder = next(folder for folder in path.parents if os.path.lexists(folder) or folder == folder.parent)
    if not folder.is_dir():
        raise InputError(f"can't write {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise InputError(f"can't write {path}: no permission to write in {folder}")


def check_whole(path: Path) -> None:
    """Raise InputError if a file is no image that can be read to its end."""
    with _reading(path), opened(path, MAX_INPUT_BYTES) as file, Image.open(file, formats=_formats()) as image:
        _check_pixels(path, image)
        image.load()


def check_size(path: Path, width: int, height: int) -> None:
    """Raise InputError if the format of `path` can't hold an image of this size."""
    name = FORMATS[path.suffix.lower()]
    if max(width, height) > _MAX_SIDE.get(name, math.inf):
        raise InputError(f"can't write {path}: {name} has at most {_MAX_SIDE[name]} pixels a side; choose .png")


def save(image: Image.Image, path: Path, settings: dict[str, Any] | None = None, *, replace: bool = False) -> Path:
    """Write `image` in the format that the name says, complete or not at all, and give the path that it is at.

    Unless `replace`, a file that is at `path` stays, and the image goes to the next free name, with a warning.
    `settings` (JSON-serialisable) go into PNG text chunks, or into EXIF for JPEG and WebP; where JPEG has no room for
    them, they are left out with a warning.

    Raises:
        InputError: the file can't be written.
    """
    options: dict[str, Any] = {"format": FORMATS[path.suffix.lower()]}
    if options["format"] != "PNG":
        options["quality"] = _QUALITY
    if settings is not None:
        kept = metadata(options["format"], settings)
        if not kept:
            _log.warning("%s does not carry its settings, which are too long for JPEG; choose .png to keep them", path)
        options |= kept
    try:
        encoded = io.BytesIO()  # Pillow's encoders take no notice of a disk that is full
        image.save(encoded, **options)
        written = write(path, encoded.getbuffer(), replace)
    except (OSError, ValueError) as error:
        raise InputError(f"can't write {path}: {getattr(error, 'strerror', None) or error}") from error
    if written != path:
        _log.warning("%s has appeared meanwhile and stays as it is; the image is %s", path, written)
    return written


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save` put into an image file.

    Raises:
        InputError: no readable image, or an image without settings of this tool.
    """
    with _reading(path), opened(path, MAX_INPUT_BYTES) as file, Image.open(file, formats=_formats()) as image:
        _check_pixels(path, image)
        settings = stored(image)
    if settings is None:
        raise InputError(f"{path} carries no settings of flux2-mlx: another program made it, or they were left out")
    return settings
