"""Pixels to image files and back, with the settings that made an image kept inside its file."""

import hashlib
import io
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from .errors import InputError

MAX_INPUT_PIXELS = 100_000_000
_MAX_INPUT_BYTES = 10 * MAX_INPUT_PIXELS  # RGBA of 16 bits takes 8 a pixel
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_SETTINGS_KEY = "flux2-mlx"
_UNICODE = b"UNICODE\0"  # how EXIF marks a comment in UTF-16
_QUALITY = 95
_MAX_JPEG_EXIF = 65533
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
        if path.stat().st_size > _MAX_INPUT_BYTES:
            raise InputError(f"{path} is too large for an image: {path.stat().st_size:,} bytes")
        data = path.read_bytes()
        return flattened(_decoded(path, data), ground), hashlib.sha256(data).hexdigest()


def _decoded(path: Path, data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > MAX_INPUT_PIXELS:
            raise InputError(f"{path} is too large: {image.width}×{image.height}; scale it down first")
        # Behind a camera's picture an MPO file, named .jpg, has only a preview or a second view of it.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            if image.format == "TIFF":
                raise InputError(f"{path} has several pages; save one of them as an image")
            raise InputError(f"{path} is an animation; save one of its frames as an image")
        image.load()
        return ImageOps.exif_transpose(image)


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

    Raises:
        InputError: it is no PIL image.
    """
    if not isinstance(image, Image.Image):
        raise InputError(f"images must be PIL images, got {type(image).__name__}; open files with PIL.Image.open")
    if image.mode == "RGB" and not image.info:
        return image
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        image, alpha = whole.convert(Image.getmodebase(image.mode)), whole.getchannel("A")
    flat = _in_srgb(image, profile)
    if alpha is not None:
        flat.putalpha(alpha)
        flat = Image.alpha_composite(Image.new("RGBA", flat.size, ground), flat).convert("RGB")
    flat.info = {}
    return flat


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An opaque image as RGB, its colours converted from `profile` if that can be used."""
    plain = image.convert("RGB")
    if not profile:
        return plain
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        fits = plain if source.profile.xcolor_space.strip() == "RGB" and image.mode != "CMYK" else image
        converted = ImageCms.profileToProfile(fits, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ValueError, ImageCms.PyCMSError):  # damaged, or of another kind of colours than the image
        return plain
    # What is in sRGB already differs by rounding alone, and is to stay what it is.
    furthest = max(high for _, high in ImageChops.difference(plain, converted).getextrema())
    return converted if furthest > 2 else plain


def describe(settings: dict[str, Any]) -> str:
    """The settings as the one-paragraph text that other image tools show under `parameters`."""
    return (
        f"{settings['prompt']}\nSteps: {settings['steps']}, Sampler: Euler, CFG scale: {settings['guidance']}, "
        f"Seed: {settings['seed']}, Size: {settings['width']}x{settings['height']}, Model: {settings['model']}, "
        f"Version: flux2-mlx {settings['version']}"
    )


def check_output(path: Path, force: bool = False) -> None:
    """Raise InputError if an image can't be written to `path`: its type, an existing file, its folder."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"can't write {path}: the name must end in {', '.join(FORMATS)}, or be a folder that exists")
    if path.is_dir():
        raise InputError(f"can't write {path}: it is a folder")
    if path.exists() and not force:
        raise InputError(f"{path} exists; choose another name or pass --force to replace it")
    if not path.parent.is_dir():
        raise InputError(f"can't write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"can't write {path}: no permission to write in {path.parent}")


def check_size(path: Path, width: int, height: int) -> None:
    """Raise InputError if the format of `path` can't hold an image of this size."""
    name = FORMATS[path.suffix.lower()]
    if max(width, height) > _MAX_SIDE.get(name, math.inf):
        raise InputError(f"can't write {path}: {name} has at most {_MAX_SIDE[name]} pixels a side; choose .png")


def save(image: Image.Image, path: Path, settings: dict[str, Any] | None = None) -> None:
    """Write `image` in the format that the name says, complete or not at all.

    `settings` (JSON-serialisable) go into PNG text chunks, or into EXIF for JPEG and WebP; where JPEG has no room for
    them, they are left out with a warning.

    Raises:
        InputError: the file can't be written.
    """
    options: dict[str, Any] = {"format": FORMATS[path.suffix.lower()]}
    if options["format"] != "PNG":
        options["quality"] = _QUALITY
    if settings is not None:
        options |= _metadata(path, settings)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".flux2-mlx-")
        try:
            with os.fdopen(handle, "wb") as file:
                image.save(file, **options)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except (OSError, ValueError) as error:
        raise InputError(f"can't write {path}: {getattr(error, 'strerror', None) or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _metadata(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `Image.save` is told for the settings to be kept."""
    name = FORMATS[path.suffix.lower()]
    if name == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", _encodable(describe(settings)))
        info.add_itxt(_SETTINGS_KEY, _payload(settings))
        return {"pnginfo": info}
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = describe(settings)  # Pillow writes ? for what is not ASCII
    exif[ExifTags.Base.Software] = f"flux2-mlx {settings['version']}"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UNICODE + _payload(settings).encode("utf-16-be")
    if name == "JPEG" and len(exif.tobytes()) > _MAX_JPEG_EXIF:
        _log.warning("%s does not carry its settings, which are too long for JPEG; choose .png to keep them", path)
        return {}
    return {"exif": exif}


def _payload(settings: dict[str, Any]) -> str:
    return _encodable(json.dumps(settings, ensure_ascii=False))


def _encodable(text: str) -> str:
    """`text` with escapes, which JSON knows too, for bytes of file names that are not text."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save` put into an image file.

    Raises:
        InputError: no readable image, or an image without settings of this tool.
    """
    with _reading(path):
        with Image.open(path) as image:
            payload = _stored(image)
        settings = json.loads(payload) if payload else None
    if not isinstance(settings, dict):
        raise InputError(f"{path} carries no settings of flux2-mlx, so it can't be made again")
    return settings


def _stored(image: Image.Image) -> str | None:
    if image.format == "PNG":
        return image.text.get(_SETTINGS_KEY)
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return None
    return comment.removeprefix(_UNICODE).decode("utf-16-be")
