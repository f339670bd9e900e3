"""How a model of any kind becomes an MLX checkpoint: it is fetched, put together from parts, or given fewer bits."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..checkpoint import MANIFEST, Checkpoint
from ..convert import PARTS, MissingPartsError, Source, assembled, is_loose, requantize
from ..errors import CheckpointError, DownloadError, InputError
from ..files import Claim
from ..hub import UnindexedError
from ..quantization import DEFAULT_TEXT_QUANT, check_quant
from ..weights import read_json
from .acquisition import Announce, Progress, acquire, labelled
from .gathering import gather
from .names import REPO, VARIANT, Model, get_variant, models_folder, similar_repo, stored_checkpoints
from .parts import Remote, files_of, located


def make_checkpoint(
    model: Model,
    target: Path,
    quant: str | None,
    text_quant: str | None,
    *,
    variant: str | None = None,
    parts: Mapping[str, str | os.PathLike[str]] = MappingProxyType({}),
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
        parts: where other parts are than the model's own, by their names in `assembled`; see `located`.
        models_dir: where converted models are that give what single files lack, which else the official repo does.
        text_only: leave out the transformer and the VAE.
        force: replace an MLX checkpoint at `target`.
        keep_source, check, announce: of what is fetched; see `acquire`.
        progress: called with bytes done, bytes in all, and `download` or `convert`.
    """
    given = {name: located(where) for name, where in parts.items()}
    if model.is_checkpoint and not given:
        stored = Checkpoint.open(holding(model.place, variant))
        requantize(stored, target, quant, text_quant, force=force, progress=labelled(progress, "convert"))
        return
    with _suggesting(model.origin) if model.path is None else nullcontext():
        if model.kind in (REPO, VARIANT) and not given:
            try:
                acquire(
                    model.origin,
                    target,
                    *in_full(quant, text_quant),
                    known=model.variant,
                    variant=variant,
                    text_only=text_only,
                    keep_source=keep_source,
                    force=force,
                    check=check,
                    announce=announce,
                    progress=progress,
                )
                return
            except UnindexedError as error:
                _check_single(Remote(model.origin), error)
        gathered(
            model,
            given,
            lambda *_: target,
            quant,
            text_quant,
            models_dir=models_dir,
            variant=variant,
            text_only=text_only,
            keep_source=keep_source,
            force=force,
            check=check,
            announce=announce,
            progress=progress,
        )


def gathered(
    model: Model,
    given: Mapping[str, Path | Remote],
    target: Callable[[str, str], Path],
    *quants: str | None,
    models_dir: str | os.PathLike[str] | None,
    **settings: Any,
) -> Path:
    """Convert `model` with other parts than its own, or one whose parts are files; see `gather`."""
    name, where = model.origin, Remote(model.repo, model.file) if model.path is None and model.repo else model.place
    if model.kind in (REPO, VARIANT) and given:
        name = f"{name} with another {' and '.join(given)}"
        given = {**dict.fromkeys(PARTS, where), PARTS[0]: Remote(model.origin, PARTS[0]), **given}
        where = given.pop(PARTS[0])
    others = partial(_official_first, models_folder(models_dir))
    with (
        Claim(model.path.absolute().parent.parent) if model.path and model.repo else nullcontext()
    ):  # of the Hub's cache
        return gather(name, where, given, others, target, *quants, **settings)


def _check_single(where: Remote, error: UnindexedError) -> None:
    """Raise the `error` about a repo that is no whole model, unless it holds weights of one thing only."""
    try:
        files_of(where, None, error.names)
    except DownloadError:
        raise error from None


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


def checked_variant(model: Model, variant: str | None) -> str | None:
    """The name of the row of the table that `model` is, or that it is said to be; None: its files must tell.

    Raises:
        InputError: the `variant` that it is said to be is unknown, or another than the model is.
    """
    said = get_variant(variant) if variant is not None else model.variant
    if said and model.variant and said != model.variant and not model.is_checkpoint:
        raise InputError(f"{model.name} is not {said.name}; leave the variant out, or choose another model")
    return said.name if said else None


def in_full(quant: str | None, text_quant: str | None) -> tuple[str, str]:
    """How a model is to be stored that is in 16 bits, as those on the Hub are."""
    quant = check_quant(quant or "bf16")
    return quant, check_quant(text_quant or DEFAULT_TEXT_QUANT[quant])


def claim(model: Model) -> AbstractContextManager[object]:
    """A hold on the files of `model` that are in the Hub's cache already."""
    return Claim(model.path.absolute().parent.parent) if model.path and model.repo else nullcontext()


def holding(folder: Path, variant: str | None) -> Path:
    """The checkpoint `folder`; InputError if it is not of `variant`."""
    if variant is not None and (stored := read_json(folder / MANIFEST).get("variant", variant)) != variant:
        raise InputError(f"{folder} holds {stored}, not {variant}; leave the variant out, or choose another model")
    return folder


def is_official(checkpoint: Checkpoint) -> bool:
    """Whether the weights are those of the table's repo, as far as the checkpoint's source is known by name."""
    name, variant = checkpoint.source.get("name"), checkpoint.variant
    return isinstance(name, str) and name.lower() in (variant.name, variant.repo and variant.repo.lower())


def what_is_here(model: Model, variant: str | None, **settings: Any) -> tuple[Source, bool]:
    """What is here of `model`, and whether that is all of it. The rest can be fetched."""
    try:
        return open_source(model, variant, **settings), True
    except MissingPartsError as error:
        if not error.can_be_fetched:
            raise
        return error.source, False
