"""Opening what a model is converted from, as far as it is on the disk."""

import os
from dataclasses import dataclass

from ..config import Variant
from ..convert import MissingPartsError, Source, assembled, is_loose
from ..convert.lora import Fold
from .first_use import Calibrate
from .folder import models_folder, official_first
from .names import Model


@dataclass(frozen=True)
class Wanted:
    """What of a model is wanted, and how it is to be stored.

    Attributes:
        variant: the name of its row of the table, as `checked_variant` gives it; None: its files must tell.
        quant: one of `QUANTIZATIONS` for the transformer; None: as stored, or `bf16`, or as few bits as the source has.
        text_quant: the same for the text encoder; None: as stored, or as `quant`, but `qint8` with `bf16`, or as few
            bits as the source has.
        text_only: leave out the transformer and the VAE.
        replaced: the model whose transformer is replaced; it is that one still if the new transformer tells nothing.
        folds: adapters that are folded into its weights.
        calibrate: measures its transformer for `mixed4`; of an MLX checkpoint only.
    """

    variant: str | None = None
    quant: str | None = None
    text_quant: str | None = None
    text_only: bool = False
    replaced: Variant | None = None
    folds: tuple[Fold, ...] = ()
    calibrate: Calibrate | None = None


def open_source(model: Model, wanted: Wanted, models_dir: str | os.PathLike[str] | None = None) -> Source:
    """The files of `model`, which is a folder or a file; single files are completed by a converted model, looked for
    in `models_dir` (see `models_folder`)."""
    if is_loose(model.place):
        return assembled(
            model.place,
            {},
            wanted.variant,
            others=official_first(models_folder(models_dir)),
            text_quant=wanted.text_quant,
            text_only=wanted.text_only,
        )
    return Source.open(model.place, wanted.variant, text_only=wanted.text_only)


def what_is_here(model: Model, wanted: Wanted, models_dir: str | os.PathLike[str] | None = None) -> tuple[Source, bool]:
    """What is on the disk of `model`, as `open_source` gives it, and whether that is all that a conversion needs. The
    rest can be fetched."""
    try:
        return open_source(model, wanted, models_dir), True
    except MissingPartsError as error:
        if not error.can_be_fetched:
            raise
        return error.source, False
