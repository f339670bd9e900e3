"""The store of models: from a name to a converted MLX checkpoint, fetched and converted first if need be."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType

from ..checkpoint import MANIFEST, Checkpoint, is_checkpoint, variant_components
from ..components import COMPONENTS, PAINTING
from ..config import QUANTIZATIONS, VARIANTS
from ..convert import (
    LAST_USED,
    Source,
    assembled,
    check_source,
    check_writable,
    is_loose,
    requantize,
)
from ..errors import CheckpointError, DownloadError, InputError
from ..exclusion import exclude
from ..files import Claim
from ..quantization import DEFAULT_TEXT_QUANT, check_quant
from ..weights import read_json
from .acquisition import Announce, Progress, acquire, convert_source, labelled
from .names import DEMO, SOURCE, VARIANT, Model, get_variant, models_folder, resolve, similar_repo, stored_checkpoints

_log = logging.getLogger(__name__)


def checkpoint_name(model: str, quant: str, text_quant: str) -> str:
    """The folder of a converted model: its name and quantization, the text encoder's where it is not the default."""
    text = "" if text_quant == DEFAULT_TEXT_QUANT[quant] else f"-text-{text_quant}"
    return f"{model}-{quant}{text}"


def find_checkpoint(
    source: str | os.PathLike[str] | Model,
    *,
    variant: str | None = None,
    quant: str | None = None,
    text_quant: str | None = None,
    models_dir: str | os.PathLike[str] | None = None,
    text_only: bool = False,
    only_converted: bool = False,
    keep_source: bool = True,
    check: Callable[[Checkpoint], object] | None = None,
    announce: Announce | None = None,
    progress: Progress | None = None,
) -> Path:
    """The MLX checkpoint folder of `source`, fetched and converted first if need be.

    Args:
        source: a model's name or path; see `resolve`.
        variant: the model's name where the source can't tell; where it can, InputError if it is another.
        quant: `bf16` (None), `qint8` or `qint4`; an MLX checkpoint keeps its own.
        text_quant: `bf16`, `qint8` or `qint4` for the text encoder; None: 8 bit, or 4 bit with `qint4`.
        models_dir: where converted models are kept; see `models_folder`.
        text_only: a checkpoint without transformer and VAE will do.
        only_converted: fetch and convert nothing.
        check: called with the checkpoint that will be made, which has no files yet, as soon as that is known and before
            anything is fetched or converted, and again if the files say otherwise; it may raise what speaks against it.
        keep_source, announce: of what is fetched; see `acquire`.
        progress: called with bytes done, bytes in all, and `download` or `convert`.

    Raises:
        InputError, CheckpointError, DownloadError: the source is unknown, damaged or can't be fetched.
    """
    model = resolve(source, models_dir)
    variant = checked_variant(model, variant)
    if model.is_checkpoint:
        return _holding(model.place, variant)
    with _claim(model):
        opened = None
        if model.kind == SOURCE:
            opened = open_source(model, variant, text_quant=text_quant, models_dir=models_dir, text_only=text_only)
        quants = opened.quants(quant, text_quant) if opened else _in_full(quant, text_quant)
        name = f"{opened.variant.name}-{opened.fingerprint[:12]}" if opened else _folder_name(model)
        targets = [models_folder(models_dir) / x for x in _sufficient(name, *quants, text_only)]
        if found := next(filter(is_checkpoint, targets), None):
            return _used(_holding(found, variant))
        if only_converted:
            raise InputError(f"{model.name} is not converted yet; name it with -m to have it fetched and converted")
        outline = _outline(model, opened, *quants, text_only) if check else None
        if check is not None and outline is not None:
            check(outline)
        check_writable(targets[0])
        stored = None if text_only else _unquantized(targets[0].parent, name, *quants)
        with _unless_made(targets[0]):
            if opened is not None and stored is None:
                converting = labelled(progress, "convert")
                convert_source(opened, targets[0], quant, text_quant, name=model.origin, progress=converting)
            else:
                make_checkpoint(
                    model if stored is None else resolve(stored),
                    targets[0],
                    *quants,
                    variant=variant,
                    text_only=text_only,
                    keep_source=keep_source,
                    check=check and partial(_check_again, check, outline),
                    announce=announce,
                    progress=progress,
                )
    return _used(targets[0])


