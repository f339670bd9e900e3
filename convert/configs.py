"""From the configs of a folder in the diffusers layout to our geometry."""

import json
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import check_fit
from flux2_mlx.components import MAIN_PART, PARTS
from flux2_mlx.config import VARIANTS, Geometries, TransformerConfig, Variant, variant_named
from flux2_mlx.errors import CheckpointError
from flux2_mlx.files import check_kind
from flux2_mlx.json_files import read_json
from flux2_mlx.layout import INDEX, PICKLES, WEIGHTS
from flux2_mlx.wording import some

from .formats import GGUF, METHOD, SETTINGS, unreadable
from .geometry import choose, titles
from .options import SCHEDULER, checked, refuse
from .parts import LAYOUT

# The pipelines of diffusers that are saved as such a folder, with what they take for a missing `is_distilled`.
_DEV = ("Flux2Pipeline", "Flux2ModularPipeline")
_KV = "Flux2KleinKVPipeline"
_KLEIN = {
    "Flux2KleinPipeline": False,
    "Flux2KleinInpaintPipeline": False,
    "Flux2KleinBaseModularPipeline": False,
    "Flux2KleinModularPipeline": True,
}
UNQUANTIZED = "give the model that it was made from, which becomes qint8 or qint4 here"
# Where a config says how weights are packed, and by which methods they may be: their tensors tell the rest.
_PACKING = (SETTINGS, "quantization_config", "compression_config")
_METHODS = ("bitsandbytes", "quanto", "torchao", "fp8", "comfy")
COMPLETE = "fetch it again, or give a complete copy"
CONFIG = "config.json"
SCHEDULE = "scheduler/scheduler_config.json"
RELEASED_SCHEDULE = Path(str(files("flux2_mlx.demo"))) / SCHEDULE
# Of these, diffusers takes the class from `model_index.json` rather than from their own files.
_CLASSES = {name: part.kind for name, part in LAYOUT.items() if part.kind} | {
    "scheduler": "FlowMatchEulerDiscreteScheduler"
}


@dataclass(frozen=True)
class Stated:
    """What the `config.json` beside the files of a part says: of its geometry, and of how its weights are packed."""

    values: dict[str, Any] = field(default_factory=dict)
    packing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """What the small files of a folder say, as parsed: only the family of the model has been checked."""

    folder: Path
    index: dict[str, Any]
    parts: dict[str, Stated]
    scheduler: dict[str, Any]
    repo: str = ""


def describe(folder: Path, repo: str = "") -> Description:
    """Read the small files of a folder in the layout of diffusers.

    Raises:
        CheckpointError: another family of models, a file that is missing or damaged, quantized weights.
    """
    index = read_index(folder)
    schedule = schedule_of(folder)
    for path in (*(folder / name / CONFIG for name in PARTS), schedule):
        if not os.path.lexists(path):
            raise CheckpointError(f"{folder} is incomplete: there is no {path.relative_to(folder)}; {COMPLETE}")
    parts = {name: stated(folder / name) for name in PARTS}
    return Description(folder, index, parts, read_json(schedule), repo)


def is_whole(folder: Path) -> bool:
    """Whether a folder is a model in the layout of diffusers, with or without `model_index.json`."""
    return (folder / INDEX).is_file() or all((folder / name / CONFIG).is_file() for name in PARTS)


def schedule_of(folder: Path) -> Path:
    """The schedule of the model in a folder: its own, or that of all released models if it has not even an index."""
    own = folder / SCHEDULE
    return own if own.exists() or (folder / INDEX).is_file() else RELEASED_SCHEDULE


def stated(folder: Path) -> Stated:
    """What the `config.json` of a folder says; nothing if there is none. CheckpointError if its weights are packed in
    a way that can't be read."""
    if not os.path.lexists(path := folder / CONFIG):
        return Stated()
    config = read_json(path)
    return Stated({key: x for key, x in config.items() if key not in _PACKING}, _packing(folder, config))


