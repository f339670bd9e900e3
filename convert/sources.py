"""Where weights come from: files of parts of a model, and folders of such parts in the layout of diffusers."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from flux2_mlx.checkpoint import Component, check_counts
from flux2_mlx.components import COMPONENTS, MAIN_PART, WRITING_PARTS
from flux2_mlx.config import QUANTIZATIONS, Geometries, Variant, check_quant
from flux2_mlx.errors import CheckpointError
from flux2_mlx.quantization import quant_of, usual_text_quant
from flux2_mlx.weights import FLOATS, TensorInfo, Tensors
from flux2_mlx.wording import told

from . import formats
from .configs import CONFIG, UNQUANTIZED, Description, Stated, describe, read_configs, schedule_of
from .naming import Reading, read
from .parts import LAYOUT
from .rules import Shape
from .tokenizer import TOKENIZER, tokenizer_in
from .weight_files import weight_files

# The fingerprint reads this many pieces of this many bytes from each file at even distances, and one of each tensor.
_PIECES = 1024
_PIECE_BYTES = 4096
_MLX = "U32"  # of what MLX packs, and nothing else does


@dataclass(frozen=True)
class SourcePart:
    """A part of a source.

    Attributes:
        place: the folder or file that it is.
        files: those of its weights.
        tensors: what is in them, unread.
        reading: how these are named.
        metadata: what the files say of themselves.
        config: the file that states its geometry; None: shapes tell it.
    """

    place: Path
    files: list[Path]
    tensors: Tensors
    reading: Reading
    metadata: Mapping[str, str]
    config: Path | None = None

    @property
    def usual_quant(self) -> str:
        """The fewest bits of ours that keep the precision that most of the weights are stored in."""
        return formats.usual_quant(self.tensors, self.reading.sources)

    def check(self, configs: Geometries) -> None:
        """CheckpointError if the geometries ask for more than the files hold, or for networks that can't be built."""
        path = self.config or self.place
        check_counts(LAYOUT[self.reading.part].counts(configs), self.reading.infos, path)
        for name, config in configs.items():
            Component(name, config, None, ()).check(path)


