"""Where weights come from: a folder in the diffusers layout."""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import Component, check_counts, is_checkpoint
from flux2_mlx.components import WRITING_PARTS
from flux2_mlx.config import QUANTIZATIONS, Geometries, Variant
from flux2_mlx.errors import CheckpointError
from flux2_mlx.layout import INDEX, PICKLES
from flux2_mlx.quantization import BITS, DEFAULT_TEXT_QUANT, check_quant
from flux2_mlx.weights import FLOATS, Renamed, TensorInfo, Tensors, read_json

from . import formats
from .configs import COMPLETE, SCHEDULE, UNQUANTIZED, describe, read_configs
from .mflux import part_folders
from .naming import Reading
from .parts import LAYOUT
from .rules import Rule, Shape

_log = logging.getLogger(__name__)
TOKENIZER = "tokenizer/tokenizer.json"
LOOSE = (".safetensors", formats.GGUF)  # endings of files that hold weights of parts of a model
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")  # one file of a set
# The fingerprint reads this many pieces of this many bytes from each file, at even distances.
_SAMPLES, _SAMPLE_BYTES = 1024, 4096


@dataclass(frozen=True)
class SourcePart:
    """A part of a source: where it is, and the tensors in its files, unread.

    `reading` says how they are named where that is not as in the layout of diffusers, `metadata` is what the files say
    of themselves, and `usual_quant` keeps what is stored of the weights.
    """

    name: str
    place: Path
    files: list[Path]
    tensors: Tensors
    reading: Reading | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    usual_quant: str = "bf16"

    def rules_for(self, network: str, config: Any) -> Callable[[str, Shape], Rule]:
        """How our tensor of a name and a shape is made, for a network of the part and its geometry."""
        if self.reading is not None:
            return self.reading.rules_for(network, config)
        return LAYOUT[self.name].rules[network](config)

    def kept(self, configs: Geometries) -> dict[str, TensorInfo]:
        """The tensors that have a place in our checkpoint, or no place at all, given the geometries of the networks."""
        if self.reading is not None:
            return self.reading.kept(configs)
        is_dropped, config = LAYOUT[self.name].is_dropped, configs[self.name]
        return {name: tensor for name, tensor in self.tensors.infos.items() if not is_dropped(name, config)}

    def check(self, configs: Geometries) -> None:
        """CheckpointError if the geometries ask for more than the files hold, or for networks that can't be built."""
        path = self.place / "config.json" if self.reading is None else self.place
        if self.reading is None:
            check_counts(LAYOUT[self.name].counts(configs), self.tensors.infos, path)
        for name, config in configs.items():
            Component(name, config, None, ()).check(path)


