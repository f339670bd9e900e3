"""How a model of any kind becomes an MLX checkpoint: it is fetched, put together from parts, or given fewer bits."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..checkpoint import MANIFEST, Checkpoint
from ..config import check_quant
from ..convert import PARTS, check_target, requantize
from ..convert.lora import Fold
from ..errors import DownloadError, InputError
from ..files import Claim
from ..hub import UnindexedError
from ..quantization import DEFAULT_TEXT_QUANT
from ..weights import read_json
from .acquisition import Announce, Progress, acquire, labelled
from .adapters import open_adapter
from .gathering import gather
from .names import BUILT_IN, REPO, VARIANT, Model, models_folder, resolve, similar_repo
from .parts import Remote, files_of, located
from .stock import checked_variant, official_first


def convert_model(
    name: str | os.PathLike[str] | Model,
    target: Path,
    *,
    variant: str | None = None,
    quant: str | None = None,
    text_quant: str | None = None,
    parts: Mapping[str, str | os.PathLike[str]] = MappingProxyType({}),
    adapters: Sequence[tuple[str, float]] = (),
    force: bool = False,
    keep_source: bool = True,
    announce: Announce | None = None,
    progress: Progress | None = None,
) -> Model:
    """Convert what `name` means into the folder `target`, once it is known that it can be; gives what it means.

    The settings are those of `make_checkpoint`, and `adapters` names those that are folded in, as `open_adapter` takes
    them, with the scale of each.

    Raises:
        InputError: the target can't be made or replaced, or the model is built in.
    """
    model = resolve(name)
    variant = checked_variant(model, variant)
    check_target(target, force)
    if model.kind == BUILT_IN and not parts and not adapters:
        raise InputError(f"{model.name} is built in and needs no conversion")
    folds = [Fold(open_adapter(name, progress=progress), scale, name) for name, scale in adapters]
    make_checkpoint(
        model,
        target,
        quant,
        text_quant,
        variant=variant,
        parts=parts,
        folds=folds,
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
    parts: Mapping[str, str | os.PathLike[str]] = MappingProxyType({}),
    models_dir: str | os.PathLike[str] | None = None,
    text_only: bool = False,
    folds: Sequence[Fold] = (),
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
        folds: adapters that are folded into its weights.
        force: replace an MLX checkpoint at `target`.
        keep_source, check, announce: of what is fetched; see `acquire`.
        progress: called with bytes done, bytes in all, and `download` or `convert`.
    """
    given = {name: located(where) for name, where in parts.items()}
    if model.is_checkpoint and not given:
        stored = Checkpoint.open(holding(model.place, variant))
        converting = labelled(progress, "convert")
        requantize(stored, target, quant, text_quant, folds=folds, force=force, progress=converting)
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
                    folds=folds,
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
            folds=folds,
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
    others = partial(official_first, models_folder(models_dir))
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


@contextmanager
def _suggesting(repo: str) -> Iterator[None]:
    """Add a known repo to what is wrong with one whose name is like it."""
    try:
        yield
    except DownloadError as error:
        if similar := similar_repo(repo):
            raise DownloadError(f"{error}; did you mean {similar}?") from error
        raise


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
