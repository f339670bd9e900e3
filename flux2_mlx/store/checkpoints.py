"""The store of models: from a name to a converted MLX checkpoint, fetched and converted first if need be."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType

from ..checkpoint import MANIFEST, Checkpoint, is_checkpoint, variant_components
from ..components import COMPONENTS
from ..config import QUANTIZATIONS, check_quant
from ..convert import (
    LAST_USED,
    Source,
    check_source,
    check_target,
    check_writable,
    requantize,
)
from ..errors import CheckpointError, DownloadError, InputError
from ..exclusion import exclude
from ..files import Claim
from ..quantization import DEFAULT_TEXT_QUANT
from ..weights import read_json
from .acquisition import Announce, Progress, acquire, convert_source, labelled
from .names import BUILT_IN, SOURCE, Model, models_folder, resolve, similar_repo
from .stock import checked_variant, checkpoint_name, folder_name, open_source


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
        quants: tuple[str, str] = opened.quants(quant, text_quant) if opened else _in_full(quant, text_quant)
        name = f"{opened.variant.name}-{opened.fingerprint[:12]}" if opened else folder_name(model)
        targets = [models_folder(models_dir) / x for x in _sufficient(name, *quants, text_only)]
        if found := next(filter(is_checkpoint, targets), None):
            return _used(_holding(found, variant))
        if only_converted:
            way_out = "name it with model=NAME to have it fetched and converted"
            raise InputError(f"{model.name} is not converted yet; {way_out}")
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


def convert_model(
    name: str | os.PathLike[str] | Model,
    target: Path,
    *,
    variant: str | None = None,
    quant: str | None = None,
    text_quant: str | None = None,
    parts: Mapping[str, Path] = MappingProxyType({}),
    force: bool = False,
    keep_source: bool = True,
    announce: Announce | None = None,
    progress: Progress | None = None,
) -> Model:
    """Convert what `name` means into the folder `target`, once it is known that it can be; gives what it means.

    The settings are those of `make_checkpoint`.

    Raises:
        InputError: the target can't be made or replaced, or the model is built in.
    """
    model = resolve(name)
    variant = checked_variant(model, variant)
    check_target(target, force)
    if model.kind == BUILT_IN and not parts:
        raise InputError(f"{model.name} is built in and needs no conversion")
    make_checkpoint(
        model,
        target,
        quant,
        text_quant,
        variant=variant,
        parts=parts,
        force=force,
        keep_source=keep_source,
        announce=announce,
        progress=progress,
    )
    return model


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


@contextmanager
def _suggesting(repo: str) -> Iterator[None]:
    """Add a known repo to what is wrong with one whose name is like it."""
    try:
        yield
    except DownloadError as error:
        if similar := similar_repo(repo):
            raise DownloadError(f"{error}; did you mean {similar}?") from error
        raise


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


def _unquantized(folder: Path, model: str, quant: str, text_quant: str) -> Path | None:
    """A converted checkpoint that the one asked for can be made from."""
    names = [checkpoint_name(model, q, t) for q in {quant, "bf16"} for t in {text_quant, "bf16"}]
    return next((folder / name for name in sorted(names) if is_checkpoint(folder / name)), None)
