"""The networks of a pipeline, loaded so that a run stays within its memory limit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, overload

import mlx.core as mx
import mlx.nn as nn

from .branches import AtWork, Branches
from .checkpoint import Checkpoint, Component
from .components import COMPONENTS, PAINTING, network_dtype, quantizations
from .config import Variant
from .device import begin_computing, computing_dtype, memory_bytes
from .errors import CheckpointError, DeviceError
from .footprints import loaded_footprint
from .kept import Kept, held
from .layers import Adapters, adapted
from .memory import Costs, Footprint, Plan, Workload, Writing, plan, writing_plan
from .quantization import DEFAULT_TEXT_QUANT, loadable_quant
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
    adapters: tuple[AtWork, ...] = ()
    _kept: Kept = field(default_factory=Kept, init=False, compare=False, repr=False)

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
        """A network with its adapters in memory, as far as the plan says so; one that was kept is there already."""
        begin_computing()
        component = self.checkpoint.components[name]
        if planned is not None and planned.phase(name).streamed:
            return self._load_streamed(component, planned.phase(name).resident)
        return adapted(self._load(name), component.adapters)

    def load_language_model(self, planned: Plan) -> LanguageModel:
        """The text encoder with the layers after its own, in memory as far as the plan says so. It has no adapters, as
        those are of its own layers only and made for images."""
        phase = planned.phase("language_model")
        if not phase.streamed:
            return LanguageModel(self._load("text_encoder"), self._load("language_model"))
        own, later = (self.checkpoint.components[name] for name in ("text_encoder", "language_model"))
        encoder = self._load_streamed(replace(own, adapters=None), phase.resident)
        resident = max(0, phase.resident - own.config.num_hidden_layers)
        return LanguageModel(encoder, self._load_streamed(later, resident), by_layer=True)

    def _load(self, name: str) -> Any:  # of the class that its row of the components says
        """A whole network without adapters, which may be kept."""
        module = self._kept.get(name)
        if module is None:
            plain = replace(self.checkpoint.components[name], adapters=None)
            module = plain.load(self.dtype_of(name), self._quants[name])
            self._kept.offer(name, module)
        return module

    def _load_streamed(self, component: Component, resident: int) -> Any:  # so is this
        return load_streamed(component, self.dtype_of(component.name), resident, self.reading)

    def with_adapters(self, adapters: Sequence[AtWork]) -> "Networks":
        """These networks with `adapters` and no others; what is kept in memory stays there."""
        return self._branched(adapters, {name: Branches.of(name, adapters) for name in self.checkpoint.components})

    def with_scale(self, factor: float) -> "Networks":
        """These networks with what adapters change times a factor. Both share all that is in memory."""
        adapters = [replace(one, scale=factor * one.scale) for one in self.adapters]
        components = self.checkpoint.components.items()
        return self._branched(
            adapters, {name: part.adapters and part.adapters.scaled(factor) for name, part in components}
        )

    def _branched(self, adapters: Sequence[AtWork], branches: Mapping[str, Adapters | None]) -> "Networks":
        """These networks with `branches`, by the names of networks."""
        components = {name: replace(x, adapters=branches[name]) for name, x in self.checkpoint.components.items()}
        checkpoint = replace(self.checkpoint, components=components)
        changed = replace(self, checkpoint=checkpoint, adapters=tuple(adapters))
        object.__setattr__(changed, "_kept", self._kept)  # it is no argument, as others share nothing
        return changed

    @contextmanager
    def keeping(self, planned: Plan) -> Iterator[Plan]:
        """A run of `planned`, to be entered in its turn: the plan with what stays in memory after its phases.

        What is in memory from earlier runs and does not fit beside this one is released before it: of this pipeline,
        and then of others. After a failure of the device nothing is kept, so that another run has all the memory. A
        run that a callback makes within another one releases nothing of that.
        """
        planned = planned.keeping(self._worth_keeping(planned))
        with self._kept.during(planned):
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
        nbytes = {name: self._added(name).all for name in names if self._kept.may_stay(name)}
        order = sorted(nbytes, key=lambda name: (COMPONENTS[name].every_run, nbytes[name], name), reverse=True)
        return {name: nbytes[name] for name in order}

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory of the networks that have been kept."""
        return self._kept.nbytes

    @property
    def planned_bytes(self) -> int:
        """Bytes that were in memory before the run that is going on, and that its plan counts: networks that were kept,
        and adapters; 0 for a run within another one."""
        return 0 if self._kept.is_nested else self._kept.nbytes + self.adapter_bytes

    def read_adapters(self) -> None:
        """Bring all arrays of adapters into memory."""
        mx.eval([part.adapters.arrays for part in self.checkpoint.components.values() if part.adapters])

    @property
    def adapter_bytes(self) -> int:
        """Bytes of memory that adapters take, all the time."""
        return sum(part.adapters.nbytes for part in self.checkpoint.components.values() if part.adapters)

    def release(self) -> None:
        """Give back the memory of the networks that have been kept."""
        self._kept.clear()

    def dtype_of(self, name: str) -> mx.Dtype:
        """The dtype that a network computes in."""
        return network_dtype(name, self.dtype)

    def plan(self, work: Workload) -> Plan:
        """What a run holds in memory, phase by phase, and what it streams from disk."""
        footprints = {name: self._added(name) for name in PAINTING}
        planned = plan(self.checkpoint.model, footprints, self._costs, work, self.memory_left)
        return planned.besides(self.adapter_bytes, self._memory_free)

    def writing_plan(self, writing: Writing) -> Plan:
        """What writing text holds in memory."""
        networks = {"language_model": self._added("text_encoder") + self._added("language_model")}
        vision = None
        if writing.pixels:
            networks["vision_tower"] = self._added("vision")
            vision = self._cost("vision")
        planned = writing_plan(networks, self._cost("language_model"), vision, writing, self.memory_left)
        return planned.besides(self.adapter_bytes, self._memory_free)

    @property
    def memory_left(self) -> int:
        """The memory limit without what adapters take and, in a callback, what the runs around it hold."""
        return max(0, self._memory_free - self.adapter_bytes)

    @property
    def _memory_free(self) -> int:
        return max(0, self.memory_limit - held())

    @property
    def paints(self) -> bool:
        """Whether images can be made, and not only text be written."""
        return self.checkpoint.components.keys() >= set(PAINTING)

    def stored_as(self, quant: str, text_quant: str) -> "Networks":
        """The networks of the checkpoint converted to other quantizations, with nothing to quantize at loading."""
        wanted = replace(self, quant=quant, text_quant=text_quant)
        stored = {name: part.quantized(wanted._quants[name]) for name, part in self.checkpoint.components.items()}
        return replace(wanted, checkpoint=replace(self.checkpoint, components=stored))

    @cached_property
    def _costs(self) -> Costs:
        return Costs(**{name: self._cost(name) for name in PAINTING})

    def _cost(self, name: str) -> Any:
        return COMPONENTS[name].cost(self.checkpoint.components[name].config, self.dtype_of(name))

    def _added(self, name: str) -> Footprint:
        """The footprint of a network, without the weights that the run which is going on keeps in memory."""
        weights = self._footprints[name]
        return Footprint(0, widened=weights.widened) if name in self._kept.in_use else weights

    @cached_property
    def _footprints(self) -> dict[str, Footprint]:
        components = self.checkpoint.components.items()
        return {name: loaded_footprint(stored, self._quants[name], self.dtype_of(name)) for name, stored in components}

    @property
    def _quants(self) -> dict[str, str]:
        return quantizations(self.quant, self.text_quant)
