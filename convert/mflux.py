"""Models in a folder for each part and no config, most of which mflux saved: numbered files with an index in each, and
a folder of the tokenizer.

All versions of mflux that know FLUX.2, 0.15 to 0.24, write them so; the last ones also a record of what was saved.
"""

from pathlib import Path

from flux2_mlx.errors import CheckpointError
from flux2_mlx.json_files import read_json
from flux2_mlx.layout import INDEX, WEIGHTS

from .configs import CONFIG
from .formats import GGUF
from .parts import LAYOUT

_FILES = "model.safetensors.index.json"
_RECORD = "mflux_model.json"
_NAMES = ("base_model", "model_name")  # of the record, which `titles` knows


def part_folders(place: Path) -> list[Path]:
    """The folders of the parts of a model at `place` that mflux saved, or else of several that have no config; none if
    it is no such folder."""
    if (place / INDEX).is_file():
        return []
    folders = [place / name for name in LAYOUT]
    return [*filter(_is_saved, folders)] or _bare(folders)


def said_of(place: Path) -> dict[str, str]:
    """What mflux's record in a folder says of the model; nothing if there is no record."""
    if not (place / _RECORD).is_file():
        return {}
    values = read_json(place / _RECORD)
    return {name: values[name] for name in _NAMES if isinstance(values.get(name), str)}


def _bare(folders: list[Path]) -> list[Path]:
    """Those that hold weights, if there are several; none if one has a config, or a GGUF file, which is read alone."""
    endings = {folder: {path.suffix.lower() for path in folder.glob("*")} for folder in folders}
    found = [folder for folder, own in endings.items() if own & {*WEIGHTS}]
    is_other = any((folder / CONFIG).is_file() or GGUF in own for folder, own in endings.items())
    return found if len(found) > 1 and not is_other else []


def _is_saved(folder: Path) -> bool:
    """Whether a folder holds a part that mflux saved; one with an index that can't be read does not."""
    try:
        metadata = read_json(folder / _FILES).get("metadata")
    except CheckpointError:
        return False
    return isinstance(metadata, dict) and "mflux_version" in metadata
