"""The settings that made an image, kept inside its file."""

import json
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from .json_files import whole_number

_KEY = "flux2-mlx"
_UNICODE = b"UNICODE\0"  # how EXIF marks a comment in UTF-16
_MAX_JPEG_EXIF = 65533
_MAX_CHARACTERS = 1_000_000  # ten times what a long prompt and a hundred references take


def describe(settings: dict[str, Any]) -> str:
    """The settings as the one-paragraph text that other image tools show under `parameters`."""
    negative = f"\nNegative prompt: {text}" if (text := settings.get("negative_prompt")) else ""
    return (
        f"{settings['prompt']}{negative}\n"
        f"Steps: {settings['steps']}, Sampler: Euler, CFG scale: {settings['guidance']}, "
        f"Seed: {settings['seed']}, Size: {settings['width']}x{settings['height']}, Model: {settings['model']}, "
        f"Version: flux2-mlx {settings['version']}"
    )


def metadata(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What `Image.save` is told for the settings to be kept in a file of this kind; nothing if they don't fit."""
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", _encodable(describe(settings)))
        info.add_itxt(_KEY, _payload(settings))
        return {"pnginfo": info}
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = describe(settings)  # Pillow writes ? for what is not ASCII
    exif[ExifTags.Base.Software] = f"flux2-mlx {settings['version']}"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UNICODE + _payload(settings).encode("utf-16-be")
    if kind == "JPEG" and len(exif.tobytes()) > _MAX_JPEG_EXIF:
        return {}
    return {"exif": exif}


def _payload(settings: dict[str, Any]) -> str:
    return _encodable(json.dumps(settings, ensure_ascii=False))


def _encodable(text: str) -> str:
    """`text` with escapes, which JSON knows too, for bytes of file names that are not text."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def stored(image: Image.Image) -> dict[str, Any] | None:
    """The settings inside an opened image file; None if it has none of ours.

    Raises:
        ValueError: they are damaged; Pillow raises what it likes.
    """
    payload = _text(image)
    if len(payload) > _MAX_CHARACTERS:
        raise ValueError(
            f"its settings have {len(payload):,} characters, of which at most {_MAX_CHARACTERS:,} are read"
        )
    settings = json.loads(payload, parse_int=whole_number) if payload else None
    return settings if isinstance(settings, dict) else None


def _text(image: Image.Image) -> str:
    if isinstance(image, PngImagePlugin.PngImageFile):
        return image.text.get(_KEY, "")
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return ""
    return comment.removeprefix(_UNICODE).decode("utf-16-be")
