"""From an MLX checkpoint to one with fewer bits, without the source that it was made from."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flux2_mlx.checkpoint import Checkpoint, Component, as_stored
from flux2_mlx.components import COMPONENTS, GROUPS, MAIN, quantizations
from flux2_mlx.config import QUANTIZATIONS
from flux2_mlx.copying import Copied
from flux2_mlx.errors import InputError
from flux2_mlx.mixture import CALIBRATION, Calibration
from flux2_mlx.quantization import (
    GROUP_SIZE,
    MIXED,
    bits_of,
    layer_bits,
    quantize_array,
    quants_from,
    usual_text_quant,
)
from flux2_mlx.weights import Files, Tensors
from flux2_mlx.wording import told

from .folder import Inspection, Part, check_target, derived_source, new_manifest, write_folder
from .formats import SETTINGS, unpacked, versions
from .lora import Fold, Folds, check_folds, folded_source
from .rules import Finite

_log = logging.getLogger(__name__)
# The loss is measured of at most this many layers, and of this many rows of each.
_LAYERS = 8
_ROWS = 256


def requantize(
    checkpoint: Checkpoint,
    target: Path,
    quant: str | None = None,
    text_quant: str | None = None,
    *,
    folds: Sequence[Fold] = (),
    calibration: Calibration | None = None,
    force: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Write a checkpoint in fewer bits. From bfloat16 it equals, bit for bit, a new conversion of its source.

    4 bits made from 8 bits are worse than 4 bits made from the source: a warning says by how much, and their
    fingerprint is another. Layers that have the wanted bits already are copied.

    Args:
        checkpoint: the opened checkpoint.
        target: the folder to make; it appears only when it is complete.
        quant: one of `QUANTIZATIONS` for the transformer; None: as stored.
        text_quant: one of `QUANTIZATIONS` for the text encoder; None: what usually goes with `quant` if it is
            stored as `bf16`, else as stored, with a warning if that is not the usual one.
        folds: adapters that are folded into its weights, which must be in 16 bits.
        calibration: of its transformer, which says what has 8 bits in `mixed4`.
        force: replace an MLX checkpoint at `target`.
        progress: called with bytes done and bytes in all: those that are compared with the recorded hashes, and those
            that are written.

    Raises:
        InputError: nothing would change, what is quantized already would gain nothing, or `target` can't be written.
        CheckpointError: the checkpoint is not what was converted, or an adapter is none of it.
    """
    usual = None if quant is None or text_quant else usual_text_quant(quant)
    quant, text_quant = requantized(checkpoint, quant, text_quant)
    if not folds and (quant, text_quant) == checkpoint.quants:
        stored = f"stored as {quant} with the text encoder as {text_quant}"
        raise InputError(
            f"{checkpoint.folder} is an MLX checkpoint already, {stored}; use it as it is, or ask for less"
        )
    configs = {name: component.config for name, component in checkpoint.components.items()}
    check_folds(folds, configs, checkpoint.variant.name)
    check_target(target, force)
    if usual not in (None, text_quant):
        stays = f"the text encoder of {checkpoint.folder} stays {text_quant}"
        _log.warning("%s; %s of the original is better than what could be made of that", stays, usual)
    adapters = Folds(folds, configs)
    ranking = None if calibration is None else calibration.ranking
    parts = stored_parts(checkpoint.components, (quant, text_quant), adapters, ranking)
    for part in parts:
        warn_of_loss(checkpoint.components[part.component.name], part.component)
    source = _coarsened_source(folded_source(checkpoint.source, folds), checkpoint.components, parts)
    if calibration is not None:
        source = _calibrated_source(source, calibration)
    files = [file for component in checkpoint.components.values() for file in versions(component.tensors)]
    files += adapters.versions
    write_folder(
        target,
        parts,
        new_manifest(checkpoint.variant, checkpoint.components, (quant, text_quant), source),
        tokenizer=checkpoint.folder / "tokenizer",
        schedule=checkpoint.folder / "scheduler" / "scheduler_config.json",
        inspection=Inspection([(checkpoint.folder, None)], files=files),
        force=force,
        progress=progress,
    )