def _packing(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """How weights are packed, where a config says it and not their files; CheckpointError if they can't be read."""
    if how := unreadable((), config):
        raise CheckpointError(f"{folder} is {how}")
    stated = config.get(SETTINGS)
    stored = config.get("quantization_config") or config.get("compression_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if stored and stored != stated and method not in _METHODS:
        what = f"quantized by {method or 'an unknown method'!s:.80}"
        raise CheckpointError(f"{folder} holds weights that are {what}, which are not read; {UNQUANTIZED}")
    return {SETTINGS: json.dumps(stated)} if stated else {METHOD: str(method)} if stored else {}


def read_configs(description: Description, variant: str | None) -> tuple[Variant, Geometries, list[str]]:
    """The model's row of the table, the geometry of each of its networks, and what a user should know of the configs.

    Args:
        description: what `describe` has read.
        variant: the model's name where geometry and `model_index.json` can't tell, or None.

    Raises:
        CheckpointError: another model, or one that asks for what is not implemented.
    """
    folder = description.folder
    notes = list[str]()
    configs = _configs(description, MAIN_PART, None, notes)
    row = _choose_variant(description, configs[MAIN_PART], variant)
    for name in [name for name in PARTS if name != MAIN_PART]:
        configs |= _configs(description, name, row, notes)
    check_fit(row, configs)
    checked(description.scheduler, SCHEDULER, folder / SCHEDULE, notes)
    return row, configs, notes


def _configs(description: Description, part: str, variant: Variant | None, notes: list[str]) -> Geometries:
    """The geometries of the networks that are made from a part."""
    return LAYOUT[part].configs(description.parts[part].values, variant, description.folder / part / CONFIG, notes)


def read_index(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise CheckpointError(f"there is no file or folder {folder}")
    check_kind(folder)
    if folder.is_file():
        is_pickle = folder.suffix.lower() in PICKLES
        kind = "a pickle, which could run code" if is_pickle else "named neither .safetensors nor .gguf"
        advice = "give a .safetensors or .gguf file, a folder in the diffusers layout or a repo id"
        raise CheckpointError(f"{folder} is {kind}; {advice}")
    if not is_whole(folder):
        hint = _whereabouts(folder)
        raise CheckpointError(f"{folder} is no model folder in the diffusers layout: it has no {INDEX}{hint}")
    has_index = (folder / INDEX).is_file()
    index = read_json(folder / INDEX) if has_index else _classes(folder)
    pipeline = index.get("_class_name")
    if has_index and pipeline not in (*_DEV, _KV, *_KLEIN):
        raise CheckpointError(f"{folder} holds {reprlib.repr(pipeline)}, not FLUX.2; give a model of that family")
    for name, wanted in _CLASSES.items():
        match index.get(name):
            case [_, str(found)] if found != wanted:
                refuse(name, found, wanted, folder / INDEX if has_index else folder / name / CONFIG)
    return index


def _classes(folder: Path) -> dict[str, Any]:
    """What a missing `model_index.json` would say of the parts, by their own configs."""
    own = {name: read_json(folder / name / CONFIG).get("_class_name") for name in _CLASSES if name in PARTS}
    return {name: [None, str(found)] for name, found in own.items()}


def _choose_variant(description: Description, transformer: TransformerConfig, name: str | None) -> Variant:
    folder, index = description.folder, description.index
    same = [v for v in VARIANTS.values() if v.transformer == transformer]
    if name is not None:
        row = variant_named(name)
        if same and row not in same:
            raise CheckpointError(f"{folder} can't be {name}: its geometry is that of {_names(same)}")
        return row
    if "_class_name" not in index:
        return choose(same or [*VARIANTS.values()], titles({}, folder.name, description.repo), None, str(folder))
    rows = same if len(same) == 1 else [v for v in same or VARIANTS.values() if is_like(v, index)]
    if len(rows) != 1:
        raise CheckpointError(
            f"can't tell which model {folder} is; name it with variant=NAME ({_names(same or VARIANTS.values())})"
        )
    return rows[0]


def hints(place: Path, metadata: Mapping[str, str], repo: str = "") -> list[str]:
    """What may say which model a transformer is of, what says it best first: names of models that are as the
    `model_index.json` of its model says, then `titles`.

    Args:
        place: its file or folder.
        metadata: what its files say of themselves.
        repo: where it comes from, as `owner/name`.
    """
    folder = Path(os.path.abspath(place.parent if place.is_file() else place))
    if folder.name != MAIN_PART:
        return titles(metadata, place.name, repo)
    return [*_like_index(folder.parent), *titles(metadata, place.name, repo or folder.parent.name)]


def _like_index(folder: Path) -> list[str]:
    """The names of the models that are as the `model_index.json` of a folder says; none if it is of no known class."""
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    if index.get("_class_name") not in (*_DEV, _KV, *_KLEIN):
        return []
    return [row.name for row in VARIANTS.values() if is_like(row, index)]


def is_like(variant: Variant, index: dict[str, Any]) -> bool:
    """Whether `variant` is of the kind that `model_index.json` tells by its class and `is_distilled`."""
    pipeline = index["_class_name"]
    if pipeline in _DEV or variant.transformer.guidance_embeds:
        return pipeline in _DEV and variant.transformer.guidance_embeds
    if pipeline == _KV or variant.kv_cache:
        return pipeline == _KV and variant.kv_cache
    return index.get("is_distilled", _KLEIN[pipeline]) == variant.distilled


def _whereabouts(folder: Path) -> str:
    """Where the model may be that is not in `folder`."""
    if (folder.parent / INDEX).is_file():
        return f"; it is a part of {folder.parent}, give that"
    found = sorted((*folder.glob(f"*/{INDEX}"), *folder.glob("models--*--*/snapshots")))
    if found:
        return f"; give {' or '.join(str(path.parent) for path in found[:3])}"
    if weights := sorted(path.name for path in folder.glob("*") if path.suffix.lower() in WEIGHTS):
        return f", and holds several files of weights: {some(weights)}; give one of them"
    if found := sorted(folder.glob(f"{MAIN_PART}/*{GGUF}")):
        return f"; give {found[0]}, and its other parts beside it"
    if (folder / MAIN_PART / CONFIG).is_file():
        return "; copy that of the model that it was made from into it"
    return ""


def _names(variants: Iterable[Variant]) -> str:
    return ", ".join(variant.name for variant in variants)
