"""From an MLX checkpoint in bfloat16 to one with fewer bits, without the source that it was made from."""

import logging
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

from flux2_mlx.checkpoint import DIGEST, FILES, MANIFEST, Checkpoint, Component, as_stored
from flux2_mlx.components import by_group, quantizations
from flux2_mlx.errors import InputError
from flux2_mlx.quantization import DEFAULT_TEXT_QUANT, check_quant
from flux2_mlx.text import TOKENIZER_FILES
from flux2_mlx.verification import check_hashes, hashed_bytes
from flux2_mlx.weights import read_json

from .folder import Inspection, Part, check_target, write_folder
from .rules import Finite

_log = logging.getLogger(__name__)


def requantize(
    checkpoint: Checkpoint,
    target: Path,
    quant: str | None = None,
    text_quant: str | None = None,
    *,
    force: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Write a checkpoint as its source would have been converted with other quantizations, bit for bit.

    Args:
        checkpoint: the opened checkpoint.
        target: the folder to make; it appears only when it is complete.
        quant: `bf16`, `qint8` or `qint4` for the transformer; None: as stored.
        text_quant: the same for the text encoder; None: as stored, with a warning if that is not what goes with
            `quant`; or from `bf16` what does.
        force: replace an MLX checkpoint at `target`.
        progress: called with bytes done and bytes in all: those that are compared with the recorded hashes, and those
            that are written.

    Raises:
        InputError: nothing would change, what is quantized already can't become that, or `target` can't be written.
        CheckpointError: the checkpoint is not what was converted.
    """
    usual = None if quant is None or text_quant else DEFAULT_TEXT_QUANT[check_quant(quant)]
    quant, text_quant = requantized(checkpoint, quant, text_quant)
    if (quant, text_quant) == (checkpoint.quant, checkpoint.text_quant):
        stored = f"stored as {quant} with the text encoder as {text_quant}"
        raise InputError(
            f"{checkpoint.folder} is an MLX checkpoint already, {stored}; use it as it is, or ask for less"
        )
    check_target(target, force)
    if usual not in (None, text_quant):
        stays = f"the text encoder of {checkpoint.folder} stays {text_quant}, which can't become {usual}"
        _log.warning("%s; for that convert the original", stays)
    wanted, parts = quantizations(quant, text_quant), []
    for name, component in checkpoint.components.items():
        parts.append(stored_part(component, component.quantized(wanted[name])))
    former = read_json(checkpoint.folder / MANIFEST)
    manifest = {key: value for key, value in former.items() if key not in (FILES, DIGEST)}
    manifest["quantization"] = by_group(quant, text_quant)
    manifest["version"] = version("flux2-mlx")
    copies = [f"tokenizer/{file}" for file in TOKENIZER_FILES if (checkpoint.folder / "tokenizer" / file).is_file()]
    write_folder(
        target,
        parts,
        {file: checkpoint.folder / file for file in (*copies, "scheduler/scheduler_config.json")},
        manifest,
        inspection=Inspection(hashed_bytes(checkpoint.folder), partial(check_hashes, checkpoint.folder)),
        force=force,
        progress=progress,
    )


def requantized(checkpoint: Checkpoint, quant: str | None, text_quant: str | None) -> tuple[str, str]:
    """What `requantize` makes of these settings; InputError if it can't."""
    if text_quant is None:
        text_quant = checkpoint.text_quant
        if quant is not None and text_quant == "bf16":
            text_quant = DEFAULT_TEXT_QUANT[check_quant(quant)]
    quant = check_quant(quant or checkpoint.quant)
    for what, stored, wanted in (
        ("transformer", checkpoint.quant, quant),
        ("text encoder", checkpoint.text_quant, check_quant(text_quant)),
    ):
        if stored not in ("bf16", wanted):
            raise InputError(
                f"the {what} of {checkpoint.folder} is stored as {stored}, which can't become {wanted}; convert the "
                "original, or a checkpoint in bf16"
            )
    return quant, text_quant


def stored_part(stored: Component, wanted: Component) -> Part:
    """A network of a checkpoint as it is to be written, in as many bits or fewer."""
    if stored.quantization == wanted.quantization:
        return Part(wanted, stored.tensors)

    def complaint(name: str) -> str:
        return f"{stored.files[0].parent}: {name} is not finite; convert the model again"

    return Part(wanted, as_stored(Finite(stored.tensors, complaint), wanted))
