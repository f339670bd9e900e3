"""From an opened source to an MLX checkpoint, tensor by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import mlx.core as mx

from flux2_mlx.checkpoint import FORMAT_VERSION, Component, module_tensors
from flux2_mlx.components import COMPONENTS, quantizations
from flux2_mlx.config import Config
from flux2_mlx.errors import CheckpointError
from flux2_mlx.quantization import BITS, DEFAULT_TEXT_QUANT, check_quant, quantize_array
from flux2_mlx.text import TOKENIZER_FILES, TOKENIZERS
from flux2_mlx.weights import TensorInfo, mismatches, raise_problems

from . import text, transformer, vae
from .blobs import blobs, check_blob
from .folder import Inspection, Layer, Part, check_target, write_folder
from .rules import Rule, Shape
from .sources import FLOATS, TOKENIZER, Source

_DROPPED = {"transformer": transformer.is_dropped, "text_encoder": text.is_dropped, "vae": vae.is_dropped}


@dataclass(frozen=True)
class _Layer:
    """A tensor of ours before quantization: how it is made, and the tensors that it is stored as."""

    plain: TensorInfo
    rule: Rule
    stored: dict[str, TensorInfo]


@dataclass(frozen=True)
class _Plan:
    """What is written for one component."""

    component: Component
    bits: int | None
    layers: list[_Layer]


def write_checkpoint(
    source: Source,
    target: Path,
    quant: str = "bf16",
    text_quant: str | None = None,
    *,
    name: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
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
        "quantization": {"transformer": quant, "text_encoder": text_quant},
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
    component = bare.quantized(quant)
    plain, stored = module_tensors(bare.build()), module_tensors(component.build())
    layers = []
    for key, tensor in plain.items():
        rule = _rule(name, key, tensor.shape, bare.config)
        layers.append(_Layer(tensor, rule, {k: stored[k] for k in stored_names(key, stored)}))
    return _Plan(component, BITS[quant], layers)


def stored_names(name: str, stored: dict[str, TensorInfo]) -> list[str]:
    """The tensors that our tensor `name` is kept as, of those that are `stored`."""
    base = name.removesuffix(".weight")
    return [name, f"{base}.scales", f"{base}.biases"] if f"{base}.scales" in stored else [name]


def _rule(component: str, name: str, shape: Shape, config: Config) -> Rule:
    if component == "language_model":
        return text.later_rule_for(name, shape, config.num_hidden_layers)
    rules = {
        "transformer": transformer.rule_for,
        "text_encoder": text.rule_for,
        "vision": text.vision_rule_for,
        "vae": vae.rule_for,
    }
    return rules[component](name, shape)


def _check_tensors(source: Source, plans: list[_Plan]) -> None:
    """Compare the source with what the rules read, before anything is written."""
    for part, tensors in source.tensors.items():
        found = {k: x for k, x in tensors.items() if not _DROPPED[part](k, source.configs[part])}
        expected = {
            key: TensorInfo(
                found[key].dtype if key in found and found[key].dtype in FLOATS else "BF16",
                layer.rule.source_shape(layer.plain.shape),
            )
            for plan in plans
            if COMPONENTS[plan.component.name].part == part
            for layer in plan.layers
            for key in layer.rule.sources
        }
        raise_problems(f"{source.folder / part} is not a {source.variant.name} {part}", mismatches(expected, found))


def _check_tokenizer(source: Source) -> None:
    text = source.configs["text_encoder"]
    TOKENIZERS[text.model_type](source.folder / TOKENIZER, text.vocab_size)


def _part(source: Source, plan: _Plan) -> Part:
    return Part(plan.component, [Layer(layer.stored, partial(_arrays, source, plan, layer)) for layer in plan.layers])


def _arrays(source: Source, plan: _Plan, layer: _Layer) -> Iterator[mx.array]:
    """The stored arrays of a layer in the order of `layer.stored`, evaluated."""
    parts = [source.take(COMPONENTS[plan.component.name].part, key) for key in layer.rule.sources]
    mx.eval(parts)  # or the device would wait for the file
    array = layer.rule.apply(*parts).astype(mx.bfloat16)
    parts.clear()
    if not mx.isfinite(array).all().item():
        part = source.folder / COMPONENTS[plan.component.name].part
        what = f"{part}: {', '.join(layer.rule.sources)} is not finite"
        raise CheckpointError(f"{what}: damaged, or too large when it was saved; fetch it again, or give another copy")
    yield from stored_arrays(array, layer.stored, plan.bits)


def stored_arrays(array: mx.array, stored: dict[str, TensorInfo], bits: int | None) -> Iterator[mx.array]:
    """A bfloat16 `array` of ours as the tensors that it is `stored` as, in their order."""
    if len(stored) == 1:
        yield array
    else:
        quantized = quantize_array(array, bits)
        yield from (quantized[key.rpartition(".")[2]] for key in stored)
