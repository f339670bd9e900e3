"""From an opened source to an MLX checkpoint, tensor by tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import mlx.core as mx

from flux2_mlx.checkpoint import FORMAT_VERSION, Component, as_stored
from flux2_mlx.components import COMPONENTS, by_group, quantizations
from flux2_mlx.quantization import DEFAULT_TEXT_QUANT, check_quant
from flux2_mlx.text import TOKENIZER_FILES, TOKENIZERS
from flux2_mlx.weights import FLOATS, TensorInfo, mismatches, raise_problems

from .blobs import blobs, check_blob
from .folder import Inspection, Part, check_target, write_folder
from .parts import LAYOUT
from .rules import Converted, Finite, Rule
from .sources import TOKENIZER, Source


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
    force: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Convert `source` into a new MLX checkpoint folder.

    Args:
        source: the opened source.
        target: the folder to make; it appears only when it is complete.
        quant: `bf16`, `qint8` or `qint4` for the transformer.
        text_quant: the same for the text encoder; None: 8 bit, or 4 bit with `qint4`.
        name: what the manifest calls the source; its folder's name if None.
        force: replace an MLX checkpoint at `target`.
        progress: called with bytes done and bytes in all: those that are written, and of a source in the Hub's cache
            also those that are compared with the hashes which the Hub states.

    Raises:
        InputError: `target` exists or can't be written, the disk is too small, an unknown quantization.
        CheckpointError: names, shapes or dtypes are not those of the model, weights are not finite, or a file of the
            source is not what the Hub states.
    """
    text_quant = text_quant or DEFAULT_TEXT_QUANT[check_quant(quant)]
    plans = _checked_plans(source, quant, text_quant)
    check_target(target, force)
    stated = blobs([*_small_files(source.folder), *chain(*source.files.values())])

    def inspect(report: Callable[[int], None]) -> None:
        for path, blob in stated.items():
            check_blob(path, blob, report)

    manifest = {
        "format_version": FORMAT_VERSION,
        "variant": source.variant.name,
        "components": [plan.component.name for plan in plans],
        "quantization": by_group(quant, text_quant),
        "source": {"name": name or source.folder.name, "fingerprint": source.fingerprint},
        "version": version("flux2-mlx"),
    }
    copies = [f"tokenizer/{file}" for file in TOKENIZER_FILES if (source.folder / "tokenizer" / file).is_file()]
    write_folder(
        target,
        [_part(source, plan) for plan in plans],
        {file: source.folder / file for file in (*copies, "scheduler/scheduler_config.json")},
        manifest,
        inspection=Inspection(sum(blob.stat().st_size for blob in stated.values()), inspect),
        force=force,
        progress=progress,
    )


def check_source(source: Source, quant: str, text_quant: str) -> dict[str, Component]:
    """The networks that a conversion will write.

    Raises:
        CheckpointError: what can be known to be wrong with the source from its small files and headers.
    """
    return {plan.component.name: plan.component for plan in _checked_plans(source, quant, text_quant)}


def _checked_plans(source: Source, quant: str, text_quant: str) -> list[_Plan]:
    quants = quantizations(check_quant(quant), check_quant(text_quant))
    source.check()
    plans = [_plan(source, name, quants[name]) for name in COMPONENTS if name in source.configs]
    _check_tensors(source, plans)
    _check_tokenizer(source)
    return plans


def _small_files(folder: Path) -> list[Path]:
    return [path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.suffix in (".json", ".jinja")]


def _plan(source: Source, name: str, quant: str) -> _Plan:
    bare = Component(name, source.configs[name], None, ())
    plain, rule_for = bare.infos, LAYOUT[COMPONENTS[name].part].rules[name](bare.config)
    rules = {key: rule_for(key, tensor.shape) for key, tensor in plain.items()}
    return _Plan(bare.quantized(quant), plain, rules)


def _check_tensors(source: Source, plans: list[_Plan]) -> None:
    """Compare the source with what the rules read, before anything is written."""
    for part, tensors in source.tensors.items():
        is_dropped, config = LAYOUT[part].is_dropped, source.configs[part]
        found = {key: tensor for key, tensor in tensors.infos.items() if not is_dropped(key, config)}
        expected = {
            key: TensorInfo(_float_of(found.get(key)), rule.source_shape(plan.plain[name].shape))
            for plan in plans
            if plan.part == part
            for name, rule in plan.rules.items()
            for key in rule.sources
        }
        raise_problems(f"{source.folder / part} is not a {source.variant.name} {part}", mismatches(expected, found))


def _float_of(found: TensorInfo | None) -> str:
    """The dtype that a tensor should have: its own, if that is read."""
    return found.dtype if found is not None and found.dtype in FLOATS.values() else FLOATS[mx.bfloat16]


def _check_tokenizer(source: Source) -> None:
    text = source.configs["text_encoder"]
    TOKENIZERS[text.model_type](source.folder / TOKENIZER, text.vocab_size)


def _part(source: Source, plan: _Plan) -> Part:
    def complaint(name: str) -> str:
        what = f"{source.folder / plan.part}: {', '.join(plan.rules[name].sources)} is not finite"
        return f"{what}: damaged, or too large when it was saved; fetch it again, or give another copy"

    converted = Finite(Converted(source.tensors[plan.part], plan.rules, plan.plain), complaint)
    return Part(plan.component, as_stored(converted, plan.component))
