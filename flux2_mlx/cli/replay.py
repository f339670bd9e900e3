"""What an image file remembers, read to make it again. Whoever made it chose what it says, so nothing is trusted."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import sha256_if_there

if TYPE_CHECKING:
    from ..store import Model

# What goes back to the option of the same name.
SETTINGS = {
    "model": str,
    "variant": str,
    "quant": str,
    "text_quant": str,
    "dtype": str | None,  # older images don't say it
    "decoder": dict | str | None,  # older images say the name alone
    "width": int,
    "height": int,
    "steps": int,
    "guidance": float,
    "negative_prompt": str | None,
    "seed": int,
    "sigmas": list | None,
    "shift_steps": int | None,
    "step_cache": float | None,
}
_OPTIONAL = {
    **dict.fromkeys(("upsampled_prompt", "fingerprint"), str | None),
    **dict.fromkeys(("edit", "machine"), dict | None),
    **dict.fromkeys(("adapters", "beyond"), list | None),
}
_MACHINE: dict[str, Callable[[Any], str]] = {
    "chip": str,
    "system": str,
    "mlx": lambda version: f"MLX {version}",
    "tf32": lambda there: "float32 cut to TF32" if there else "whole float32",
}
_FILE = {"path": str, "sha256": str}
_DECODER = {"name": str, "sha256": str}


def remembered(image: Path) -> dict[str, Any]:
    """The settings in an image file.

    Raises:
        InputError: it has none, or they are damaged.
    """
    from ..images import read_settings

    settings = read_settings(image)
    check_kinds(settings, {"prompt": str, **_OPTIONAL, **SETTINGS}, image)
    if any(type(sigma) not in (int, float) for sigma in settings.get("sigmas") or ()):
        raise InputError(f"the settings in {image} are damaged: sigmas is {settings['sigmas']!r:.80}")
    if settings.get("beyond"):
        given = ", ".join(map(str, settings["beyond"]))
        raise InputError(f"{image} was made in Python with {given:.200}, which it does not hold; make it again there")
    return settings


def elsewhere(settings: dict[str, Any], image: Path) -> str | None:
    """A line that says how what `image` was made with, from its settings, differs from this machine and its MLX; None:
    in nothing that they tell. Ask where it is known what a new one would be computed in."""
    from ..device import machine

    here, there = machine(), settings.get("machine")
    if not isinstance(there, dict):
        return None
    known = [name for name, value in here.items() if None not in (value, there.get(name))]
    names = [name for name in known if _MACHINE[name](there[name]) != _MACHINE[name](here[name])]
    if not names:
        return None
    then, now = (", ".join(_MACHINE[name](found[name]) for name in names) for found in (there, here))
    return f"{image} was made with {then}, and here it is {now}, so a new one may differ a little"


def check_kinds(values: Any, kinds: dict[str, Any], image: Path) -> None:
    """Raise InputError if `values`, which `image` remembers, are not all of their kinds; None may be left out."""
    if not isinstance(values, dict):
        raise InputError(f"the settings in {image} are damaged: {values!r:.80} should say {', '.join(kinds)}")
    for name, kind in kinds.items():
        value = values.get(name)
        is_sound = not isinstance(value, bool) and (not isinstance(value, float) or math.isfinite(value))
        if not isinstance(value, kind) or not is_sound:
            raise InputError(f"the settings in {image} are damaged: {name} is {value!r:.80}")


def check_file(file: Any, image: Path) -> None:
    """Raise InputError if `file` is not what an image remembers of one that it was made from."""
    check_kinds(file, _FILE, image)


def find(file: dict[str, str], image: Path, way_out: str) -> Path:
    """The file that an image was made from: where older images say it is, beside the image, or in the current folder.

    Raises:
        InputError: none of these is there with the content that it had.
    """
    check_file(file, image)
    from ..images import MAX_INPUT_BYTES

    path = Path(file["path"])
    places = dict.fromkeys((path, image.parent / path.name, Path(path.name)))
    if found := next((x for x in places if sha256_if_there(x, MAX_INPUT_BYTES) == file["sha256"]), None):
        return found
    name = path.name or path
    raise InputError(f"{name}, which {image} was made from, is neither beside it nor here, or has changed; {way_out}")


def find_decoder(told: Any, image: Path, models_dir: Path | None) -> tuple[str | None, str | None]:
    """What `--decoder` is to be for another image like `image`, which remembers this of it, and the hash that it had.

    Nothing is fetched or opened because an image says so, but what is known by name or has the content that it had.

    Raises:
        InputError: it is neither.
    """
    from ..store import DECODERS, decoder_with

    if told is None:
        return None, None
    if not isinstance(told, str):
        check_kinds(told, _DECODER, image)
    name, sha256 = (told, None) if isinstance(told, str) else (told["name"], told["sha256"])
    if name in DECODERS:
        return name, sha256
    places = (image.parent, Path())
    if sha256 and (found := decoder_with(sha256, Path(name.rpartition(":")[2]).name, places, models_dir)):
        return str(found), sha256
    raise InputError(
        f"the decoder {name!r:.200}, which {image} was made with, is neither beside it nor here, nor in the models "
        "folder or in the Hub's cache, or has changed; name it with --decoder"
    )


def find_model(name: str, fingerprint: str | None, image: Path, *, models_dir: Path | None, **weights: Any) -> "Model":
    """The model that `image` remembers: one of the table, a converted one of its `fingerprint`, or one of its name.

    `weights` are the variant and the quantizations.

    Raises:
        InputError: it is none of the table, and not here.
    """
    from ..store import find_checkpoint, find_conversion, find_variant, resolve

    if find_variant(name) is None and (found := find_conversion(fingerprint, models_dir=models_dir, **weights)):
        return resolve(found)
    try:
        model = resolve(name, models_dir)
    except InputError as error:
        if "/" in name:
            raise
        raise InputError(f"{image} was made with the model {name!a}, which is not here; name it with -m") from error
    if model.variant is None:
        find_checkpoint(model, models_dir=models_dir, **weights, only_converted=True)
    return model


def label(model: "Model") -> str:
    """What an image says of its model: its name in the table, its repo, or the name of its folder or file here."""
    if model.variant:
        return model.variant.name
    return model.repo or Path(os.path.abspath(model.place)).name


def without_folder(name: str) -> str:
    """What an image says of its model, without the folder that older ones name."""
    return name if name.count("/") == 1 and not name.startswith(("/", ".", "~")) else Path(name).name or name


def without_folders(value: Any) -> Any:
    """What an image remembers of an edit, with names alone in place of the paths that older images have."""
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        key: Path(x).name if key == "path" and isinstance(x, str) else without_folders(x) for key, x in value.items()
    }
