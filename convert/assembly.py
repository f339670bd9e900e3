"""A model put together from parts: single files and folders, and for the rest a whole model."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from flux2_mlx.checkpoint import MANIFEST, Checkpoint, Component, check_fit, is_checkpoint
from flux2_mlx.components import COMPONENTS, MAIN_PART, PAINTING, WRITING_PARTS, geometries
from flux2_mlx.config import VARIANTS, Geometries, Variant, variant_named
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import Tensors
from flux2_mlx.wording import told

from .configs import RELEASED_SCHEDULE, SCHEDULE, hints, is_whole, stated
from .geometry import candidates, choose, understood
from .mflux import part_folders, said_of
from .parts import LAYOUT, TOKENIZER_PART
from .sources import Source, SourcePart, parts_of, tensors_of, the_part
from .text import model_name, settings
from .tokenizer import find_tokenizer, tekken_tensor, tokenizer_files, tokenizer_in
from .weight_files import loose_files


class MissingPartsError(CheckpointError):
    """Parts of a model are nowhere to be found: `missing` ones of `source`, which is what there is."""

    def __init__(self, message: str, source: Source, missing: Sequence[str]):
        super().__init__(message)
        self.source = source
        self.missing = missing

    @property
    def can_be_fetched(self) -> bool:
        """Whether the official repo has them as they are needed. A model is what its transformer is."""
        return self.source.variant.repo is not None and MAIN_PART not in self.missing


def assembled(
    place: Path,
    given: Mapping[str, Path],
    variant: str | None = None,
    *,
    others: Iterable[Checkpoint] = (),
    text_quant: str | None = None,
    text_only: bool = False,
    repo: str = "",
    borrowed: Collection[str] = (),
    replaced: Variant | None = None,
) -> Source:
    """The model at `place` as a source, with the `given` parts in place of its own or added to them.

    Args:
        place: a model folder in the layout of diffusers or of ours, or weights of one or several parts: a file, or a
            folder that holds nothing else.
        given: where parts are: `transformer`, `text_encoder`, `vae` (files or folders) and `tokenizer` (see
            `find_tokenizer`).
        variant: the model's name where geometry and names can't tell, or None.
        others: converted models, one of which gives what is missing then.
        text_quant: how the text encoder is to be stored, as far as that one can be chosen.
        text_only: leave out the transformer and the VAE.
        repo: where it comes from, as `owner/name`, whose name may say which model it is.
        borrowed: which of the `given` parts are another model's.
        replaced: the model whose transformer is replaced, if another one than that at `place`. It is that one still
            where nothing tells better.

    Raises:
        MissingPartsError: it lacks parts that are not given.
        CheckpointError: a part is damaged, no part of FLUX.2, or of another model than the others.
    """
    wanted = WRITING_PARTS if text_only else tuple(LAYOUT)
    if part_folders(place) and (beside := tokenizer_in(place / TOKENIZER_PART)):
        given = {TOKENIZER_PART: beside, **given}
    is_model = is_checkpoint(place) or is_whole(place)
    own = {} if is_model else _loose_parts(place, variant)
    base = _base(place, variant, repo, text_only=text_only) if is_model else None
    ours = {name: _stored_part(name, given[name]) for name in wanted if name in given and is_checkpoint(given[name])}
    parts = own | {name: _given_part(name, given[name], variant) for name in LAYOUT if name in given.keys() - ours}
    said = _said(given, parts.get(MAIN_PART), replaced if base is None else base.variant, repo)
    parts = {name: part for name, part in parts.items() if name in wanted and name not in ours}
    taken = {name: network for part in ours.values() for name, network in part.items()}
    configs = _geometries(parts) | {name: network.config for name, network in taken.items()}
    places = {name: part.place for name, part in parts.items()} | {name: given[name] for name in ours}
    rows = candidates(configs) if base is None or MAIN_PART in given else [base.variant]
    _check_sizes(place, {} if base is None else base.configs, configs, places, _named(variant, replaced))
    try:
        row = choose(rows, said, variant, str(place))
    except CheckpointError:
        if text_only or base is not None or MAIN_PART in {*parts, *given}:
            raise
        raise CheckpointError(_alone(place, own)) from None
    tokenizer = given.get(TOKENIZER_PART) or (_held_tokenizer(parts) if base is None else None)
    there = {*parts, *given} if tokenizer is None else {*parts, *given, TOKENIZER_PART}
    if base is None and (missing := [name for name in (*wanted, TOKENIZER_PART) if name not in there]):
        base = _completion(place, row, missing, others, text_quant)
        if base is None:
            source = Source(place, row, configs, parts, place, RELEASED_SCHEDULE, taken, borrowed=frozenset(borrowed))
            raise MissingPartsError(_lacking(place, row, own, missing), source, missing)
    joined = _joined(place, row, parts, configs, tokenizer, base, borrowed, taken)
    notes = (*_unused(place, LAYOUT if is_model else own, given), *joined.notes)
    return replace(joined, notes=notes, borrowed=frozenset(borrowed))


def _said(given: Mapping[str, Path], main: SourcePart | None, replaced: Variant | None, repo: str) -> list[str]:
    """What may say which model it is, what says it best first: its transformer, and the model whose place that takes.
    Other parts are made for several models, or named after others."""
    place = given.get(MAIN_PART, Path())
    own = [Checkpoint.open(place).variant.name] if is_checkpoint(place) else []
    of_main = [] if own or main is None else hints(main.place, main.metadata, repo)
    return [*own, *of_main, *([] if replaced is None else [replaced.name])]


def _unused(place: Path, held: Collection[str], given: Mapping[str, Path]) -> list[str]:
    """Notes of the parts that are `held` at `place` and taken from elsewhere."""
    replaced = [name for name in LAYOUT if name in held and given.get(name, place) != place]
    return [f"the {told([name])} of {place} is not used; taken from {given[name]}" for name in replaced]


def _named(variant: str | None, replaced: Variant | None) -> list[Variant]:
    """The models that a user's words allow; none if they say nothing."""
    if variant is not None:
        return [variant_named(variant)]
    return [row for row in VARIANTS.values() if replaced is not None and row.transformer == replaced.transformer]


