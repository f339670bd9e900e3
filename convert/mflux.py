"""Folders that mflux saves: one of numbered files with an index for each part, one of the tokenizer, and no config.

All versions that know FLUX.2, 0.15 to 0.24, write them so; the last ones also a record of what was saved.
"""

from pathlib import Path

from flux2_mlx.errors import CheckpointError
from flux2_mlx.json_files import read_json
from flux2_mlx.layout import INDEX

from .parts import LAYOUT

_FILES = "model.safetensors.index.json"
_RECORD = "mflux_model.json"
_NAMES = ("base_model", "model_name")  # of the record, which `titles` knows


def part_folders(place: Path) -> list[Path]:
    """The folders of the parts of a model that mflux saved at `place`; none if it is no such folder."""
    if (place / INDEX).is_file():
        return []
    return [place / name for name in LAYOUT if _is_saved(place / name)]


def said_of(place: Path) -> dict[str, str]:
    """What mflux's record in a folder says of the model; nothing if there is no record."""
    if not (place / _RECORD).is_file():
        return {}
    values = read_json(place / _RECORD)
    return {name: values[name] for name in _NAMES if isinstance(values.get(name), str)}


def _is_saved(folder: Path) -> bool:
    """Whether a folder holds a part that mflux saved; one with an index that can't be read does not."""
    try:
        metadata = read_json(folder / _FILES).get("metadata")
    except CheckpointError:
        return False
    return isinstance(metadata, dict) and "mflux_version" in metadata
