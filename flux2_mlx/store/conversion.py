"""How a model of any kind becomes an MLX checkpoint: it is fetched, put together from parts, or given fewer bits."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType

from ..checkpoint import Checkpoint
from ..components import MAIN_PART
from ..convert import MODEL_PARTS, check_target, requantize
from ..convert.lora import CONFIG_ASIDE, Fold
from ..errors import DownloadError, InputError
from ..hub import UnindexedError, names_of
from ..layout import INDEX
from .acquisition import acquire
from .adapter_sources import find_adapter
from .first_use import Announce, Calibrate, Fetching, Progress
from .folder import models_folder, official_first
from .gathering import Gathering, gather
from .names import BUILT_IN, REPO, VARIANT, Model, checked_variant, claim, holding, resolve, similar_repo
from .parts import Remote, files_of, located
from .sources import Wanted

_log = logging.getLogger(__name__)


def convert_model(
    name: str | os.PathLike[str] | Model,
    target: Path,
    *,
    variant: str | None = None,
    quant: str | None = None,
    text_quant: str | None = None,
    parts: Mapping[str, str | os.PathLike[str]] = MappingProxyType({}),
    adapters: Sequence[tuple[str, float]] = (),
    calibrate: Calibrate | None = None,
    force: bool = False,
    keep_source: bool = True,
    announce: Announce | None = None,
    progress: Progress | None = None,
) -> Model:
    """Convert what `name` means into the folder `target`, once it is known that it can be; gives what it means.

    Args:
        name: a model's name or path; see `resolve`.
        target: the folder to make.
        variant: the model's name where the source can't tell; where it can, InputError if it is another.
        quant: one of `QUANTIZATIONS`; None: as stored, or `bf16`, or as few bits as the source has.
        text_quant: the same for the text encoder; None: as stored, or as `quant`, but `qint8` with `bf16`, or as few
            bits as the source has.
        parts: where other parts are than the model's own, by their names in `assembled`; see `located`.
        calibrate: measures the transformer of an MLX checkpoint in bf16, whose `mixed4` has 8 bits where that says.
        adapters: what is folded into its weights, as `find_adapter` takes it, with the scale of each.
        force: replace an MLX checkpoint at `target`.
        keep_source, announce, progress: of what is fetched; see `Fetching`.

    Raises:
        InputError: the target can't be made or replaced, or the model is built in.
    """
    model = resolve(name)
    # A model whose transformer is replaced may become another one.
    variant, replaced = checked_variant(variant, None if MAIN_PART in parts else model), model.variant
    check_target(target, force)
    if model.kind == BUILT_IN and not parts and not adapters and calibrate is None:
        raise InputError(f"{model.name} is built in and needs no conversion")
    if calibrate is not None and (parts or not model.is_checkpoint):
        raise InputError(
            f"{model.name} is no MLX checkpoint, which alone is calibrated; convert it with quant='bf16', and give that"
        )
    with ExitStack() as held:
        folds = tuple(_fold(source, scale, progress, held) for source, scale in adapters)
        wanted = Wanted(variant, quant, text_quant, replaced=replaced, folds=folds, calibrate=calibrate)
        fetching = Fetching(keep_source, announce=announce, progress=progress)
        make_checkpoint(model, lambda quant, text_quant: target, wanted, fetching, parts=parts, force=force)
    return model


def _fold(source: str, scale: float, progress: Progress | None, held: ExitStack) -> Fold:
    """An adapter that is fetched when it is known to be for the model."""
    found = held.enter_context(find_adapter(source))
    held.enter_context(found.named())
    is_here = isinstance(located(source), Path)  # and where that is says nothing on another machine
    named = found.origin or Path(os.path.abspath(source)).name if is_here else source
    if found.file.is_config_aside:
        _log.warning("%s: %s", named, CONFIG_ASIDE)
    return Fold(found.file, scale, named, partial(found.fetched, progress))


def make_checkpoint(
    model: Model,
    target: Callable[[str, str], Path],
    wanted: Wanted,
    fetching: Fetching,
    *,
    parts: Mapping[str, str | os.PathLike[str]] = MappingProxyType({}),
    models_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Convert `model` into a new checkpoint, fetched first if need be; one that is a checkpoint gets fewer bits. Gives
    the folder.

    Args:
        model: see `resolve`.
        target: the folder to make, by the quantizations of transformer and text encoder.
        wanted: what of it, and how it is to be stored.
        fetching: how it is fetched, and who hears of it.
        parts: where other parts are than the model's own, by their names in `assembled`; see `located`.
        models_dir: where converted models are that give what single files lack, which else the official repo does.
        force: replace an MLX checkpoint at `target`.
    """
    given = {name: located(where) for name, where in parts.items()}
    if model.is_checkpoint and not given:
        stored = Checkpoint.open(holding(model.place, wanted.variant))
        made = target(wanted.quant or stored.quant, wanted.text_quant or stored.text_quant)
        requantize(
            stored,
            made,
            wanted.quant,
            wanted.text_quant,
            folds=wanted.folds,
            calibration=wanted.calibrate and wanted.calibrate(stored),
            force=force,
            progress=fetching.report("convert"),
        )
        return made
    with _suggesting(model.origin) if model.path is None else nullcontext():
        if model.kind in (REPO, VARIANT) and not given:
            try:
                return acquire(model.origin, target, wanted, fetching, known=model.variant, force=force)
            except UnindexedError as error:
                _check_single(Remote(model.origin), error)
        return make_from_parts(model, given, target, wanted, fetching, models_dir=models_dir, force=force)


def make_from_parts(
    model: Model,
    given: Mapping[str, Path | Remote],
    target: Callable[[str, str], Path],
    wanted: Wanted,
    fetching: Fetching,
    *,
    models_dir: str | os.PathLike[str] | None,
    force: bool = False,
) -> Path:
    """Convert `model` with the `given` parts in place of its own, or one whose parts are files; see `gather`."""
    name = model.origin
    where = Remote(model.repo, model.file) if model.path is None and model.repo else model.place
    if model.kind in (REPO, VARIANT) and given:
        name = f"{name} with another {' and '.join(given)}"
        if MAIN_PART in (own := _part_folders(model)):
            given = {**dict.fromkeys(own, where), MAIN_PART: Remote(model.origin, MAIN_PART), **given}
            where = given.pop(MAIN_PART)
    gathering = Gathering(where, given, wanted, partial(official_first, models_folder(models_dir)))
    with claim(model):
        return gather(name, gathering, target, wanted, fetching, force=force)


def _part_folders(model: Model) -> Sequence[str]:
    """The parts that have folders of their own in a model of the Hub; none if it is files of weights alone."""
    names = [INDEX] if model.kind == VARIANT else names_of(model.origin)
    own = [part for part in MODEL_PARTS if any(name.startswith(f"{part}/") for name in names)]
    return MODEL_PARTS if INDEX in names else own


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