def _calibrated_source(source: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    """What a checkpoint says of its source, with its calibration and the fingerprint that it has with that."""
    return {**derived_source(source, calibration.ranking), CALIBRATION: calibration.measured}


def _coarsened_source(source: dict[str, Any], stored: Mapping[str, Component], parts: Sequence[Part]) -> dict[str, Any]:
    """What a checkpoint says of its source, with a fingerprint of its own if networks were `stored` in few bits and get
    fewer, and without the calibration of a transformer that does."""
    changed = [stored[part.component.name] for part in parts if _is_coarsened(stored, part)]
    if not changed:
        return source
    if MAIN in [one.name for one in changed]:
        source = {key: value for key, value in source.items() if key != CALIBRATION}
    return derived_source(source, {one.name: one.quantization for one in changed})


def _is_coarsened(stored: Mapping[str, Component], part: Part) -> bool:
    """Whether a network has few bits and gets fewer."""
    before = stored[part.component.name].quantization
    return before is not None and before != part.component.quantization


def requantized(checkpoint: Checkpoint, quant: str | None, text_quant: str | None) -> tuple[str, str]:
    """The `quant` and `text_quant` of what `requantize` writes with these settings; InputError if it can't."""
    quants = quants_from(checkpoint.quants, quant, text_quant)
    for group, stored, wanted in zip(GROUPS, checkpoint.quants, quants, strict=True):
        if QUANTIZATIONS.index(wanted) < QUANTIZATIONS.index(stored) or (stored, wanted) == ("qint6", MIXED):
            raise InputError(
                f"the {told([group])} of {checkpoint.folder} is stored as {stored}, and would gain nothing as "
                f"{wanted}; convert the original, or a checkpoint in bf16"
            )
    return quants


def stored_parts(
    stored: Mapping[str, Component],
    quants: tuple[str, str],
    adapters: Folds | None = None,
    ranking: Sequence[str] | None = None,
) -> list[Part]:
    """These networks of checkpoints as `stored_part` has each, where the transformer and the text encoder are to be
    stored in these quantizations; the transformer's layers in `mixed4` by their `ranking`."""
    wanted = quantizations(*quants)
    return [
        stored_part(one, one.quantized(wanted[name], ranking if COMPONENTS[name].is_main else None), adapters)
        for name, one in stored.items()
    ]


def stored_part(stored: Component, wanted: Component, adapters: Folds | None = None) -> Part:
    """A network of a checkpoint as it is to be written, in as many bits or fewer, with what `adapters` change.

    Raises:
        InputError: it has fewer bits already, or it has few and would change.
    """
    changes = adapters is not None and adapters.change(stored.name)
    place = stored.files[0].parent
    if changes and stored.quantization is not None:
        raise InputError(
            f"{place} is stored in {_told(stored)} bits, which no adapter is folded into; convert the original, or a "
            "checkpoint in bf16"
        )
    if any(_bits(stored, layer) < bits for layer, bits in layer_bits(wanted.quantization, wanted.infos).items()):
        before, after = _told(stored), _told(wanted)
        raise InputError(f"{place} is stored in {before} bits, which gain nothing as {after}; ask for the same")

    def complaint(name: str) -> str:
        return f"{place}: {name} is not finite; convert the model again"

    plain: Tensors = Finite(_plain(stored), complaint)
    files = Files(stored.files)
    kept = {} if changes else {name: Copied((files.range_of(name),)) for name in _kept(stored, wanted)}
    return Part(wanted, as_stored(adapters.into(stored.name, plain) if adapters else plain, wanted), kept)


def _kept(stored: Component, wanted: Component) -> list[str]:
    """The tensors of what has the wanted bits already; none where 16 bits get fewer."""
    if stored.quantization is None and wanted.quantization is not None:
        return []
    before, after = (layer_bits(one.quantization, one.infos) for one in (stored, wanted))
    layers = {name: name.rpartition(".")[0] for name in wanted.infos}
    return [name for name, layer in layers.items() if before.get(layer) == after.get(layer)]


def warn_of_loss(stored: Component, wanted: Component) -> None:
    """Say what is lost where a quantized network gets fewer bits still."""
    before, after = (layer_bits(one.quantization, one.infos) for one in (stored, wanted))
    changed = [layer for layer, bits in after.items() if bits != before.get(layer)]
    if stored.quantization is None or not changed:
        return
    whose = "its weights" if len(changed) == len(after) else f"the weights of {len(changed)} of {len(after)} layers"
    change = f"{_loss(_plain(stored), {layer: after[layer] for layer in changed}):.1%}"
    loss = f"in {_told(wanted)} {whose} change by {change} of their size; of the original they would be better"
    _log.warning("%s is stored in %s bits already: %s", stored.files[0].parent, _told(stored), loss)


def _bits(component: Component, layer: str) -> int:
    return 16 if component.quantization is None else bits_of(component.quantization, layer)


def _told(component: Component) -> str:
    """The bits of the layers that are quantized, from the fewest to the most."""
    bits = sorted({*layer_bits(component.quantization, component.infos).values()} or {16})
    return " to ".join(map(str, dict.fromkeys((bits[0], bits[-1]))))


def _plain(component: Component) -> Tensors:
    """The weights of a network as numbers, whatever they are stored as."""
    if component.quantization is None:
        return component.tensors
    return unpacked(component.tensors, {SETTINGS: json.dumps(component.quantization)})


def _loss(tensors: Tensors, bits: Mapping[str, int]) -> float:
    """The relative change of layers when they get these `bits`: the root mean square of the change of their weights
    over that of the values, in some rows of some layers."""
    change = size = 0.0
    some = [*bits][:: -(-len(bits) // _LAYERS)]
    for layer, array in zip(some, tensors.read([f"{layer}.weight" for layer in some]), strict=True):
        rows = array[:_ROWS].astype(mx.float32)
        codes, scales, biases = quantize_array(rows, bits[layer]).values()
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        again = mx.dequantize(codes, scales, biases, GROUP_SIZE, bits[layer])
        change += _squares(again - rows)
        size += _squares(rows)
    return math.sqrt(change / size) if size else 0.0


def _squares(array: mx.array) -> float:
    return float(np.asarray(mx.square(array).sum()))
