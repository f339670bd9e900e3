"""What has been converted, what files of a model are here, and what either is known to hold."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from ..checkpoint import MANIFEST, Checkpoint, fitted, variant_sizes
from ..components import PAINTING
from ..config import QUANTIZATIONS, VARIANTS, Variant
from ..convert import MissingPartsError, Source, assembled, is_loose
from ..errors import CheckpointError, InputError
from ..quantization import DEFAULT_TEXT_QUANT
from ..weights import read_json
from .names import DEMO, SOURCE, VARIANT, Model, get_variant, models_folder, resolve, stored_checkpoints

_log = logging.getLogger(__name__)


def checkpoint_name(model: str, quant: str, text_quant: str) -> str:
    """The folder of a converted model: its name and quantization, the text encoder's where it is not the default."""
    text = "" if text_quant == DEFAULT_TEXT_QUANT[quant] else f"-text-{text_quant}"
    return f"{model}-{quant}{text}"


def folder_name(model: Model) -> str:
    """How the checkpoints begin that are converted from a model of the table, a repo or a file of one."""
    if model.variant or not model.file:
        return model.variant.name if model.variant else model.origin.replace("/", "--")
    digest = sha256(model.file.encode()).hexdigest()[:8]  # of two folders may hold files of one name
    return f"{str(model.repo).replace('/', '--')}--{PurePosixPath(model.file).stem[:80]}-{digest}"


def checked_variant(model: Model, variant: str | None) -> str | None:
    """The name of the row of the table that `model` is, or that it is said to be; None: its files must tell.

    Raises:
        InputError: the `variant` that it is said to be is unknown, or another than the model is.
    """
    said = get_variant(variant) if variant is not None else model.variant
    if said and model.variant and said != model.variant and not model.is_checkpoint:
        raise InputError(f"{model.name} is not {said.name}; leave the variant out, or choose another model")
    return said.name if said else None


def open_source(
    model: Model,
    variant: str | None,
    *,
    parts: Mapping[str, Path] = MappingProxyType({}),
    text_quant: str | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    text_only: bool = False,
) -> Source:
    """The files of `model`, which is a folder or a file.

    Args:
        model: see `resolve`.
        variant: what `checked_variant` gives.
        parts: where other parts are than its own; see `assembled`.
        text_quant: how the text encoder is to be stored, where a converted model gives it.
        models_dir: where converted models are that give what is missing; see `models_folder`.
        text_only: leave out the transformer and the VAE.
    """
    if parts or is_loose(model.place):
        others = official_first(models_folder(models_dir))
        return assembled(model.place, parts, variant, others=others, text_quant=text_quant, text_only=text_only)
    return Source.open(model.place, variant, text_only=text_only)


def what_is_here(model: Model, variant: str | None, **settings: Any) -> tuple[Source, bool]:
    """What is here of `model`, and whether that is all of it. The rest can be fetched."""
    try:
        return open_source(model, variant, **settings), True
    except MissingPartsError as error:
        if not error.can_be_fetched:
            raise
        return error.source, False


