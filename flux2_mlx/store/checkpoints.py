"""From a model's name to a converted MLX checkpoint, fetched and converted first if need be."""

import os
from contextlib import suppress
from pathlib import Path

from ..checkpoint import LAST_USED
from ..errors import InputError
from ..exclusion import exclude
from ..files import Claim
from .first_use import Announce, Check, Fetching, Progress
from .folder import models_folder
from .names import Model, checked_variant, claim, holding, resolve


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
    check: Check | None = None,
    announce: Announce | None = None,
    progress: Progress | None = None,
) -> Path:
    """The MLX checkpoint folder of `source`, fetched and converted first if need be.

    Args:
        source: a model's name or path; see `resolve`.
        variant: the model's name where the source can't tell; where it can, InputError if it is another.
        quant: one of `QUANTIZATIONS`; None: `bf16`; an MLX checkpoint keeps its own.
        text_quant: the same for the text encoder; None: as `quant`, but `qint8` with `bf16`.
        models_dir: where converted models are kept; see `models_folder`.
        text_only: a checkpoint without transformer and VAE will do.
        only_converted: fetch and convert nothing.
        check: called with the checkpoint that will be made, which has no files yet, as soon as that is known and before
            anything is fetched or converted, and again if the files say otherwise; it may raise what speaks against it.
        keep_source, announce: of what is fetched; see `Fetching`.
        progress: called with bytes done, bytes in all, and `download` or `convert`.

    Raises:
        InputError, CheckpointError, DownloadError: the source is unknown, damaged or can't be fetched.
    """
    model = resolve(source, models_dir)
    row = checked_variant(variant, model)
    if model.is_checkpoint:
        return holding(model.place, row)
    from .sources import Wanted  # with the Hub and the converter, which a checkpoint can do without
    from .targets import target_of

    with claim(model):
        wanted = Wanted(row, quant, text_quant, text_only)
        conversion = target_of(model, wanted, models_folder(models_dir))
        folder = conversion.stored()
        if folder is not None:
            holding(folder, row)
        elif only_converted:
            raise InputError(
                f"{model.name} is not converted yet; name it with model=NAME to have it fetched and converted"
            )
        else:
            folder = conversion.make(Fetching(keep_source, check, announce, progress))
    return _used(folder)


def _used(folder: Path) -> Path:
    """`folder`, which is in the models folder, after a note of the time."""
    with suppress(OSError), Claim(folder):  # it may belong to someone else
        (folder / LAST_USED).touch()
    exclude(folder)
    return folder
