"""Which files weights are in: single ones, sets that are numbered or that an index lists, and folders of these."""

import re
from pathlib import Path

from flux2_mlx.checkpoint import is_checkpoint
from flux2_mlx.errors import CheckpointError
from flux2_mlx.files import check_kind
from flux2_mlx.json_files import read_json
from flux2_mlx.layout import INDEX, NUMBERS, PICKLES, SET_INDEX, SHARD
from flux2_mlx.wording import some

from . import formats
from .configs import COMPLETE, is_whole
from .mflux import part_folders

LOOSE = (".safetensors", formats.GGUF)  # endings of files that hold weights of parts of a model


def is_loose(place: Path) -> bool:
    """Whether `place` is weights without configs, rather than a whole model folder: a file, the index of a set, a
    folder that holds nothing but one set, or what mflux saved."""
    if place.is_dir():
        return bool(part_folders(place)) or (not _is_model(place) and len(_sets(place)) == 1)
    return place.is_file() and (place.suffix.lower() in LOOSE or _is_index(place))


def loose_files(place: Path) -> list[Path]:
    """The files of weights that `place` is: itself, those that it lists, or those of a folder that holds one set."""
    check_kind(place)
    if place.is_file():
        if _is_index(place):
            return _present(place.parent, _indexed(place))
        if place.suffix.lower() in PICKLES:
            raise CheckpointError(f"{place} is a pickle, which could run code; fetch it as .safetensors")
        if place.suffix.lower() not in LOOSE:
            raise CheckpointError(f"{place} is named neither .safetensors nor .gguf; give such a file, or rename it")
        return _present(place.parent, numbered) if (numbered := _set_of(place.name)) else [place]
    if not place.exists():
        raise CheckpointError(f"there is no file or folder {place}")
    for stem in ("model", "diffusion_pytorch_model"):
        if (place / f"{stem}.safetensors").is_file() or any(place.glob(f"{stem}*.safetensors*")):
            return weight_files(place, stem)
    if folders := part_folders(place):
        return [path for folder in folders for path in loose_files(folder)]
    sets = _sets(place)
    if len(sets) == 1:
        return _present(place, sets[0])
    if is_whole(place) or is_checkpoint(place):
        raise CheckpointError(f"{place} is a whole model; give a file or folder of one part, such as {place / 'vae'}")
    several = f": {', '.join(names[0] for names in sets[:4])}; give one of them" if sets else ""
    raise CheckpointError(
        f"{place} is no model folder, and holds {'several files' if sets else 'no file'} of weights{several}"
    )


def _is_model(folder: Path) -> bool:
    """Whether a folder is a whole model, or a part of one."""
    return is_checkpoint(folder) or is_whole(folder) or (folder.parent / INDEX).is_file()


def _is_index(file: Path) -> bool:
    return file.name.endswith(SET_INDEX)


def _set_of(name: str) -> list[str]:
    """The names of the numbered set that a file is of; none: it is of none."""
    match = SHARD.fullmatch(name)
    return _names(match["stem"], int(match["count"])) if match and match["end"] == ".safetensors" else []


def _names(start: str, count: int, end: str = "") -> list[str]:
    return [f"{start}-{number:05}-of-{count:05}{end}.safetensors" for number in range(1, count + 1)]


def _sets(folder: Path) -> list[list[str]]:
    """The names of the files of weights in a folder, those together that an index lists or that are numbered."""
    names = sorted(path.name for path in folder.glob("*") if path.suffix.lower() in LOOSE)
    sets = [_indexed(path) for path in folder.glob(f"*{SET_INDEX}")]
    for name in names:
        if not any(name in one for one in sets):
            sets.append(_set_of(name) or [name])
    return [one for one in sets if names]


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files of a network: those that an index lists, a single one, or numbered ones without an index. Names with
    `bf16` or `fp16` in them come after names without."""
    for variant in ("", ".bf16", ".fp16"):
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            return _present(folder, _indexed(index))
        if (file := folder / f"{stem}{variant}.safetensors").is_file():
            return [file]
        if numbered := _numbered(folder, stem, variant):
            return _present(folder, numbered)
    return _present(folder, [f"{stem}.safetensors"])


def _indexed(index: Path) -> list[str]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    if outside := [name for name in shards.values() if Path(name).name != name or "\0" in name]:
        raise CheckpointError(f"{index} names {outside[0][:80]!r}, which is no file of its folder")
    return sorted(set(shards.values()))


def _numbered(folder: Path, stem: str, variant: str) -> list[str]:
    """All names of the set that files such as `model-00001-of-00003.safetensors` belong to; none without such files.
    The variant stands before the numbers or, of older saves, after them. CheckpointError if there are two sets."""
    found = [path.name for path in folder.glob(f"{stem}*.safetensors")]
    for start, end in ((stem + variant, ""), (stem, variant)):
        numbers = re.compile(rf"{re.escape(start)}{NUMBERS}{re.escape(end)}\.safetensors")
        if counts := {int(match["count"]) for match in map(numbers.fullmatch, found) if match}:
            sets = [_names(start, count, end) for count in sorted(counts)]
            whole = [names for names in sets if names and {*names} <= {*found}]
            if len(whole) > 1:
                raise CheckpointError(
                    f"{folder} holds several sets of weights, {' and '.join(names[0] for names in whole)}; give one "
                    "of these files, or move the other set away"
                )
            return sets[-1]
    return []


def _present(folder: Path, names: list[str]) -> list[Path]:
    """The files of these names; CheckpointError if there are not all of them."""
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing and names:
        return [folder / name for name in names]
    suffixes = {path.suffix for path in folder.glob("*")}
    if suffixes & set(PICKLES):
        raise CheckpointError(f"{folder} holds pickles, which could run code; fetch its .safetensors files")
    if ".gguf" in suffixes:
        raise CheckpointError(f"{folder} has no .safetensors files; give one of its GGUF files instead of the folder")
    raise CheckpointError(f"{folder} is incomplete: there is no {some(missing, 3) or 'weight file'}; {COMPLETE}")