def official_first(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoints in a models folder, looked for when one is asked for."""
    yield from sorted(whole_checkpoints(folder), key=lambda checkpoint: not is_official(checkpoint))


def whole_checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoints in a models folder that are not damaged."""
    for path in stored_checkpoints(folder):
        with suppress(CheckpointError):
            yield Checkpoint.open(path)


def conversions(
    model: Model,
    models_dir: str | os.PathLike[str] | None = None,
    *,
    variant: str | None = None,
    painting: bool = False,
) -> list[Path]:
    """The checkpoints in the models folder that were converted from `model` itself, or the one that it is.

    Those of a fine-tune are its own, not those of the model that it was made from.

    Args:
        model: see `resolve`.
        models_dir: see `models_folder`.
        variant: the model's name where the source can't tell.
        painting: leave out those that can't make images or are damaged.
    """
    if model.is_checkpoint:
        return [model.place]
    digest = what_is_here(model, checked_variant(model, variant))[0].fingerprint if model.kind == SOURCE else None
    found = [path for path in stored_checkpoints(models_folder(models_dir)) if _is_of(path, model, digest)]
    return [path for path in found if not painting or _can_paint(path)]


def is_official(checkpoint: Checkpoint) -> bool:
    """Whether the weights are those of the table's repo, as far as the checkpoint's source is known by name."""
    name, variant = checkpoint.source.get("name"), checkpoint.variant
    named = isinstance(name, str) and name.lower() in (variant.name, variant.repo and variant.repo.lower())
    return named and not checkpoint.folded


def converted_folders(models_dir: str | os.PathLike[str] | None = None) -> dict[str, list[Path]]:
    """The checkpoints that were converted from the models of the table and can make images, by the models' names."""
    paths = [path for path in stored_checkpoints(models_folder(models_dir)) if _can_paint(path)]
    models = {name: Model(VARIANT, name, variant, variant.repo) for name, variant in VARIANTS.items()}
    return {name: [path for path in paths if model.repo and _is_of(path, model)] for name, model in models.items()}


def named_checkpoints(name: str, models_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """The checkpoint that `name` stands for, or those that were converted from what it stands for.

    Args:
        name: see `resolve`.
        models_dir: see `models_folder`.

    Raises:
        InputError: there are none.
    """
    if found := conversions(resolve(name, models_dir), models_dir):
        return found
    folder = models_folder(models_dir)
    choices = ", ".join([DEMO, *(path.name for path in stored_checkpoints(folder))])
    raise InputError(f"there is no converted model {name!r} in {folder}; choose one of {choices}, or a folder")


def find_conversion(
    fingerprint: str | None,
    *,
    variant: str | None,
    quant: str | None,
    text_quant: str | None,
    models_dir: str | os.PathLike[str] | None = None,
) -> Path | None:
    """The folder in the models folder that the weights of this `fingerprint` were converted to, stored so."""
    wanted = (variant, fingerprint, {"transformer": quant, "text_encoder": text_quant})
    for folder in stored_checkpoints(models_folder(models_dir)) if fingerprint else ():
        try:
            manifest = read_json(folder / MANIFEST)
        except CheckpointError:
            continue
        source = manifest.get("source")
        if isinstance(source, dict) and wanted == (
            manifest.get("variant"),
            source.get("fingerprint"),
            manifest.get("quantization"),
        ):
            return folder
    return None


def described(
    model: Model,
    folders: Sequence[Path],
    variant: str | None = None,
    quant: str | None = None,
    hear: Callable[[str], object] = lambda note: None,
) -> Checkpoint | Variant:
    """What a run of `model` would use: the checkpoint that it is, or else what it would be converted to.

    Args:
        model: see `resolve`.
        folders: its `conversions`.
        variant: the model's name where the source can't tell.
        quant: which of the conversions, where there is one of these bits.
        hear: called with each note on files that it is to be converted from.

    Raises:
        InputError: nothing is known of it before it is fetched.
    """
    said = checked_variant(model, variant)
    if model.kind == SOURCE:
        source, is_whole = what_is_here(model, said)
        for note in source.notes:
            hear(note)
        return fitted(source.variant, source.configs) if is_whole else source.variant
    if model.kind == VARIANT and model.variant:
        return model.variant
    if not folders:
        raise InputError(f"{model.name} is not converted yet, so nothing is known of it; download it first")
    checkpoints = [Checkpoint.open(folder) for folder in folders]
    return next((x for x in checkpoints if x.quant == quant), checkpoints[0])


def stored_quants(folder: Path) -> tuple[str, str]:
    """How a checkpoint's transformer and its text encoder are stored; CheckpointError if it is damaged."""
    checkpoint = Checkpoint.open(folder)
    return checkpoint.quant, checkpoint.text_quant


def sizes(variant: Variant) -> dict[str, dict[str, int]]:
    """Bytes of the stored weights of each network of a model, by quantization."""
    return {quant: variant_sizes(variant, quant) for quant in QUANTIZATIONS}


def _is_of(folder: Path, model: Model, fingerprint: str | None = None) -> bool:
    """Whether a checkpoint was converted from `model`; one that can't tell is judged by its folder's name."""
    try:
        source = read_json(folder / MANIFEST).get("source")
    except CheckpointError:
        if model.kind == SOURCE:
            return False
        return folder.name.startswith(tuple(f"{folder_name(model)}-{x}" for x in (*QUANTIZATIONS, "text-only")))
    if not isinstance(source, dict) or source.get("adapters"):
        return False
    if model.kind == SOURCE:
        return source.get("fingerprint") == fingerprint
    name = source.get("name")
    return isinstance(name, str) and name.lower() in (model.origin.lower(), model.variant and model.variant.name)


def _can_paint(folder: Path) -> bool:
    """Whether a checkpoint is more than a language model; no, with a warning, if it is damaged."""
    try:
        components = read_json(folder / MANIFEST).get("components")
    except CheckpointError as error:
        _log.warning("%s; remove %s, or convert the model again", error, folder)
        return False
    return isinstance(components, list) and all(part in components for part in PAINTING)
