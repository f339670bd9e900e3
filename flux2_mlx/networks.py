"""The networks of a pipeline, loaded so that a run stays within its memory limit."""

import gc
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, overload
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .checkpoint import Checkpoint, Component
from .components import COMPONENTS, PAINTING, network_dtype, quantizations
from .config import Variant
from .device import computing_dtype, memory_bytes
from .errors import CheckpointError, DeviceError
from .layers import WIDENED
from .loading import memory_dtype, tensor_bytes
from .memory import Costs, Footprint, Plan, Workload, Writing, plan, writing_plan
from .quantization import DEFAULT_TEXT_QUANT, loadable_quant, quantizing_bytes, stored_names
from .streaming import Reading, load_streamed
from .text import LanguageModel, PixtralVision, TextEncoder
from .transformer import Flux2Transformer
from .vae import VAE


@dataclass(frozen=True)
class Networks:
    """The networks of a checkpoint, quantized as asked for, and the bytes of memory that a run may take.

    With `keep` they stay in memory between runs as far as that is free: where all that is kept fits beside each phase.
    """

    checkpoint: Checkpoint
    quant: str
    text_quant: str
    dtype: mx.Dtype
    memory_limit: int
    keep: bool = False
    reading: Reading = field(default_factory=Reading)  # what all runs have streamed from disk
    _kept: "_Kept" = field(default_factory=lambda: _Kept(), init=False, compare=False, repr=False)

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
        keep: bool = False,
    ) -> "Networks":
        """The networks of a model.

        Args:
            model: a checkpoint; or a variant, for what it would be converted to, without files.
            quant: `bf16`, `qint8` or `qint4`, which the transformer becomes at loading where it is not stored so; None:
                as stored.
            text_quant: the same for the text encoder.
            dtype: `float32`, `bfloat16` or `float16` for activations; None: the device's own.
            memory_limit: bytes, or a size such as `"12GB"`; None: what the device can spare (see `device_memory`).
            text_only: a model without transformer and VAE will do.
            keep: whether networks stay in memory between runs where they fit beside each phase.

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
        return cls(model, quant, text_quant, computing_dtype(dtype), memory_bytes(memory_limit), keep)

    @overload
    def load(self, name: Literal["transformer"], planned: Plan | None = None) -> Flux2Transformer: ...
    @overload
    def load(self, name: Literal["text_encoder"], planned: Plan | None = None) -> TextEncoder: ...
    @overload
    def load(self, name: Literal["vision"], planned: Plan | None = None) -> PixtralVision: ...
    @overload
    def load(self, name: Literal["vae"], planned: Plan | None = None) -> VAE: ...
    def load(self, name: str, planned: Plan | None = None) -> nn.Module:
        """A network in memory, as far as the plan says so; one that was kept is there already."""
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

    def _load(self, name: str) -> Any:  # of the class that its row of the components says
        module = self._kept.get(name)
        if module is None:
            module = self.checkpoint.components[name].load(self.dtype_of(name), self._quants[name])
            self._kept.offer(name, module)
        return module

    def _load_streamed(self, name: str, resident: int) -> Any:  # so is this
        return load_streamed(self.checkpoint.components[name], self.dtype_of(name), resident, self.reading)

    @contextmanager
    def keeping(self, planned: Plan) -> Iterator[Plan]:
        """A run of `planned`, to be entered in its turn: the plan with what stays in memory after its phases.

        What is in memory from earlier runs and does not fit beside this one is released before it: of this pipeline,
        and then of others. After a failure of the device nothing is kept, so that another run has all the memory.
        """
        with self._kept.during(planned.keeping(self._worth_keeping(planned))) as planned:
            try:
                yield planned
            except (RuntimeError, DeviceError):
                self.release()
                raise

    def _worth_keeping(self, planned: Plan) -> dict[str, int]:
        """Bytes of the networks that may stay in memory: those of the run, and those that have stayed until now."""
        if not self.keep:
            return {}
        names = {name for phase in planned.phases for name in planned.networks(phase.name)} | set(self._kept.names)
        nbytes = {name: self._footprint(name).all for name in names if self._kept.may_stay(name)}
        order = sorted(nbytes, key=lambda name: (COMPONENTS[name].every_run, nbytes[name], name), reverse=True)
        return {name: nbytes[name] for name in order}

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory that networks take which have been kept."""
        return self._kept.nbytes

    def release(self) -> None:
        """Give back the memory of the networks that have been kept."""
        self._kept.clear()

    def dtype_of(self, name: str) -> mx.Dtype:
        """What a network computes in."""
        return network_dtype(name, self.dtype)

    def plan(self, work: Workload) -> Plan:
        """What a run holds in memory, phase by phase, and what it streams from disk."""
        return plan(self.checkpoint.model, self._footprints, self._costs, work, self.memory_limit)

    def writing_plan(self, writing: Writing) -> Plan:
        """What writing text holds in memory."""
        networks = {"language_model": self._footprint("text_encoder") + self._footprint("language_model")}
        vision = None
        if writing.pixels:
            networks["vision_tower"], vision = self._footprint("vision"), self._cost("vision")
        return writing_plan(networks, self._cost("language_model"), vision, writing, self.memory_limit)

    @property
    def paints(self) -> bool:
        """Whether images can be made, and not only text be written."""
        return self.checkpoint.components.keys() >= set(PAINTING)

    def stored_as(self, quant: str, text_quant: str) -> "Networks":
        """Those of the checkpoint converted to other quantizations, with nothing to quantize at loading."""
        wanted = replace(self, quant=quant, text_quant=text_quant)
        stored = {name: part.quantized(wanted._quants[name]) for name, part in self.checkpoint.components.items()}
        return replace(wanted, checkpoint=replace(self.checkpoint, components=stored))

    @cached_property
    def _footprints(self) -> dict[str, Footprint]:
        return {name: self._footprint(name) for name in PAINTING}

    @cached_property
    def _costs(self) -> Costs:
        return Costs(**{name: self._cost(name) for name in PAINTING})

    def _cost(self, name: str) -> Any:
        return COMPONENTS[name].cost(self.checkpoint.components[name].config, self.dtype_of(name))

    def _footprint(self, name: str) -> Footprint:
        stored = self.checkpoint.components[name]
        wanted = stored.quantized(self._quants[name])
        weights = footprint(wanted, self.dtype_of(name))
        beside = wanted.adapters.nbytes if wanted.adapters else 0
        if wanted == stored:
            return replace(weights, rest=weights.rest + beside)
        # What is quantized at loading would be so again at every pass, so it has to stay.
        loading = _quantizing(stored, wanted, weights.all)
        return replace(weights, rest=weights.all + beside, blocks=(), loading=loading)

    @property
    def _quants(self) -> dict[str, str]:
        return quantizations(self.quant, self.text_quant)