def _claim(model: Model) -> AbstractContextManager[object]:
    """A hold on the files of `model` that are in the Hub's cache already."""
    return Claim(model.path.absolute().parent.parent) if model.path and model.repo else nullcontext()


def _in_full(quant: str | None, text_quant: str | None) -> tuple[str, str]:
    """How a model is to be stored that is in 16 bits, as those on the Hub are."""
    quant = check_quant(quant or "bf16")
    return quant, check_quant(text_quant or DEFAULT_TEXT_QUANT[quant])


def _outline(model: Model, source: Source | None, quant: str, text_quant: str, text_only: bool) -> Checkpoint | None:
    """What `model`, whose `source` is open if it is here, will be when it is converted; None: its files must tell."""
    if source is not None:
        components = check_source(source, quant, text_quant)
        return Checkpoint.outline(source.variant, quant, text_quant, components)
    if model.variant is None:
        return None
    components = variant_components(model.variant, quant, text_quant)
    if text_only:
        components = {name: part for name, part in components.items() if COMPONENTS[name].part == "text_encoder"}
    return Checkpoint.outline(model.variant, quant, text_quant, components)


def _check_again(check: Callable[[Checkpoint], object], outline: Checkpoint | None, found: Checkpoint) -> None:
    """Have what the files say checked, if it is something else than the `outline` that was."""
    if outline is None or outline.model != found.model:
        check(found)


def checked_variant(model: Model, variant: str | None) -> str | None:
    """The name of the row of the table that `model` is, or that it is said to be; None: its files must tell.

    Raises:
        InputError: the `variant` that it is said to be is unknown, or another than the model is.
    """
    said = get_variant(variant) if variant is not None else model.variant
    if said and model.variant and said != model.variant and not model.is_checkpoint:
        raise InputError(f"{model.name} is not {said.name}; leave the variant out, or choose another model")
    return said.name if said else None


def make_checkpoint(
    model: Model,
    target: Path,
    quant: str | None,
    text_quant: str | None,
    *,
    variant: str | None = None,
    parts: Mapping[str, Path] = MappingProxyType({}),
    models_dir: str | os.PathLike[str] | None = None,
    text_only: bool = False,
    force: bool = False,
    keep_source: bool = True,
    check: Callable[[Checkpoint], object] | None = None,
    announce: Announce | None = None,
    progress: Progress | None = None,
) -> None:
    """Convert `model` into a new checkpoint, fetched first if need be; one that is a checkpoint gets fewer bits.

    Args:
        model: see `resolve`.
        target: the folder to make.
        quant: `bf16`, `qint8` or `qint4`; None: as stored, or `bf16`.
        text_quant: `bf16`, `qint8` or `qint4` for the text encoder; None: as stored, 8 bit, or 4 bit with `qint4`.
        variant: what `checked_variant` gives.
        parts: where other parts are than the model's own; see `assembled`.
        models_dir: where converted models are that give what a single file lacks; see `models_folder`.
        text_only: leave out the transformer and the VAE.
        force: replace an MLX checkpoint at `target`.
        keep_source, check, announce: of what is fetched; see `acquire`.
        progress: called with bytes done, bytes in all, and `download` or `convert`.
    """
    converting = labelled(progress, "convert")
    if parts and model.path is None:
        raise InputError(f"{model.name} is on the Hub; download it first, and name parts of it beside the folder then")
    if model.is_checkpoint and not parts:
        stored = Checkpoint.open(_holding(model.place, variant))
        requantize(stored, target, quant, text_quant, force=force, progress=converting)
        return
    if model.path is None:
        quant, text_quant = _in_full(quant, text_quant)
        with _suggesting(model.origin):
            acquire(
                model.origin,
                target,
                quant,
                text_quant,
                known=model.variant,
                variant=variant,
                text_only=text_only,
                keep_source=keep_source,
                force=force,
                check=check,
                announce=announce,
                progress=progress,
            )
    else:
        with _claim(model):
            source = open_source(
                model, variant, parts=parts, text_quant=text_quant, models_dir=models_dir, text_only=text_only
            )
            convert_source(source, target, quant, text_quant, name=model.origin, force=force, progress=converting)


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
        others = _official_first(models_folder(models_dir))
        return assembled(model.place, parts, variant, others=others, text_quant=text_quant, text_only=text_only)
    return Source.open(model.place, variant, text_only=text_only)


