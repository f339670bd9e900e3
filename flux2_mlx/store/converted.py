"""What models have been converted to, and what they will be."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from ..checkpoint import MANIFEST, Checkpoint, fitted, variant_sizes
from ..components import MAIN, by_group, can_paint
from ..config import QUANTIZATIONS, VARIANTS, Variant
from ..errors import CheckpointError, InputError
from ..json_files import read_json
from ..mixture import CALIBRATION
from ..quantization import layer_bits, usual_text_quant
from .folder import models_folder, stored_checkpoints
from .names import DEMO, SOURCE, VARIANT, Model, checked_variant, resolve

_log = logging.getLogger(__name__)


def checkpoint_name(model: str, quant: str, text_quant: str) -> str:
    """The folder of a converted model: its name and quantization, the text encoder's where it is not the default."""
    text = "" if text_quant == usual_text_quant(quant) else f"-text-{text_quant}"
    return f"{model}-{quant}{text}"


def folder_name(model: Model) -> str:
    """How the checkpoints begin that are converted from a model of the table, a repo or a file of one."""
    if model.variant or not model.file:
        return model.variant.name if model.variant else model.origin.replace("/", "--")
    digest = sha256(model.file.encode()).hexdigest()[:8]  # of two folders may hold files of one name
    return f"{str(model.repo).replace('/', '--')}--{PurePosixPath(model.file).stem[:80]}-{digest}"


def conversions(
    model: Model,
    models_dir: str | os.PathLike[str] | None = None,
    *,
    variant: str | None = None,
    painting: bool = False,
) -> list[Path]:
    """The checkpoints in the models folder that were converted from `model` itself, or the one that it is.

    A fine-tune has its own, and none of the model that it was made from.

    Args:
        model: see `resolve`.
        models_dir: see `models_folder`.
        variant: the model's name where the source can't tell.
        painting: leave out those that can't make images or are damaged.
    """
    if model.is_checkpoint:
        return [model.place]
    digest = None
    if model.kind == SOURCE:
        from .sources import Wanted, what_is_here  # with the converter, which most questions can do without

        source, _ = what_is_here(model, Wanted(checked_variant(variant, model)))
        digest = source.fingerprint
    found = [path for path in stored_checkpoints(models_folder(models_dir)) if _is_of(path, model, digest)]
    return [path for path in found if not painting or _can_paint(path)]


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
    wanted = (variant, fingerprint, by_group(quant, text_quant))
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


def keeps_bits(folder: Path, quant: str | None, text_quant: str | None) -> bool:
    """Whether a checkpoint is stored as files are of which this is asked, since the ones that it was made from had few
    bits."""
    from ..convert import KEPT, chosen_quants

    manifest = read_json(folder / MANIFEST)
    source, stored = manifest.get("source"), manifest.get("quantization")
    if not isinstance(source, dict) or not isinstance(stored, dict) or not source.keys() & {*KEPT}:
        return False
    own, own_text = (source.get(name, "bf16") for name in KEPT)
    if own not in QUANTIZATIONS or own_text not in QUANTIZATIONS:
        return False
    wanted: dict[str, Any] = by_group(*chosen_quants(own, own_text, quant, text_quant))
    if KEPT[1] not in source and text_quant is None:  # one that older versions made, which did not note it
        wanted["text_encoder"] = stored.get("text_encoder")
    return bool(stored == wanted)


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
    said = checked_variant(variant, model)
    if model.kind == SOURCE:
        from .sources import Wanted, what_is_here

        source, is_whole = what_is_here(model, Wanted(said))
        for note in source.notes:
            hear(note)
        return fitted(source.variant, source.configs) if is_whole else source.variant
    if model.kind == VARIANT and model.variant:
        return model.variant
    if not folders:
        raise InputError(f"{model.name} is not converted yet, so nothing is known of it; download it first")
    checkpoints = [Checkpoint.open(folder) for folder in folders]
    return next((x for x in checkpoints if x.quant == quant), checkpoints[0])


def usual_quants(
    model: Model, variant: str | None, quant: str | None, text_quant: str | None
) -> tuple[str | None, str | None]:
    """As what the transformer and the text encoder of a run would be stored for which this was asked; None: as they
    are, in a checkpoint, or as usual."""
    if model.kind != SOURCE:
        return quant, text_quant
    from .sources import Wanted, what_is_here

    source, _ = what_is_here(model, Wanted(checked_variant(variant, model)))
    return source.quants(quant, text_quant)


def stored_quants(folder: Path) -> tuple[str, str]:
    """How a checkpoint's transformer and its text encoder are stored; CheckpointError if it is damaged."""
    checkpoint = Checkpoint.open(folder)
    return checkpoint.quant, checkpoint.text_quant


def mixture(checkpoint: Checkpoint) -> dict[int, int]:
    """How many layers of the transformer are in how many bits; none unless there are layers of several."""
    transformer = checkpoint.components.get(MAIN)
    counts = Counter(layer_bits(transformer.quantization, transformer.infos).values() if transformer else ())
    return dict(sorted(counts.items())) if len(counts) > 1 else {}


def calibration(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How it was measured which layers have 8 bits in `mixed4`, if it was."""
    measured = checkpoint.source.get(CALIBRATION)
    return measured if isinstance(measured, dict) else None


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
    return isinstance(components, list) and can_paint(components)