class _Kept:
    """Networks that stay in memory after their phase, as the plan of the latest run allows it."""

    def __init__(self) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._allowed: tuple[str, ...] = ()
        self._running: Plan | None = None

    def get(self, name: str) -> nn.Module | None:
        return self._modules.get(name)

    def offer(self, name: str, module: nn.Module) -> None:
        if name in self._allowed:
            self._modules[name] = module

    def may_stay(self, name: str) -> bool:
        """Whether the run that another one is made in, by a callback, allows it; True of a run by itself."""
        return self._running is None or name in self._running.kept

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._modules)

    @property
    def nbytes(self) -> int:
        modules = list(self._modules.values())
        return sum(array.nbytes for module in modules for array in dict(tree_flatten(module.parameters())).values())

    @contextmanager
    def during(self, planned: Plan) -> Iterator[Plan]:
        """A run in which nothing but what is planned to be kept is."""
        self._drop([name for name in self._modules if name not in planned.kept])
        others = [kept for kept in _PIPELINES if kept is not self]
        if planned.peak_memory + sum(kept.nbytes for kept in others) > planned.limit:
            for kept in others:
                kept.clear()
        _PIPELINES.add(self)
        self._allowed, around = planned.kept, self._running
        self._running = planned
        try:
            yield planned
        finally:
            self._running = around

    def clear(self) -> None:
        self._allowed = ()
        self._drop(list(self._modules))

    def _drop(self, names: list[str]) -> None:
        for name in names:
            self._modules.pop(name, None)
        if names:
            gc.collect()
            mx.clear_cache()


_PIPELINES: WeakSet[_Kept] = WeakSet()  # what is kept of any; whoever has the turn may look at it


def _quantizing(stored: Component, wanted: Component, whole: int) -> int:
    """What quantizing at loading takes above the `whole` network that it ends with."""
    packed, held, peak = wanted.infos, 0, 0
    weights = stored.infos.items()
    for name, tensor in sorted(weights, key=lambda weight: -weight[1].nbytes):  # the order that they are quantized in
        parts = stored_names(name, packed)
        if parts != [name]:
            nbytes = sum(packed[part].nbytes for part in parts)
            held += nbytes
            peak = max(peak, held + quantizing_bytes(tensor.shape, nbytes))
    return max(0, peak - whole)


def footprint(component: Component, dtype: mx.Dtype) -> Footprint:
    """What `component` takes in memory while activations are in `dtype`."""
    sizes, cast, widened, loading = Counter[str](), Counter[str](), Counter[str](), 0
    for name, tensor in component.infos.items():
        block = _block_of(component.name, name) or ""
        sizes[block] += tensor_bytes(name, tensor, dtype)
        if tensor.dtype == "U32":
            continue
        kept = memory_dtype(name, tensor.shape, dtype)
        if kept != mx.bfloat16:
            cast[block] += tensor.nbytes
            loading = max(loading, tensor.nbytes)
        if kept != dtype and not name.startswith("embed_tokens"):
            # Weights are widened one after the other, the scales of packed ones all at once where MLX evaluates them.
            count = math.prod(tensor.shape)
            if component.quantization:
                widened[_evaluated_with(name)] += dtype.size * count
            else:
                widened[name] = dtype.size * min(WIDENED, count)
    rest, _ = sizes.pop("", 0), cast.pop("", 0)
    blocks = tuple(sizes[block] for block in _blocks(component, sizes))
    return Footprint(rest, blocks, max(cast.values(), default=0), max(widened.values(), default=0), loading)


def _evaluated_with(name: str) -> str:
    """The layer, or else the part of a network, whose evaluation includes that of a weight."""
    layer = re.match(r"\D*\.\d+(?=\.)", name)
    return layer[0] if layer else name.split(".")[0]


def _block_of(component: str, name: str) -> str | None:
    """The block that a weight belongs to, such as `double_blocks.3`."""
    head, number, *_ = [*name.split("."), ""]
    return f"{head}.{number}" if head in COMPONENTS[component].streamed else None


def _blocks(component: Component, found: dict[str, int]) -> list[str]:
    order = COMPONENTS[component.name].streamed
    return sorted(found, key=lambda block: (order.index(block.split(".")[0]), int(block.split(".")[1])))
