"""The store of models: from a name to a converted MLX checkpoint, fetched and converted first if need be."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, is_checkpoint, variant_components
from ..components import COMPONENTS
from ..config import QUANTIZATIONS
from ..convert import LAST_USED, Source, check_source, check_writable
from ..errors import CheckpointError, InputError
from ..exclusion import exclude
from ..files import Claim
from .acquisition import Announce, Progress, convert_source, labelled
from .conversion import claim, gathered, holding, in_full, make_checkpoint
from .names import FILE, SOURCE, Model, models_folder, resolve
from .stock import checked_variant, checkpoint_name, conversions, folder_name, what_is_here


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
        return holding(model.place, variant)
    if model.kind == FILE:
        return _of_file(
            model,
            variant,
            quant,
            text_quant,
            models_dir,
            only_converted,
            text_only=text_only,
            keep_source=keep_source,
            check=check,
            announce=announce,
            progress=progress,
        )
    with claim(model):
        opened, is_complete = None, True
        if model.kind == SOURCE:
            opened, is_complete = what_is_here(
                model, variant, text_quant=text_quant, models_dir=models_dir, text_only=text_only
            )
        quants = opened.quants(quant, text_quant) if opened else in_full(quant, text_quant)
        name = f"{opened.variant.name}-{opened.fingerprint[:12]}" if opened else folder_name(model)
        targets = [models_folder(models_dir) / x for x in _sufficient(name, *quants, text_only)]
        if found := next(filter(is_checkpoint, targets), None):
            return _used(holding(found, variant))
        if only_converted:
            raise _not_converted(model)
        outline = _outline(model, opened, *quants, text_only) if check and is_complete else None
        if check is not None and outline is not None:
            check(outline)
        check_writable(targets[0])
        stored = None if text_only else _unquantized(targets[0].parent, name, *quants)
        with _unless_made(targets[0]):
            if opened is not None and is_complete and stored is None:
                converting = labelled(progress, "convert")
                convert_source(opened, targets[0], quant, text_quant, name=model.origin, progress=converting)
            else:
                make_checkpoint(
                    model if stored is None else resolve(stored),
                    targets[0],
                    *quants,
                    variant=variant,
                    models_dir=models_dir,
                    text_only=text_only,
                    keep_source=keep_source,
                    check=check and partial(_check_again, check, outline),
                    announce=announce,
                    progress=progress,
                )
    return _used(targets[0])


def _not_converted(model: Model) -> InputError:
    return InputError(f"{model.name} is not converted yet; name it with model=NAME to have it fetched and converted")


def _of_file(
    model: Model,
    variant: str | None,
    quant: str | None,
    text_quant: str | None,
    models_dir: str | os.PathLike[str] | None,
    only_converted: bool,
    *,
    text_only: bool,
    **fetching: Any,
) -> Path:
    """The checkpoint of a file of the Hub. Without a quantization it is the one in most bits that there is, since only
    the file tells what it would be stored as."""
    found = [Checkpoint.open(path) for path in conversions(model, models_dir, painting=not text_only)]
    fitting = [x for x in found if quant in (None, x.quant) and text_quant in (None, x.text_quant)]
    if fitting:
        best = min(fitting, key=lambda x: (QUANTIZATIONS.index(x.quant), QUANTIZATIONS.index(x.text_quant)))
        return _used(holding(best.folder, variant))
    if only_converted:
        raise _not_converted(model)
    folder = models_folder(models_dir)

    def target(quant: str, text_quant: str) -> Path:
        return folder / _sufficient(folder_name(model), quant, text_quant, text_only)[0]

    check_writable(target("bf16", "bf16"))
    settings = {"variant": variant, "text_only": text_only, **fetching}
    return _used(gathered(model, {}, target, quant, text_quant, models_dir=models_dir, **settings))


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