def _check_sizes(
    place: Path, base: Geometries, configs: Geometries, places: Mapping[str, Path], named: list[Variant]
) -> None:
    """CheckpointError if one of several parts is of another size than the model has, which its first part tells.

    Args:
        place: where the model is.
        base: the geometries of a whole model there.
        configs: those of the parts that are given, or take the place of the model's.
        places: where these are.
        named: the models that it may be by a user's words, if these say anything.
    """
    of_part = {name: {x: y for x, y in configs.items() if COMPONENTS[x].part == name} for name in LAYOUT}
    rest = {name: {x: y for x, y in base.items() if COMPONENTS[x].part == name} for name in LAYOUT}
    found = {name: candidates(x) for name in LAYOUT if (x := of_part[name] or rest[name])}
    wanted = named or next(filter(None, found.values()), [])
    for name, rows in found.items() if len(found) > 1 else ():
        if rows and wanted and not any(row in wanted for row in rows):
            where = places.get(name, place / name)
            verb = "is" if [*places.values()].count(where) < 2 else "holds"
            raise CheckpointError(f"{where} {verb} {_of_size(name, rows, wanted)}")


def _of_size(name: str, rows: list[Variant], wanted: list[Variant]) -> str:
    """What a part is that models `rows` have, and what the `wanted` ones need."""
    names = _either(wanted)
    own, other = model_name(rows[0].text), model_name(wanted[0].text)
    if name == "text_encoder" and own and other:
        return f"the text encoder {own}; {names} has {other}, give that"
    return f"the {told([name])} of {_either(rows)}; give that of {names}"


def _either(rows: list[Variant]) -> str:
    *most, last = [row.name for row in rows]
    return f"{', '.join(most)} or {last}" if most else last


def _given_part(name: str, place: Path, variant: str | None) -> SourcePart:
    """The part `name` of what is given for it, which may be a whole model in the layout of diffusers."""
    place = place / name if is_whole(place) else place
    return the_part(_loose_parts(place, variant), name, place)


def _stored_part(name: str, folder: Path) -> dict[str, Component]:
    """The networks that are made from a part, of a checkpoint of ours; CheckpointError if it has none."""
    found = {x: y for x, y in Checkpoint.open(folder).components.items() if COMPONENTS[x].part == name}
    if not found:
        raise CheckpointError(f"{folder} has no {told([name])}; give another model's")
    return found


def _held_tokenizer(parts: Mapping[str, SourcePart]) -> Path | None:
    """The file of a text encoder that holds its tokenizer; None: it does not."""
    files = parts["text_encoder"].files if "text_encoder" in parts else []
    return next(filter(tekken_tensor, files), None)


def _base(place: Path, variant: str | None, repo: str, *, text_only: bool) -> Source:
    """The whole model that gives what is not given."""
    if is_checkpoint(place):
        return replace(_of_checkpoint(Checkpoint.open(place)), beside=(place / MANIFEST,))
    return Source.open(place, variant, text_only=text_only, repo=repo)


def _of_checkpoint(checkpoint: Checkpoint) -> Source:
    configs = {name: component.config for name, component in checkpoint.components.items()}
    folder = checkpoint.folder
    stored = dict(checkpoint.components)
    return Source(folder, checkpoint.variant, configs, {}, folder / "tokenizer", folder / SCHEDULE, stored)