@dataclass(frozen=True)
class Source:
    """What a model is converted from, of which only small files and headers have been read. Build it with `Source.open`
    or `assembled`.

    Attributes:
        place: the folder or file that it is.
        variant: the model's row of the table.
        configs: the geometries of its networks, by their names.
        parts: where weights of others are converted from, by the names of parts.
        tokenizer: where its tokenizer is.
        schedule: the file of its schedule.
        stored: networks that are taken as they are from a checkpoint of ours, by their names.
        beside: further files that its fingerprint depends on.
        notes: what a user should know of it.
        borrowed: the names of the parts that are another model's.
    """

    place: Path
    variant: Variant
    configs: Geometries
    parts: dict[str, SourcePart]
    tokenizer: Path
    schedule: Path
    stored: dict[str, Component] = field(default_factory=dict)
    beside: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    borrowed: frozenset[str] = frozenset()

    @classmethod
    def open(
        cls,
        folder: Path,
        variant: str | None = None,
        *,
        text_only: bool = False,
        tokenizer: Path | None = None,
        repo: str = "",
    ) -> "Source":
        """Read the configurations and file headers of a diffusers folder.

        Args:
            folder: holds `model_index.json`, or else a config of each part.
            variant: the model's name where geometry and `model_index.json` can't tell, or None.
            text_only: leave out the transformer and the VAE, whose weights need not be there.
            tokenizer: where it is; None: in the folder.
            repo: where it comes from, as `owner/name`, whose name may say which model it is.

        Raises:
            CheckpointError: another model, pickles, missing or damaged files; the variant comes last.
        """
        description = describe(folder, repo)
        wanted = WRITING_PARTS if text_only else tuple(LAYOUT)
        parts = {name: _layout_part(description, name, variant) for name in wanted}
        if (tokenizer := tokenizer or tokenizer_in(folder / "tokenizer")) is None:
            advice = "add that of the model that it was made from, in a local copy of a repo"
            raise CheckpointError(f"{folder} is incomplete: there is no tokenizer/{TOKENIZER}; {advice}")
        row, configs, notes = read_configs(description, variant)
        kept = {network for name in parts for network in LAYOUT[name].rules}
        configs = {name: config for name, config in configs.items() if name in kept}
        return cls(folder, row, configs, parts, tokenizer, schedule_of(folder), notes=tuple(notes))

    def configs_of(self, part: str) -> Geometries:
        """The geometries of the networks that are made from a part."""
        return {name: self.configs[name] for name in LAYOUT[part].rules if name in self.configs}

    def check(self) -> None:
        """CheckpointError if the configs ask for more than the files hold, or for networks that can't be built."""
        for name, part in self.parts.items():
            part.check(self.configs_of(name))

    def quants(self, quant: str | None, text_quant: str | None) -> tuple[str, str]:
        """How the transformer and the text encoder are to be stored. None: in the fewest bits that keep the precision
        of their weights; a text encoder in no more than go with a given `quant`, or with any if it has 16."""
        usual, text = self.usual_quants
        if "text_encoder" in self.stored:
            text_quant = text_quant or text
        return chosen_quants(usual, text, quant, text_quant)

    @property
    def usual_quants(self) -> tuple[str, str]:
        """The fewest bits of ours that keep the precision of the transformer and of the text encoder."""
        return self._usual_quant(MAIN_PART), self._usual_quant("text_encoder")

    def notices(self, quant: str | None, text_quant: str | None) -> list[str]:
        """What a user should know of a conversion to the `quant` and `text_quant` that were asked for."""
        said = [*self.notes]
        chosen, text = self.quants(quant, text_quant)
        if quant is None and chosen != "bf16":
            said.append(f"{self.places[MAIN_PART]} holds the transformer in few bits, which becomes {chosen}")
        usual = {usual_text_quant(chosen), usual_text_quant(quant or "bf16")}
        if text_quant is None and "text_encoder" in self.parts and usual != {text}:
            few = f"{self.places['text_encoder']} holds the text encoder in few bits, which becomes {text}"
            plain = f"the text encoder becomes {text} as well"
            said.append(few if self._usual_quant("text_encoder") != "bf16" else plain)
        return said

    @property
    def places(self) -> dict[str, Path]:
        """Where each part is taken from, and the tokenizer."""
        taken = {name: part.files[0].parent for name, part in self.stored.items() if COMPONENTS[name].part == name}
        return taken | {name: part.place for name, part in self.parts.items()} | {"tokenizer": self.tokenizer}

    def _usual_quant(self, name: str) -> str:
        """The fewest bits of ours that keep the precision that a network is stored in."""
        if name in self.stored:
            return quant_of(self.stored[name].quantization)
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
        """SHA-256 over the names and sizes of weight files and pieces of their content: their headers, the beginning of
        every tensor, and more at even distances.

        Where a model was trained further, values differ all over a tensor. A change of a few values between the pieces
        is not seen. Nor is a change of a converted model that gives parts which the source lacks.
        """
        digest = hashlib.sha256()
        for path in self.beside:
            digest.update(path.read_bytes())
        for component, paths in self.files.items():
            for path in paths if component not in self.borrowed else ():
                size = path.stat().st_size
                digest.update(f"{component}/{path.name}:{size}\n".encode())
                with path.open("rb") as file:
                    evenly = range(0, size, max(_PIECE_BYTES, size // _PIECES))
                    for start in sorted({*evenly, *formats.starts(path)}):
                        file.seek(start)
                        digest.update(file.read(_PIECE_BYTES))
        return digest.hexdigest()


def chosen_quants(usual: str, usual_text: str, quant: str | None, text_quant: str | None) -> tuple[str, str]:
    """What `Source.quants` gives for a source that keeps its precision as these usual ones."""
    chosen = check_quant(quant or usual)
    text = usual_text
    if quant is not None or text == "bf16":
        text = max(usual_text_quant(chosen), text, key=QUANTIZATIONS.index)
    return chosen, check_quant(text_quant or text)


def parts_of(
    place: Path, paths: list[Path], stated: Stated, geometries: Callable[[], Sequence[Geometries]]
) -> dict[str, SourcePart]:
    """The parts of a model that files of weights hold.

    Args:
        place: what a user knows the files as.
        paths: the files, which belong together.
        stated: what the config beside them says.
        geometries: what their networks may be; asked for where packed weights don't say what shapes they have.

    Raises:
        CheckpointError: they are damaged, of no FLUX.2 model, or stored in a way that can't be read.
    """
    tensors, metadata = tensors_of(place, paths, stated, geometries)
    readings = read(tensors.infos, str(place))
    for reading in readings.values():
        _refuse_integers(place, reading.sources)
    return {name: SourcePart(place, paths, tensors, reading, metadata) for name, reading in readings.items()}


def tensors_of(
    place: Path, paths: list[Path], stated: Stated, geometries: Callable[[], Sequence[Geometries]]
) -> tuple[Tensors, Mapping[str, str]]:
    """The tensors of files of weights of a model, unread, and what the files say of themselves; see `parts_of`."""
    return formats.plain(paths, stated.packing, _Expected(place, paths, geometries))


def the_part(parts: Mapping[str, SourcePart], name: str, place: Path) -> SourcePart:
    """The part `name` of those at `place`, which may hold others; CheckpointError if it is not there."""
    if name not in parts:
        raise CheckpointError(f"{place} holds the {told(parts)} of a model, not its {told([name])}")
    return parts[name]


def _layout_part(description: Description, name: str, variant: str | None) -> SourcePart:
    """A part of a folder in the diffusers layout, whose config says what its geometry is."""
    place = description.folder / name
    files = weight_files(place, LAYOUT[name].stem)
    parts = parts_of(place, files, description.parts[name], lambda: [read_configs(description, variant)[1]])
    return replace(the_part(parts, name, place), config=place / CONFIG)


class _Expected(Mapping[str, Shape]):
    """The shapes of the weights of these files, found when one is asked for: by the first geometries that agree with
    the weights that are stored plainly and with the rows of MLX's, or by the only geometries."""

    def __init__(self, place: Path, paths: list[Path], geometries: Callable[[], Sequence[Geometries]]):
        self._place = place
        self._paths = paths
        self._geometries = geometries

    @cached_property
    def _shapes(self) -> Mapping[str, Shape]:
        infos = formats.stored(self._paths).infos
        whole = {name.partition("._")[0]: info for name, info in infos.items()}  # a packed weight's has such an ending
        told = {name: info for name, info in infos.items() if info.dtype in (*FLOATS.values(), _MLX)}
        readings = read(whole, str(self._place))
        found = [_shapes(readings, configs) for configs in self._geometries()]
        agreeing = (x for x in found if all(_agrees(info, x.get(name, info.shape)) for name, info in told.items()))
        return next(agreeing, found[0] if len(found) == 1 else {})

    def __getitem__(self, name: str) -> Shape:
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _agrees(info: TensorInfo, shape: Shape) -> bool:
    """Whether a tensor that is stored so can be of this shape. MLX packs what is in a row."""
    return info.shape[:-1] == shape[:-1] if info.dtype == _MLX else info.shape == shape


def _shapes(readings: Mapping[str, Reading], configs: Geometries) -> dict[str, Shape]:
    """The shapes of the tensors that networks of these geometries are made of."""
    shapes: dict[str, Shape] = {}
    for name, reading in readings.items():
        shapes |= reading.shapes({network: x for network, x in configs.items() if COMPONENTS[network].part == name})
    return shapes


def _refuse_integers(place: Path, infos: Mapping[str, TensorInfo]) -> None:
    """CheckpointError if weights are stored as anything but floating-point numbers."""
    matrices = [x for name, x in infos.items() if name.endswith("weight") and len(x.shape) > 1]
    if other := sorted({x.dtype for x in matrices} - set(FLOATS.values())):
        advice = "give them in bf16, fp16 or fp32" if other[0] == "F64" else UNQUANTIZED
        raise CheckpointError(f"{place} holds weights that are stored as {other[0]}, which are not read; {advice}")
