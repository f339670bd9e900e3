"""What tensors are, told by their names, dtypes and shapes alone: which model, which parts of it, and how stored."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux2_mlx.checkpoint import Checkpoint, Component
from flux2_mlx.components import GROUPS, MAIN_PART
from flux2_mlx.config import QUANTIZATIONS, VARIANTS, Geometries, Variant
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo, Tensors
from flux2_mlx.wording import told

from .assembly import MissingPartsError, assembled
from .formats import Gguf, Unpacked, unreadable, usual_quant
from .geometry import candidates, choose, understood
from .naming import TEKKEN, Reading, adapted, check_size, is_extra, read
from .parts import LAYOUT, MODEL_PARTS, TOKENIZER_PART
from .sources import Source
from .strangers import adapter, stranger
from .write import check_source

FAMILY = "FLUX.2"
MODEL, ADAPTER, OTHER = "model", "adapter", "other"
_FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_SMALL = "norms and biases"  # what has one dimension, which is told apart


@dataclass(frozen=True)
class _Stored:
    """Of tensors, by their names: what they are, in which format they are stored, and what that takes in bytes."""

    infos: Mapping[str, TensorInfo]
    formats: dict[str, str]
    sizes: dict[str, int]

    @classmethod
    def of(cls, tensors: Tensors) -> "_Stored":
        infos = tensors.infos
        formats = {name: info.dtype for name, info in infos.items()}
        sizes = {name: info.nbytes for name, info in infos.items()}
        if isinstance(tensors, Unpacked | Gguf):
            sizes |= tensors.sizes
            formats |= {name: kind for name, kind in tensors.kinds.items() if sizes[name] != infos[name].nbytes}
        return cls(infos, {name: _FLOATS.get(kind, kind) for name, kind in formats.items()}, sizes)

    @classmethod
    def together(cls, parts: Mapping[str, "_Stored"]) -> "_Stored":
        """All tensors of several parts, whose names may be the same."""
        return cls(
            {f"{part}.{name}": x for part, own in parts.items() for name, x in own.infos.items()},
            {f"{part}.{name}": x for part, own in parts.items() for name, x in own.formats.items()},
            {f"{part}.{name}": x for part, own in parts.items() for name, x in own.sizes.items()},
        )

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def shares(self) -> dict[str, float]:
        """The share of all numbers that is stored in each format, the largest first."""
        counts: Counter[str] = Counter()
        for name, info in self.infos.items():
            if info.shape and not is_extra(name):
                counts[self.formats[name]] += math.prod(info.shape)
        return {kind: count / counts.total() for kind, count in counts.most_common() if count}


@dataclass(frozen=True)
class Part:
    """A part of a FLUX.2 model. Sizes are in bytes.

    Attributes:
        name: one of `PARTS`.
        naming: who names tensors so.
        prefix: what stands before these names.
        tensors: how many there are, a packed one counted once.
        nbytes: what they take as they are stored.
        converted: what they take in our checkpoint, by the quantization; empty if that is not known.
        precision: how many weights of each group of layers are in each format.
        problem: what is wrong with it, or None.
    """

    name: str
    naming: str
    prefix: str
    tensors: int
    nbytes: int
    converted: dict[str, int]
    precision: dict[str, dict[str, int]]
    problem: str | None


@dataclass(frozen=True)
class Identity:
    """What tensors are.

    Attributes:
        kind: `model`, one or several parts of a FLUX.2 model; `adapter`; `other`, something that can't be used.
        name: what it is, as a user calls it.
        formats: the share of all numbers that is stored in each format, the largest first.
        nbytes: what all tensors take as they are stored.
        variants: the models that it can be of, or that an adapter fits.
        variant: the one of them that it is, or None if that can't be told.
        parts: those of FLUX.2.
        missing: what a whole model has besides.
        quant: the quantization of ours that keeps what it has; None for what is no model.
        advice: what is wrong with it, or what to do instead; None if there is nothing to say.
    """

    kind: str
    name: str
    formats: dict[str, float]
    nbytes: int
    variants: tuple[str, ...] = ()
    variant: str | None = None
    parts: tuple[Part, ...] = ()
    missing: tuple[str, ...] = ()
    quant: str | None = None
    advice: str | None = None

    @property
    def lacks_main_part(self) -> bool:
        """Whether that is missing which tells what model it is, so that it completes another one at most."""
        return MAIN_PART in self.missing

    @property
    def is_plain(self) -> bool:
        """Whether all numbers are stored in 16 or 32 bits."""
        return self.formats.keys() <= {*_FLOATS.values()}


@dataclass(frozen=True)
class Conversion:
    """What a conversion would do.

    Attributes:
        places: where it would take each part from: a folder or file here, or a repo of the Hub.
        quant: as what it would store the transformer.
        text_quant: as what it would store the text encoder.
        refusal: why it would not, or None.
    """

    places: dict[str, Path | str] = field(default_factory=dict)
    quant: str | None = None
    text_quant: str | None = None
    refusal: str | None = None


def identify(
    tensors: Tensors,
    what: str,
    hints: Iterable[str] = (),
    variant: str | None = None,
    settings: dict[str, Any] | None = None,
) -> Identity:
    """What `tensors` are. Nothing of them is read.

    Args:
        tensors: those of one file, or of all that belong together; packed ones as what they stand for.
        what: the source, for errors.
        hints: what `configs.hints` gives of a transformer, which says which model it is where shapes don't.
        variant: the model that a user says it is, or None.
        settings: what is said of a text encoder, see `text.settings`.

    Raises:
        CheckpointError: nothing is known of them, or it can't be the `variant`.
    """
    if found := foreign(tensors, what):
        return found
    readings = read(tensors.infos, what)
    ordered = {name: readings[name] for name in LAYOUT if name in readings}
    return _model(tensors, ordered, what, hints, variant, settings)


def foreign(tensors: Tensors, what: str) -> Identity | None:
    """What tensors are, if they are no parts of FLUX.2 or can't be read; None if they may be parts of it. Packed ones
    may be given as they are stored."""
    check_size(tensors.infos, what)
    stored = _Stored.of(tensors)
    if mixed := adapted(tensors.infos):
        model, others = mixed
        return Identity(OTHER, f"{model}, with an adapter", stored.shares, stored.nbytes, advice=f"it holds {others}")
    if found := adapter(tensors.infos):
        name = f"a {found.kind} (names as of {found.naming})"
        other = None if any(x in VARIANTS for x in found.models) else found.other
        advice = f"it is for {other}, not for FLUX.2" if other else "it goes on top of a model and is none itself"
        return Identity(ADAPTER, name, stored.shares, stored.nbytes, found.models, advice=advice)
    if known := stranger(tensors.infos):
        return Identity(OTHER, known.name, stored.shares, stored.nbytes, advice=known.advice)
    if how := unreadable(tensors.infos, {}):
        return Identity(OTHER, "a quantized model", stored.shares, stored.nbytes, advice=f"it is {how}")
    return None


def _model(
    tensors: Tensors,
    readings: Mapping[str, Reading],
    what: str,
    hints: Iterable[str],
    variant: str | None,
    settings: dict[str, Any] | None,
) -> Identity:
    """What tensors are that are named as parts of FLUX.2."""
    stored = _Stored.of(tensors)
    found = {name: _understood(reading, settings) for name, reading in readings.items()}
    configs = {name: part for name, (part, _) in found.items()}
    problems = {name: str(problem) for name, (_, problem) in found.items() if problem}
    parts = tuple(_part(reading, stored, configs[name], problems.get(name)) for name, reading in readings.items())
    advice = "; ".join(problems.values()) or None
    if not any(configs.values()):
        name = f"{told(readings)} of another model"
        return Identity(OTHER, name, stored.shares, stored.nbytes, parts=parts, advice=advice)
    rows = candidates({network: config for part in configs.values() for network, config in part.items()})
    row = _chosen(rows, hints if MAIN_PART in readings else (), variant, what)
    return Identity(
        MODEL,
        f"{told(readings)} of {FAMILY}{'' if row is None else f' {row.name}'}",
        stored.shares,
        stored.nbytes,
        tuple(row.name for row in rows),
        None if row is None else row.name,
        parts,
        _missing(tensors, readings),
        next((usual_quant(tensors, readings[name].sources) for name in GROUPS if name in readings), "bf16"),
        advice if rows or advice else f"its parts are of different models: {_sizes(configs)}",
    )


def _sizes(configs: Mapping[str, Geometries]) -> str:
    """Of which models each part can be."""
    found = {name: [row.name for row in candidates(part)] for name, part in configs.items() if part}
    return ", ".join(f"the {told([name])} of {' or '.join(rows) or 'none'}" for name, rows in found.items())


def identify_whole(source: Source) -> Identity:
    """What the parts of an opened source are, but for those that it takes from a checkpoint of ours."""
    stored = {name: _Stored.of(part.tensors) for name, part in source.parts.items()}
    together = _Stored.together(stored)
    return Identity(
        MODEL,
        f"{told(source.parts)} of {FAMILY} {source.variant.name}",
        together.shares,
        together.nbytes,
        tuple(row.name for row in candidates(source.configs)),
        source.variant.name,
        tuple(_part(part.reading, stored[name], source.configs_of(name), None) for name, part in source.parts.items()),
        quant=source.quants(None, None)[0],
    )


def _missing(tensors: Tensors, parts: Iterable[str]) -> tuple[str, ...]:
    """What a whole model has besides these parts, of which some hold the tokenizer."""
    has_tokenizer = any(name.rpartition(".")[2] == TEKKEN for name in tensors.infos)
    there = {*parts, TOKENIZER_PART} if has_tokenizer else {*parts}
    return tuple(name for name in MODEL_PARTS if name not in there)


def conversion(place: Path, variant: str | None, others: Iterable[Checkpoint]) -> Conversion:
    """What converting `place` without further options would do; see `assembled`."""
    try:
        source = assembled(place, {}, variant, others=others)
        quants = source.quants(None, None)
        check_source(source, *quants)
    except MissingPartsError as error:
        if not error.can_be_fetched:
            return Conversion(refusal=str(error))
        own = {name: part.place for name, part in error.source.parts.items()}
        fetched = dict.fromkeys(error.missing, str(error.source.variant.repo))
        return Conversion({**own, **fetched}, *error.source.quants(None, None))
    except CheckpointError as error:
        return Conversion(refusal=str(error))
    return Conversion({**source.places}, *quants)


def _chosen(rows: list[Variant], hints: Iterable[str], variant: str | None, what: str) -> Variant | None:
    try:
        return choose(rows, hints, variant, what)
    except CheckpointError:
        if variant is not None:
            raise
        return None


def _understood(reading: Reading, settings: dict[str, Any] | None) -> tuple[Geometries, CheckpointError | None]:
    what = f"the {told([reading.part])}"
    return understood(reading, what, f"{what} is damaged or was changed", settings)


def _part(reading: Reading, stored: _Stored, configs: Geometries, problem: str | None) -> Part:
    networks = [Component(name, config, None, ()) for name, config in configs.items()]
    return Part(
        reading.part,
        reading.dialect.name,
        reading.prefix,
        len(reading.sources),
        sum(stored.sizes[name] for name in reading.sources),
        {quant: sum(x.quantized(quant).nbytes for x in networks) for quant in QUANTIZATIONS} if networks else {},
        _precision(reading, stored),
        problem,
    )


def _precision(reading: Reading, stored: _Stored) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {group: Counter() for group in (*LAYOUT[reading.part].groups.values(), _SMALL)}
    for name, info in reading.sources.items():
        canonical = reading.canonical(name)
        if canonical is not None and info.shape:
            counts[_group(reading.part, canonical, info)][stored.formats[name]] += 1
    return {group: dict(count.most_common()) for group, count in counts.items() if count}


def _group(part: str, canonical: str, info: TensorInfo) -> str:
    if len(info.shape) == 1:
        return _SMALL
    return next(group for start, group in LAYOUT[part].groups.items() if canonical.startswith(start))