@dataclass(frozen=True)
class Source:
    """An opened source: geometries of its networks and, part by part, its weight files and the tensors in them, unread.

    `place` is the folder or file that it is, `tokenizer` the folder of its tokenizer, `schedule` the file of its
    schedule, and `stored` are networks that are taken from a checkpoint of ours. Build it with `Source.open` or
    `assembled`.
    """

    place: Path
    variant: Variant
    configs: Geometries
    parts: dict[str, SourcePart]
    tokenizer: Path
    schedule: Path
    stored: dict[str, Component] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, variant: str | None = None, *, text_only: bool = False) -> "Source":
        """Read the configurations and file headers of a diffusers folder.

        Args:
            folder: holds `model_index.json`.
            variant: the model's name where geometry and `model_index.json` can't tell, or None.
            text_only: leave out the transformer and the VAE, whose weights need not be there.

        Raises:
            CheckpointError: another model, pickles, missing or damaged files; the variant comes last.
        """
        description = describe(folder)
        parts = {
            name: layout_part(folder, name, description.packing[name])
            for name in (WRITING_PARTS if text_only else LAYOUT)
        }
        if not (folder / TOKENIZER).is_file():
            advice = "add that of the model that it was made from, in a local copy of a repo"
            raise CheckpointError(f"{folder} is incomplete: there is no {TOKENIZER}; {advice}")
        for part in parts.values():
            _refuse_packed(part)
        row, configs = read_configs(description, variant)
        kept = {network for name in parts for network in LAYOUT[name].rules}
        configs = {name: config for name, config in configs.items() if name in kept}
        return cls(folder, row, configs, parts, folder / "tokenizer", folder / SCHEDULE)

    def configs_of(self, part: str) -> Geometries:
        """The geometries of the networks that are made from a part."""
        return {name: self.configs[name] for name in LAYOUT[part].rules if name in self.configs}

    def check(self) -> None:
        """CheckpointError if the configs ask for more than the files hold, or for networks that can't be built."""
        for part in self.parts.values():
            part.check(self.configs_of(part.name))

    def quants(self, quant: str | None, text_quant: str | None) -> tuple[str, str]:
        """How the transformer and the text encoder are to be stored, None being what keeps of their weights what there
        is; of the text encoder's that are at most 8 bits."""
        usual = self._usual_quant("transformer")
        if quant is None and usual != "bf16":
            _log.warning("%s holds the transformer in few bits, which becomes %s", self._place_of("transformer"), usual)
        quant = check_quant(quant or usual)
        if text_quant is None and "text_encoder" in self.stored:
            text_quant = self._usual_quant("text_encoder")
        default = max(DEFAULT_TEXT_QUANT[quant], self._usual_quant("text_encoder"), key=QUANTIZATIONS.index)
        return quant, check_quant(text_quant or default)

    def _place_of(self, part: str) -> Path:
        return self.parts[part].place if part in self.parts else self.place

    def _usual_quant(self, name: str) -> str:
        """The quantization that keeps what is stored of a network."""
        if name in self.stored:
            bits = (self.stored[name].quantization or {}).get("bits")
            return next(quant for quant, own in BITS.items() if own == bits)
        return self.parts[name].usual_quant if name in self.parts else "bf16"

    @property
    def small_files(self) -> list[Path]:
        """What else of a folder in the layout of diffusers is read."""
        if self.place.is_file():
            return []
        found = (*self.place.glob("*"), *self.place.glob("*/*"))
        return [path for path in found if path.suffix in (".json", ".jinja")]

    @property
    def files(self) -> dict[str, list[Path]]:
        """The weight files of each part."""
        return {name: part.files for name, part in self.parts.items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and sizes of its own weight files and pieces of their content, headers included.

        Two fine-tunes of a model differ in nearly every tensor, so pieces tell them apart as well as all bytes would.
        """
        digest = hashlib.sha256()
        for component, paths in self.files.items():
            for path in paths:
                size = path.stat().st_size
                digest.update(f"{component}/{path.name}:{size}\n".encode())
                with path.open("rb") as file:
                    for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                        file.seek(start)
                        digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def layout_part(folder: Path, part: str, said: Mapping[str, str]) -> SourcePart:
    """A part of a folder in the diffusers layout, with its tensors by the names that its rules have for them; `said` is
    what its config says of how they are packed."""
    paths = _weight_files(folder / part, LAYOUT[part].stem)
    plain, metadata = formats.plain(paths, said)
    tensors = Renamed(plain, {LAYOUT[part].canonical(name): name for name in plain.infos})
    return SourcePart(part, folder / part, paths, tensors, None, metadata, formats.usual_quant(plain))


def loose_files(place: Path) -> list[Path]:
    """The files of weights that `place` is: itself, or those of a folder that holds one set of them."""
    if place.is_file():
        if place.suffix.lower() in PICKLES:
            raise CheckpointError(f"{place} is a pickle, which could run code; fetch it as .safetensors")
        if match := _SHARD.fullmatch(place.name):
            return _present(place.parent, _numbered(place.parent, match[1], ""))
        return [place]
    if not place.exists():
        raise CheckpointError(f"there is no file or folder {place}")
    for stem in ("model", "diffusion_pytorch_model"):
        if (place / f"{stem}.safetensors").is_file() or any(place.glob(f"{stem}*.safetensors*")):
            return _weight_files(place, stem)
    if folders := part_folders(place):
        return [path for folder in folders for path in loose_files(folder)]
    found = sorted(path for path in place.glob("*") if path.suffix.lower() in LOOSE)
    if len(found) == 1:
        return found
    if (place / INDEX).is_file() or is_checkpoint(place):
        raise CheckpointError(f"{place} is a whole model; give a file or folder of one part, such as {place / 'vae'}")
    several = f": {', '.join(path.name for path in found[:4])}; give one of them" if found else ""
    raise CheckpointError(
        f"{place} is no model folder, and holds {'several files' if found else 'no file'} of weights{several}"
    )


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The files of a network: those that an index lists, or one, or numbered ones without an index, or else the same
    of the variants `bf16` and `fp16`, which have that in their names."""
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
    """The names of the whole set that files such as `model-00001-of-00003.safetensors` are of; none if there are none.
    The variant stands before the numbers or, of older saves, after them."""
    found = [path.name for path in folder.glob(f"{stem}*.safetensors")]
    for start, end in ((stem + variant, ""), (stem, variant)):
        numbers = re.compile(rf"{re.escape(start)}-(\d{{5}})-of-(\d{{5}}){re.escape(end)}\.safetensors")
        if counts := {int(match[2]) for match in map(numbers.fullmatch, found) if match}:
            count = max(counts)
            return [f"{start}-{number:05}-of-{count:05}{end}.safetensors" for number in range(1, count + 1)]
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
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise CheckpointError(
        f"{folder} is incomplete: there is no {', '.join(missing[:3]) or 'weight file'}{more}; {COMPLETE}"
    )


def _refuse_packed(part: SourcePart) -> None:
    """CheckpointError for weights that are still no numbers of floating point."""
    if how := formats.unreadable(part.tensors.infos, {}):
        raise CheckpointError(f"{part.place} is {how}")
    matrices = [x for name, x in part.tensors.infos.items() if name.endswith("weight") and len(x.shape) > 1]
    if other := sorted({x.dtype for x in matrices} - set(FLOATS.values())):
        raise CheckpointError(
            f"{part.place} holds weights that are stored as {other[0]}, which are not read; {UNQUANTIZED}"
        )
