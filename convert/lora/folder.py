"""The folder of an adapter: which file that is, and whether PEFT's config there is about it."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flux2_mlx.errors import CheckpointError
from flux2_mlx.files import check_kind
from flux2_mlx.json_files import read_json
from flux2_mlx.layout import PICKLES, SAFETENSORS

from .settings import ALPHA, DIFFUSERS

PEFT_CONFIG = "adapter_config.json"
PEFT_MODEL = "adapter_model.safetensors"
DIFFUSERS_MODEL = "pytorch_lora_weights.safetensors"
USUAL_FILES = (PEFT_MODEL, DIFFUSERS_MODEL)
CONFIG_ASIDE = f"{PEFT_CONFIG} beside it is left aside, as it may be about another file of its folder"

CONFIG_MISSING = f"there is no {PEFT_CONFIG} beside it, which sets its strength; 1 is taken, as if alpha were the rank"


def find_file(source: Path, weight_name: str | None) -> Path:
    """The file of an adapter: `source` itself, or the one in that folder; see `read_adapter`."""
    if source.suffix.lower() in PICKLES or (weight_name or "").lower().endswith(PICKLES):
        raise CheckpointError(f"{weight_name or source} is a pickle, which could run code; fetch it as {SAFETENSORS}")
    if not source.exists():
        raise CheckpointError(f"there is no file or folder {source}")
    check_kind(source)
    if source.is_file():
        if weight_name not in (None, source.name):
            raise CheckpointError(f"{source} is a file, so weight_name={weight_name!r} is none in it; leave that out")
        return source
    if weight_name is not None:
        if Path(weight_name).is_absolute() or ".." in Path(weight_name).parts or not (source / weight_name).is_file():
            raise CheckpointError(f"{source} holds no file {weight_name!r}")
        return source / weight_name
    found = sorted(path for path in source.glob("*") if is_adapter(path.name))
    usual = [path for path in found if path.name in USUAL_FILES] or found
    if len(usual) == 1:
        return usual[0]
    if not found:
        pickles = any(path.suffix.lower() in PICKLES for path in source.glob("*"))
        more = ", only pickles, which could run code" if pickles else ""
        raise CheckpointError(f"{source} holds no {SAFETENSORS} file{more}; give an adapter's file")
    raise CheckpointError(f"{source} holds several files: {', '.join(x.name for x in found[:4])}; give one of them")


def names_beside(path: Path) -> list[str]:
    """The names of all files in the folder of a file, its own included; CheckpointError if it can't be listed."""
    try:
        return os.listdir(path.parent)
    except OSError as error:
        raise CheckpointError(f"can't list {path.parent}: {error.strerror or error}") from error


def is_adapter(name: str) -> bool:
    """Whether a file of this name may be an adapter; those with a dot in front are what macOS notes of others."""
    return name.lower().endswith(SAFETENSORS) and not name.startswith(".")


def is_config_of(name: str, names: Collection[str]) -> bool:
    """Whether PEFT's config in a folder with files of these `names` is about the one called `name`: it is about the
    folder, so of several adapters it can be about any."""
    return PEFT_CONFIG in names and (name == PEFT_MODEL or sum(map(is_adapter, names)) == 1)


def config_beside(
    path: Path, metadata: Mapping[str, str], names: Collection[str]
) -> tuple[dict[str, Any] | None, bool]:
    """PEFT's config of an adapter's file whose header says `metadata`, if that does not tell its strength itself; and
    whether there is one that is left aside, as it may be about another file. A link without one has that of its target.

    Args:
        path, metadata: of the file.
        names: those of all files of its folder where it comes from, of which here some may be missing.

    Raises:
        CheckpointError: the config is not here, or can't be read.
    """
    if PEFT_CONFIG not in names and path.is_symlink():
        path = path.resolve()
        names = names_beside(path)
    says = DIFFUSERS in metadata or (path.name != PEFT_MODEL and ALPHA in metadata)
    if says or not is_config_of(path.name, names):
        return None, not says and PEFT_CONFIG in names
    beside = path.with_name(PEFT_CONFIG)
    if not beside.exists():
        raise CheckpointError(f"{path} comes with {PEFT_CONFIG}, which sets its strength and is not here; fetch it too")
    return read_json(beside, unique=True), False