def _completion(
    place: Path,
    row: Variant,
    missing: list[str],
    others: Iterable[Checkpoint],
    text_quant: str | None,
) -> Source | None:
    """The converted model that gives the missing parts, as a source; None if there is none."""
    networks = [name for name in PAINTING if COMPONENTS[name].part in missing]
    # A model is what its transformer is, so that is never another's.
    fitting = [x for x in others if _fits(x, row, networks)] if MAIN_PART not in missing else []
    fitting.sort(key=lambda checkpoint: (checkpoint.text_quant != text_quant, checkpoint.text_quant != "bf16"))
    if fitting:
        note = f"{place} has no {told(missing)}; taken from {fitting[0].folder}"
        return replace(_of_checkpoint(fitting[0]), notes=(note,))
    return None


def _alone(place: Path, own: Collection[str]) -> str:
    """What to say of parts that several models have, without the transformer that tells which one it is."""
    others = told([name for name in LAYOUT if name not in own])
    return f"{place} holds only the {told(own)} of a model; say where its {others} are, or give it as a part of a model"


def _lacking(place: Path, row: Variant, own: Collection[str], missing: Sequence[str]) -> str:
    has = f"holds only the {told(own)} of a {row.name}" if own else f"is taken for a {row.name}"
    where = f", or have them fetched from {row.repo}" if row.repo and MAIN_PART not in missing else ""
    where = where if len(missing) > 1 else where.replace("them", "it")
    return f"{place} {has}; say where its {told(missing)} {'are' if len(missing) > 1 else 'is'}{where}"


def _fits(checkpoint: Checkpoint, row: Variant, networks: Collection[str]) -> bool:
    """Whether a checkpoint is of the model's family, as all its networks tell, and has these."""
    own = {name: component.config for name, component in checkpoint.components.items()}
    return own.keys() >= {*networks} and row in candidates(own)


def _joined(
    place: Path,
    row: Variant,
    parts: dict[str, SourcePart],
    configs: Geometries,
    tokenizer: Path | None,
    base: Source | None,
    borrowed: Collection[str],
    taken: dict[str, Component],
) -> Source:
    """The source of these parts, of networks `taken` from checkpoints of ours, and of the others of `base`."""
    manifests = {network.files[0].parent.parent / MANIFEST: None for network in taken.values()}
    source = Source(place, row, configs, parts, place, RELEASED_SCHEDULE, taken)
    if base is not None:
        given = {*parts, *(COMPONENTS[name].part for name in taken)}
        rest = {name: config for name, config in base.configs.items() if COMPONENTS[name].part not in given}
        source = replace(
            base,
            place=place,
            variant=row,
            configs={name: {**configs, **rest}[name] for name in COMPONENTS if name in {**configs, **rest}},
            parts={**{name: part for name, part in base.parts.items() if name not in given}, **parts},
            stored={**{name: part for name, part in base.stored.items() if name in rest}, **taken},
        )
    if tokenizer is not None:
        found = find_tokenizer(tokenizer)
        own = () if TOKENIZER_PART in borrowed else tokenizer_files(found)
        source = replace(source, tokenizer=found, beside=(*source.beside, *own))
    check_fit(source.variant, source.configs)
    return replace(source, beside=(*source.beside, *manifests))


def _loose_parts(place: Path, variant: str | None) -> dict[str, SourcePart]:
    """The parts that weights of a file or a folder are of."""
    paths = loose_files(place)
    parts = parts_of(place, paths, stated(paths[0].parent), partial(_possible, variant))
    return {name: replace(part, metadata={**part.metadata, **said_of(place)}) for name, part in parts.items()}


def loose_tensors(place: Path, variant: str | None) -> tuple[Tensors, Mapping[str, str]]:
    """The tensors that weights of a file or a folder are, whatever they are of, and what they say of themselves."""
    paths = loose_files(place)
    return tensors_of(place, paths, stated(paths[0].parent), partial(_possible, variant))


def _possible(variant: str | None) -> list[Geometries]:
    """The geometries of all models, so that one that is said and is wrong is told by `choose`, and not by weights of
    which shapes are not known."""
    rows = [*([] if variant is None else [variant_named(variant)]), *VARIANTS.values()]
    return [geometries(row) for row in rows]


def _geometries(parts: Mapping[str, SourcePart]) -> Geometries:
    """The geometries of the networks that are made from `parts`, whose tensors all have a place in them."""
    found: Geometries = {}
    for name, part in parts.items():
        configs, problem = understood(
            part.reading,
            str(part.place),
            f"{part.place} is not the {told([name])} of a FLUX.2 model",
            settings(stated(part.files[0].parent).values, part.metadata),
        )
        if problem:
            raise problem
        found |= configs
    return found
