"""From an opened source to an MLX checkpoint, tensor by tensor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_mlx.checkpoint import Component, as_stored
from flux2_mlx.components import COMPONENTS, MAIN_PART, quantizations
from flux2_mlx.config import check_quant
from flux2_mlx.copying import Range
from flux2_mlx.quantization import wanted_quants
from flux2_mlx.weights import FLOATS, READER, TensorInfo, Tensors

from . import lora
from .blobs import blobs
from .folder import Inspection, Part, check_target, new_manifest, write_folder
from .formats import range_of, rounded, versions
from .lora import Fold, Folds, folded_source
from .requantize import stored_parts, warn_of_loss
from .rules import Converted, Finite, Placed, Rule, copied, is_finite
from .sources import Source
from .tokenizer import check_tokenizer, opened_tokenizer

# In what a manifest says of the source: the quantizations that keep the few bits of its transformer and text encoder.
KEPT = ("quant", "text_quant")


@dataclass(frozen=True)
class _Plan:
    """What is written for one component: our tensors before quantization, and how each of them is made."""

    component: Component
    plain: dict[str, TensorInfo]
    rules: dict[str, Rule]

    @property
    def part(self) -> str:
        """The part of the source that it is made from."""
        return COMPONENTS[self.component.name].part


def write_checkpoint(
    source: Source,
    target: Path,
    quant: str = "bf16",
    text_quant: str | None = None,
    *,
    name: str | None = None,
    folds: Sequence[Fold] = (),
    force: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Convert `source` into a new MLX checkpoint folder.

    Args:
        source: the opened source.
        target: the folder to make; it appears only when it is complete.
        quant: one of `QUANTIZATIONS` for the transformer.
        text_quant: the same for the text encoder; None: as `quant`, but `qint8` with `bf16`.
        name: what the manifest calls the source; its folder's name if None.
        folds: adapters that are folded into the weights before these are quantized.
        force: replace an MLX checkpoint at `target`.
        progress: called with bytes done and bytes in all: those that are written, and of a source in the Hub's cache
            also those that are compared with the hashes which the Hub states.

    Raises:
        InputError: `target` exists or can't be written, the disk is too small, an unknown quantization.
        CheckpointError: names, shapes or dtypes are not those of the model, weights are not finite, a file of the
            source is not what the Hub states, or an adapter is none of this model.
    """
    quants = wanted_quants(quant, text_quant)
    plans = _checked_plans(source, *quants)
    check_folds(source, folds)
    check_target(target, force)
    linked = blobs([*source.small_files, *chain(*source.files.values())])
    adapters = Folds(folds, source.configs)
    taken = stored_parts(source.stored, quants, adapters)
    for part in taken:
        warn_of_loss(source.stored[part.component.name], part.component)
    stored = [(network.files[0].parent.parent, [network.name]) for network in source.stored.values()]
    files = [file for part in source.parts.values() for file in versions(part.tensors)]
    files += [file for network in source.stored.values() for file in versions(network.tensors)]
    files += adapters.versions
    networks = [one for one in COMPONENTS if one in source.configs]
    with opened_tokenizer(source.tokenizer) as tokenizer:
        write_folder(
            target,
            [*(_part(source, plan, adapters) for plan in plans), *taken],
            new_manifest(source.variant, networks, quants, folded_source(_origin(source, name), folds)),
            tokenizer=tokenizer,
            schedule=source.schedule,
            inspection=Inspection(stored, linked, files),
            force=force,
            progress=progress,
        )


def _origin(source: Source, name: str | None) -> dict[str, Any]:
    """What a checkpoint says of what it was made from: `parts` are those that were elsewhere."""
    elsewhere = {part: str(x) for part, x in source.places.items() if source.place not in (x, *x.parents)}
    stamp = {"name": name or source.place.name, "fingerprint": source.fingerprint}
    converted = [name in source.parts for name in (MAIN_PART, "text_encoder")]
    usual = zip(KEPT, source.usual_quants, converted, strict=True)
    kept = {name: quant for name, quant, is_converted in usual if is_converted and quant != "bf16"}
    return stamp | ({"parts": elsewhere} if elsewhere else {}) | kept


def check_source(source: Source, quant: str, text_quant: str) -> dict[str, Component]:
    """The networks that a conversion will write.

    Raises:
        CheckpointError: what can be known to be wrong with the source from its small files and headers.
    """
    made = {plan.component.name: plan.component for plan in _checked_plans(source, quant, text_quant)}
    made |= {part.component.name: part.component for part in stored_parts(source.stored, (quant, text_quant))}
    return {name: made[name] for name in COMPONENTS if name in made}


def check_folds(source: Source, folds: Sequence[Fold]) -> None:
    """CheckpointError if an adapter is none of the model, or can't be folded into it. One that is to be fetched is
    here then."""
    lora.check_folds(folds, source.configs, source.variant.name)


def _checked_plans(source: Source, quant: str, text_quant: str) -> list[_Plan]:
    quants = quantizations(check_quant(quant), check_quant(text_quant))
    source.check()
    for name, part in source.parts.items():
        part.reading.check(source.configs_of(name), f"{part.place} is not a {source.variant.name} {name}")
    check_tokenizer(source.tokenizer, source.configs["text_encoder"], source.places["text_encoder"])
    return [_plan(source, name, quants[name]) for name in COMPONENTS if name in source.configs.keys() - source.stored]


def _plan(source: Source, name: str, quant: str) -> _Plan:
    bare = Component(name, source.configs[name], None, ())
    plain = bare.infos
    rule_for = source.parts[COMPONENTS[name].part].reading.rules_for(name, bare.config)
    rules = {key: rule_for(key, tensor.shape) for key, tensor in plain.items()}
    return _Plan(bare.quantized(quant), plain, rules)


def _part(source: Source, plan: _Plan, adapters: Folds) -> Part:
    part = source.parts[plan.part]

    def complaint(name: str) -> str:
        sources = plan.rules[name].sources
        read = part.tensors.read(sources)
        # In bfloat16, which numbers of other dtypes may be too large for.
        wrong = [source for source in sources if not is_finite(next(read).astype(mx.bfloat16, stream=READER))]
        what = f"{part.place}: {', '.join(wrong or sources)} {'is' if len(wrong or sources) == 1 else 'are'} not finite"
        return f"{what}: damaged, or too large when it was saved; fetch it again, or give another copy"

    converted = Finite(Converted(Placed(rounded(part.tensors), part.place), plan.rules, plan.plain), complaint)
    tensors = as_stored(adapters.into(plan.component.name, converted), plan.component)
    if adapters.change(plan.component.name):
        return Part(plan.component, tensors)
    stored = plan.component.infos
    names = [name for name, info in plan.plain.items() if stored.get(name) == info]
    return Part(plan.component, tensors, copied(names, plan.rules, partial(_bfloat16, part.tensors), complaint))


def _bfloat16(tensors: Tensors, name: str) -> Range | None:
    """Where the bytes of a tensor are, if they are those of its numbers in bfloat16."""
    return range_of(tensors, name) if tensors.infos[name].dtype == FLOATS[mx.bfloat16] else None
