"""The networks of a pipeline, loaded so that a run stays within its memory limit."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .checkpoint import Checkpoint, Component
from .components import PAINTING, network_dtype, quantizations
from .config import QUANTIZATIONS, Variant
from .device import computing_dtype, memory_bytes
from .errors import CheckpointError, InputError
from .loading import module_tensors
from .memory import Plan, Workload, Writing, plan, writing_plan
from .quantization import DEFAULT_TEXT_QUANT, loadable_quant, quantizing_bytes
from .references import MIN_SIDE, Edit
from .request import Request
from .streaming import Footprint, Reading, footprint, load_streamed
from .text import LanguageModel

_SMALLER_TEXT = "choose a smaller model, one converted with --text-quant qint4, or a higher limit"


@dataclass(frozen=True)
class Networks:
    """The networks of a checkpoint, quantized as asked for, and the bytes of memory that a run may take."""

    checkpoint: Checkpoint
    quant: str
    text_quant: str
    dtype: mx.Dtype
    memory_limit: int
    reading: Reading = field(default_factory=Reading)  # what all runs have streamed from disk

    @classmethod
    def open(
        cls,
        model: Checkpoint | Variant,
        *,
        quant: str | None = None,
        text_quant: str | None = None,
        dtype: str | None = None,
        memory_limit: int | str | None = None,
        text_only: bool = False,
    ) -> "Networks":
        """The networks of a model.

        Args:
            model: a checkpoint; or a variant, for what it would be converted to, without files.
            quant: `bf16`, `qint8` or `qint4`, which the transformer becomes at loading where it is not stored so; None:
                as stored.
            text_quant: the same for the text encoder.
            dtype: `float32`, `bfloat16` or `float16` for activations; None: the device's own.
            memory_limit: bytes, or a size such as `"12GB"`; None: what the device has.
            text_only: a model without transformer and VAE will do.

        Raises:
            InputError: a setting is wrong, or what is stored can't become that. CheckpointError: the checkpoint can't
                make images.
        """
        if isinstance(model, Variant):
            wanted = quant or "bf16"
            model = Checkpoint.outline(model, wanted, text_quant or DEFAULT_TEXT_QUANT[wanted])
        if not text_only and not model.components.keys() >= set(PAINTING):
            raise CheckpointError(f"{model.folder} holds a language model only; it can't make images")
        if quant is not None and text_quant is None and model.text_quant == "bf16":
            text_quant = DEFAULT_TEXT_QUANT[quant]
        quant = loadable_quant("transformer", model.quant, quant)
        text_quant = loadable_quant("text encoder", model.text_quant, text_quant)
        return cls(model, quant, text_quant, computing_dtype(dtype), memory_bytes(memory_limit))

    def load(self, name: str, planned: Plan | None = None) -> nn.Module:
        """A network in memory, as far as the plan says so."""
        if planned is not None and planned.phase(name).streamed:
            return self._load_streamed(name, planned.phase(name).resident)
        return self._load(name)

    def load_language_model(self, planned: Plan) -> LanguageModel:
        """The text encoder with the layers after its own, in memory as far as the plan says so."""
        phase, own = planned.phase("language_model"), self.checkpoint.components["text_encoder"].config
        if not phase.streamed:
            return LanguageModel(self._load("text_encoder"), self._load("language_model"))
        later = max(0, phase.resident - own.num_hidden_layers)
        encoder = self._load_streamed("text_encoder", phase.resident)
        return LanguageModel(encoder, self._load_streamed("language_model", later), by_layer=True)

    def _load(self, name: str) -> nn.Module:
        return self.checkpoint.components[name].load(self.dtype_of(name), self._quants[name])

    def _load_streamed(self, name: str, resident: int) -> nn.Module:
        return load_streamed(self.checkpoint.components[name], self.dtype_of(name), resident, self.reading)

    def dtype_of(self, name: str) -> mx.Dtype:
        """What a network computes in."""
        return network_dtype(name, self.dtype)

    def plan(self, request: Request, edit: Edit = Edit(), **beside: Any) -> Plan:  # noqa: B008 (it is frozen)
        """What a run holds in memory, phase by phase, and what it streams from disk.

        Args:
            request: the settings.
            edit: the pictures.
            beside: `previews`, whether there are images between the steps, and `texts`, how many prompts and negative
                prompts there are, and of how many tokens, if they are not the request's.
        """
        return self._plan(_workload(request, edit, **beside))

    def checked_plan(self, request: Request, edit: Edit, **beside: Any) -> Plan:
        """The plan; InputError that says what would fit if the run does not fit into memory."""
        planned = self.plan(request, edit, **beside)
        if not planned.fits:
            raise _refusal(planned, self.advice(request, edit, **beside))
        return planned

    def check_possible(self) -> None:
        """InputError if not even the smallest image fits into memory or, of a language model alone, a word."""
        if self.checkpoint.components.keys() >= set(PAINTING):
            size = self.checkpoint.model.vae.token_size
            request = Request.checked(self.checkpoint.model, size, [""], width=size, height=size)
            self.checked_plan(request, Edit())
        elif "language_model" in self.checkpoint.components:
            self.checked_writing_plan(Writing(1, 1))

    def checked_phase_plan(self, request: Request, name: str) -> Plan:
        """What encoding the prompts or decoding an image holds in memory alone; InputError if that does not fit."""
        planned = self.plan(request).only(name)
        if not planned.fits:
            raise _refusal(planned, "choose a smaller image or a higher limit" if name == "vae" else _SMALLER_TEXT)
        return planned

    def checked_writing_plan(self, writing: Writing) -> Plan:
        """What writing text holds in memory; InputError if that does not fit."""
        components = self.checkpoint.components
        networks = {"language_model": self._footprint("text_encoder") + self._footprint("language_model")}
        vision = None
        if writing.pixels:
            networks["vision_tower"], vision = self._footprint("vision"), components["vision"].config
        text, dtype = components["text_encoder"].config, self.dtype_of("language_model")
        planned = writing_plan(text, vision, networks, writing, dtype, self.memory_limit)
        if not planned.fits:
            raise _refusal(planned, _SMALLER_TEXT)
        return planned

    def _plan(self, work: Workload) -> Plan:
        return plan(self.checkpoint.model, self._footprints, work, self.dtype, self.memory_limit)

    def advice(self, request: Request, edit: Edit = Edit(), **beside: Any) -> str:  # noqa: B008 (it is frozen)
        """What would fit instead of a run that does not: the same with less beside it, smaller pictures, fewer bits."""
        work = _workload(request, edit, **beside)
        if not self._built_in and self._stored_as(self.quant, self.text_quant)._plan(work).fits:
            return f"convert the model with -q {self.quant} --text-quant {self.text_quant}, which lets it be streamed"
        if work.previews and self._plan(replace(work, previews=False)).fits:
            return "without images between the steps it would fit"

        def images(count: int) -> Workload:
            prompts, negatives = min(count, work.prompts), min(count, work.negatives)
            return replace(work, images=count, prompts=prompts, negatives=negatives)

        if count := self._largest(images, 1, work.images):
            return f"{count} at a time would fit"
        if pictures := self._smaller_pictures(work, edit.canvas is not None):
            return f"{pictures} would fit"
        if bits := self._fewer_bits(work):
            return f"no size fits, but {bits} it would"
        return "no size fits; choose a smaller model or a higher limit"

    def _smaller_pictures(self, work: Workload, is_painted_over: bool) -> str | None:
        """The largest references, or else the largest image, or else the largest of both, with which the run fits."""
        token, count = self.checkpoint.model.vae.token_size, len(work.references)

        def references(side: int) -> Workload:
            return replace(work, references=((side, side),) * count)

        def image(side: int) -> Workload:
            width, height = _within((work.width, work.height), side, token)
            return replace(work, width=width, height=height)

        def both(side: int) -> Workload:
            return replace(image(side), references=tuple(_within(size, side, token) for size in work.references))

        sides = [max(size) for size in work.references]
        if not is_painted_over and (side := self._largest(references, MIN_SIDE, max(sides, default=0), token)):
            return f"{f'{count} references' if count > 1 else 'a reference'} of {side}×{side} pixels"
        if not is_painted_over and (side := self._largest(image, token, max(work.width, work.height), token)):
            smaller = image(side)
            return f"an image of {smaller.width}×{smaller.height}"
        # No reference may be narrower than the least that there may be.
        least = max((math.ceil(MIN_SIDE * max(size) / min(size)) for size in work.references), default=MIN_SIDE)
        if work.references and (side := self._largest(both, -(-least // token) * token, max(sides), token)):
            return f"pictures and an image of at most {side} pixels a side"
        return None

    def _fewer_bits(self, work: Workload) -> str | None:
        """The options of the mildest quantization with which the run fits."""
        left = [QUANTIZATIONS[QUANTIZATIONS.index(quant) :] for quant in (self.quant, self.text_quant)]
        for quant, text_quant in sorted(product(*left), key=lambda pair: sorted(map(QUANTIZATIONS.index, pair))[::-1]):
            other = replace(self, quant=quant, text_quant=text_quant)
            if (other if self._built_in else self._stored_as(quant, text_quant))._plan(work).fits:
                return f"{'' if self._built_in else 'converted '}with -q {quant} --text-quant {text_quant}"
        return None

    @property
    def _built_in(self) -> bool:
        return self.checkpoint.source.get("name") == "demo"

    def _largest(self, work_of: Callable[[int], Workload], least: int, most: int, step: int = 1) -> int:
        """The largest multiple of `step` from `least` to `most` with which the run fits; 0 if there is none."""
        low, high = least // step - 1, most // step
        if high * step < least or not self._plan(work_of(least)).fits:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._plan(work_of(middle * step)).fits else (low, middle - 1)
        return low * step

    def _stored_as(self, quant: str, text_quant: str) -> "Networks":
        """The same with nothing to quantize at loading."""
        wanted = replace(self, quant=quant, text_quant=text_quant)
        stored = {name: part.quantized(wanted._quants[name]) for name, part in self.checkpoint.components.items()}
        return replace(wanted, checkpoint=replace(self.checkpoint, components=stored))

    @cached_property
    def _footprints(self) -> dict[str, Footprint]:
        return {name: self._footprint(name) for name in PAINTING}

    def _footprint(self, name: str) -> Footprint:
        stored = self.checkpoint.components[name]
        wanted = stored.quantized(self._quants[name])
        weights = footprint(wanted, self.dtype_of(name))
        if wanted.adapters is not None:
            weights = replace(weights, rest=weights.rest + wanted.adapters.nbytes)
        if wanted == stored:
            return weights
        # What is quantized at loading would be so again at every pass, so it has to stay.
        return replace(weights, rest=weights.all, blocks=(), loading=_quantizing(stored, wanted, weights.all))

    @property
    def _quants(self) -> dict[str, str]:
        return quantizations(self.quant, self.text_quant)


def _quantizing(stored: Component, wanted: Component, whole: int) -> int:
    """What quantizing at loading takes above the `whole` network that it ends with."""
    packed, held, peak = module_tensors(wanted.build()), 0, 0
    weights = module_tensors(stored.build()).items()
    for name, tensor in sorted(weights, key=lambda weight: -weight[1].nbytes):  # the order that they are quantized in
        parts = [packed.get(f"{name.removesuffix('.weight')}.{part}") for part in ("weight", "scales", "biases")]
        if all(parts):
            nbytes = sum(part.nbytes for part in parts)
            held += nbytes
            peak = max(peak, held + quantizing_bytes(tensor.shape, nbytes))
    return max(0, peak - whole)


def _within(size: tuple[int, int], side: int, token: int) -> tuple[int, int]:
    """A size of the same shape, of at most `side` pixels a side, in whole tokens."""
    scale = min(1, side / max(size))
    width, height = (max(token, int(x * scale) // token * token) for x in size)
    return width, height


def _workload(
    request: Request, edit: Edit, *, previews: bool = False, texts: tuple[int, int, int] | None = None
) -> Workload:
    own = len(set(request.prompts)), max(1, len(set(request.negative_prompts))), request.max_sequence_length
    prompts, negatives, length = texts or own
    return Workload(
        request.width,
        request.height,
        length,
        tuple(image.size for image in edit.references),
        prompts,
        len(request.seeds),
        previews,
        negatives,
    )


def _refusal(planned: Plan, advice: str) -> InputError:
    name = planned.worst.name.replace("_", " ").replace("vae", "VAE")
    needed, limit = (_shown(x, planned.peak_memory - planned.limit) for x in (planned.peak_memory, planned.limit))
    return InputError(f"the {name} needs {needed}, the limit is {limit}; {advice}")


def _shown(nbytes: int, difference: int) -> str:
    """In GiB, or MiB below 0.1 GiB, with as many digits as a difference from another number of bytes needs."""
    value, unit = (nbytes / 2**30, "GiB") if nbytes > 2**30 / 10 else (nbytes / 2**20, "MiB")
    return f"{value:.3g} {unit}" if difference > 0.01 * nbytes else f"{value:.10g} {unit}"
