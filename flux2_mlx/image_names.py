"""Names of image files: what a template says of them, and how the images of a run are told apart."""

import os
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import free_path

PLACEHOLDERS = ("seed", "prompt", "model", "index", "width", "height", "steps")
_IN_A_FOLDER = "{model}-{seed}.png"
_OF_A_LIST = "{model}-{seed}-{prompt}.png"
_MAX_SLUG = 60
_MAX_SLUG_BYTES = 120  # of the 255 that a name may have
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}

Values = Mapping[str, str]  # what goes in place of each of the placeholders for an image


def slug(text: str) -> str:
    """What a file can be called after `text`: letters and digits of any language in lower case, joined by hyphens."""
    kept = " "
    for character in unicodedata.normalize("NFC", text).lower():
        kind = unicodedata.category(character)
        if kind[0] in "LN" or (kind[0] == "M" and kept[-1] != " "):
            kept += character
        elif kind[0] != "M" and kind != "Cf" and character not in "'’":  # what joins letters, or stands within a word
            kept += " "
    words = "-".join(kept.split())
    short = words[:_MAX_SLUG].encode()[:_MAX_SLUG_BYTES].decode(errors="ignore")
    if len(short) < len(words) and words[len(short)] != "-" and "-" in short[_MAX_SLUG // 2 :]:
        short = short.rpartition("-")[0]
    name = short.strip("-") or "image"
    return f"image-{name}" if name in _DEVICES else name  # Windows opens a device of that name


def model_name(model: str) -> str:
    """What a file can be called after a model: the last part of its name, repo id or folder."""
    return Path(model).absolute().name.lstrip(".") or "model"


def values_of(images: Sequence[Mapping[str, Any]]) -> list[Values]:
    """The values of images: of each are given what the placeholders stand for but `index`, which is its place.

    Without a `prompt` or a `seed` there is another word, or the place, for it.
    """
    digits = len(str(len(images)))
    return [
        {
            "index": (index := f"{place:0{digits}}"),
            "seed": index if image["seed"] is None else str(image["seed"]),
            "prompt": slug(image["prompt"] or ""),
            "model": model_name(image["model"]),
            **{name: str(image[name]) for name in ("width", "height", "steps")},
        }
        for place, image in enumerate(images, 1)
    ]


def expanded(template: str, values: Values) -> str:
    """`template` with values in place of its {placeholders}; {{ and }} stand for braces.

    Raises:
        InputError: a placeholder is unknown or has a format, or a brace stands alone.
    """
    known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"can't read the name {template!r}: {error}; write {{{{ and }}}} for braces") from error
    name = ""
    for text, field, form, conversion in parts:
        name += text
        if field is None:
            continue
        if field not in PLACEHOLDERS:
            raise InputError(f"there is no {{{field}}} in the name {template!r}; use {known}, or {{{{ for a brace")
        if form or conversion:
            raise InputError(f"the name {template!r} gives {field} a format, which it can't have; write {{{field}}}")
        name += values[field]
    return name


def check(template: str) -> None:
    """Raise InputError if `template` can't be read."""
    expanded(template, dict.fromkeys(PLACEHOLDERS, ""))


def paths(templates: Sequence[str | None], images: Sequence[Values], *, listed: bool, keep: bool) -> list[Path]:
    """The file of each image, no two of them the same on any disk.

    A name that several images would get has the seed added, where that tells them apart, then the prompt, or else a
    number. A template that ends in / or is a folder gives the folder, in which images are named after model and seed;
    one that begins with ~/ is below the home folder.

    Args:
        templates: what is asked for each image; None: the current folder.
        images: the values of each.
        listed: the prompts are those of a file, so that names in a folder tell them.
        keep: names in a folder are these even where there is something already; else they are free ones.

    Raises:
        InputError: a template can't be read.
    """
    found = []
    chosen = []
    for template, values in zip(templates, images, strict=True):
        path, is_folder = _asked(template, values)
        found.append(path / expanded(_OF_A_LIST if listed else _IN_A_FOLDER, values) if is_folder else path)
        chosen.append(not is_folder)
    for name in ("seed", "prompt"):
        found = _told_apart(found, [values[name] for values in images])
    return _numbered(found, [own or keep for own in chosen])


def _asked(template: str | None, values: Values) -> tuple[Path, bool]:
    """The path that a template gives, and whether it is a folder."""
    if template is None:
        return Path(), True
    template = os.path.expanduser(template)
    if os.path.isdir(template or "."):  # whatever braces are in its name
        return Path(template), True
    name = expanded(template, values)
    return Path(name), name.endswith("/") or os.path.isdir(name)


def _key(path: Path) -> str:
    """A key that is equal for two names which some disk may take for one."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def _told_apart(paths: list[Path], values: list[str]) -> list[Path]:
    """`paths`, each that several images have with the image's value added, if the values of these differ."""
    pairs = [(_key(path), value) for path, value in zip(paths, values, strict=True)]
    distinct = Counter(key for key, _ in set(pairs))
    return [
        path.with_name(f"{path.stem}-{value}{path.suffix}") if distinct[key] > 1 else path
        for path, (key, value) in zip(paths, pairs, strict=True)
    ]


def _numbered(paths: list[Path], fixed: list[bool]) -> list[Path]:
    """`paths` with numbers added where one is that of an earlier image, or taken on the disk unless it is `fixed`."""
    taken: set[str] = set()
    for place, path in enumerate(paths):
        paths[place] = free_path(path, partial(_is_free, taken=taken, fixed=fixed[place]))
        taken.add(_key(paths[place]))
    return paths


def _is_free(path: Path, taken: set[str], fixed: bool) -> bool:
    return _key(path) not in taken and (fixed or not os.path.lexists(path))