def _official_first(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoints in a models folder, looked for when one is asked for."""
    yield from sorted(whole_checkpoints(folder), key=lambda checkpoint: not is_official(checkpoint))


def whole_checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoints in a models folder that are not damaged."""
    for path in stored_checkpoints(folder):
        with suppress(CheckpointError):
            yield Checkpoint.open(path)


@contextmanager
def _suggesting(repo: str) -> Iterator[None]:
    """Add a known repo to what is wrong with one whose name is like it."""
    try:
        yield
    except DownloadError as error:
        if similar := similar_repo(repo):
            raise DownloadError(f"{error}; did you mean {similar}?") from error
        raise


def _folder_name(model: Model) -> str:
    """How the checkpoints begin that are converted from a model of the table or a repo."""
    return model.variant.name if model.variant else model.origin.replace("/", "--")


def _holding(folder: Path, variant: str | None) -> Path:
    """The checkpoint `folder`; InputError if it is not of `variant`."""
    if variant is not None and (stored := read_json(folder / MANIFEST).get("variant", variant)) != variant:
        raise InputError(f"{folder} holds {stored}, not {variant}; leave the variant out, or choose another model")
    return folder


def _sufficient(model: str, quant: str, text_quant: str, text_only: bool) -> list[str]:
    """The names of the folders that will do, the one to make first. Every whole model has a language model."""
    if not text_only:
        return [checkpoint_name(model, quant, text_quant)]
    return [f"{model}-text-only-{text_quant}", *(checkpoint_name(model, q, text_quant) for q in QUANTIZATIONS)]


def _used(folder: Path) -> Path:
    """`folder`, which is in the models folder, after a note of the time."""
    with suppress(OSError), Claim(folder):  # it may belong to someone else
        (folder / LAST_USED).touch()
    exclude(folder)
    return folder


@contextmanager
def _unless_made(target: Path) -> Iterator[None]:
    """Let pass what went wrong if another process has finished the same conversion meanwhile."""
    try:
        yield
    except (InputError, CheckpointError):
        if not is_checkpoint(target):
            raise


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
    digest = open_source(model, checked_variant(model, variant)).fingerprint if model.kind == SOURCE else None
    found = [path for path in stored_checkpoints(models_folder(models_dir)) if _is_of(path, model, digest)]
    return [path for path in found if not painting or _can_paint(path)]


def is_official(checkpoint: Checkpoint) -> bool:
    """Whether the weights are those of the table's repo, as far as the checkpoint's source is known by name."""
    name, variant = checkpoint.source.get("name"), checkpoint.variant
    return isinstance(name, str) and name.lower() in (variant.name, variant.repo and variant.repo.lower())


def _unquantized(folder: Path, model: str, quant: str, text_quant: str) -> Path | None:
    """A converted checkpoint that the one asked for can be made from."""
    names = [checkpoint_name(model, q, t) for q in {quant, "bf16"} for t in {text_quant, "bf16"}]
    return next((folder / name for name in sorted(names) if is_checkpoint(folder / name)), None)


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


def _is_of(folder: Path, model: Model, fingerprint: str | None = None) -> bool:
    """Whether a checkpoint was converted from `model`; one that can't tell is judged by its folder's name."""
    try:
        source = read_json(folder / MANIFEST).get("source")
    except CheckpointError:
        if model.kind == SOURCE:
            return False
        return folder.name.startswith(tuple(f"{_folder_name(model)}-{x}" for x in (*QUANTIZATIONS, "text-only")))
    if not isinstance(source, dict):
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
