"""From an MLX checkpoint in bfloat16 to one with fewer bits, without the source that it was made from."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from flux2_mlx.checkpoint import DIGEST, FILES, MANIFEST, Checkpoint, Component, module_tensors
from flux2_mlx.components import quantizations
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.quantization import BITS, DEFAULT_TEXT_QUANT, check_quant
from flux2_mlx.text import TOKENIZER_FILES
from flux2_mlx.verification import check_hashes, hashed_bytes
from flux2_mlx.weights import load_arrays, read_json

from .folder import Inspection, Layer, Part, check_target, write_folder
from .write import stored_arrays, stored_names

_log = logging.getLogger(__name__)


def requantize(
    checkpoint: Checkpoint,
    target: Path,
    quant: str | None = None,
    text_quant: str | None = None,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
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
        parts.append(_part(component, component.quantized(wanted[name]), BITS[wanted[name]]))
    stored = read_json(checkpoint.folder / MANIFEST)
    manifest = {key: value for key, value in stored.items() if key not in (FILES, DIGEST)}
    manifest["quantization"] = {"transformer": quant, "text_encoder": text_quant}
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
        follows = quant is not None and checkpoint.text_quant == "bf16"
        text_quant = DEFAULT_TEXT_QUANT[check_quant(quant)] if follows else checkpoint.text_quant
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


def _part(stored: Component, wanted: Component, bits: int | None) -> Part:
    weights = _Weights(stored)
    plain, tensors = (
        module_tensors(Component(stored.name, stored.config, None, ()).build()),
        module_tensors(wanted.build()),
    )
    layers = []
    for name in plain:
        kept = {key: tensors[key] for key in stored_names(name, tensors)}
        if stored.quantization == wanted.quantization:
            layers.append(Layer(kept, partial(weights.take_all, list(kept))))
        else:
            layers.append(Layer(kept, partial(weights.quantized, name, kept, bits)))
    return Part(wanted, layers)


class _Weights:
    """The tensors of a stored network, each handed out once, so that reading one leaves nothing behind."""

    def __init__(self, component: Component):
        self._component = component
        self._arrays: dict[str, mx.array] = {}

    def take_all(self, names: list[str]) -> Iterator[mx.array]:
        for name in names:
            yield self._take(name)

    def quantized(self, name: str, stored: dict, bits: int | None) -> Iterator[mx.array]:
        array = self._take(name)
        if not mx.isfinite(array).all().item():
            raise CheckpointError(f"{self._component.files[0].parent}: {name} is not finite; convert the model again")
        yield from stored_arrays(array, stored, bits)

    def _take(self, name: str) -> mx.array:
        if name not in self._arrays:
            for path in self._component.files:
                self._arrays |= load_arrays(path)
        array = self._arrays.pop(name)
        mx.eval(array)  # or the device would wait for the file
        return array
