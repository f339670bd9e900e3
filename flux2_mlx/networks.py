"""The networks of a pipeline: what they are, what they take, and loading them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, overload

import mlx.core as mx
import mlx.nn as nn

from .branches import AtWork, Branches
from .checkpoint import Checkpoint, Component
from .components import COMPONENTS, network_dtype, quantizations
from .config import Variant
from .decoders import Decoder
from .device import begin_computing, computing_dtype
from .errors import CheckpointError, DeviceError
from .footprints import loaded_footprint
from .kept import Kept
from .layers import Adapters, adapted
from .loading import Footprint
from .memory import Needs, PhasePlan, Workload, Writing, WritingNeeds
from .quantization import check_loadable, quants_from, wanted_quants
from .streaming import Reading, load_streamed
from .text import LanguageModel, PixtralVision, TextEncoder
from .transformer import Flux2Transformer
from .vae import VAE


@dataclass(frozen=True)
class Networks:
    """The networks of a checkpoint, quantized as asked for, with adapters beside their layers.

    What changes their adapters shares what is kept of them in memory; what quantizes them otherwise shares nothing.
    """

    checkpoint: Checkpoint
    quant: str
    text_quant: str
    dtype: mx.Dtype
    adapters: tuple[AtWork, ...] = ()
    reading: Reading = field(default_factory=Reading, repr=False)  # what all runs have streamed from disk
    kept: Kept = field(default_factory=Kept, compare=False, repr=False)  # what stays in memory between runs

    @classmethod
    def open(
        cls,
        model: Checkpoint | Variant,
        *,
        quant: str | None = None,
        text_quant: str | None = None,
        dtype: str | None = None,
        text_only: bool = False,
        decoder: Decoder | None = None,
    ) -> "Networks":
        """The networks of a model.

        Args:
            model: a checkpoint; or a variant, for what it would be converted to, without files.
            quant: one of `QUANTIZATIONS`, which the transformer becomes at loading where it is not stored so; None:
                as stored.
            text_quant: the same for the text encoder.
            dtype: `float32`, `bfloat16` or `float16` for activations; None: the device's own.
            text_only: a model without transformer and VAE will do.
            decoder: makes images in place of the model's own; None: that one.

        Raises:
            InputError: a setting is wrong, or what is stored can't become that. CheckpointError: the checkpoint can't
                make images.
        """
        if isinstance(model, Variant):
            model = Checkpoint.outline(model, *wanted_quants(quant, text_quant))
        if not text_only and not model.paints:
            raise CheckpointError(f"{model.folder} holds a language model only; it can't make images")
        model = model if decoder is None else decoder.decoding(model)
        quant, text_quant = quants_from(model.quants, quant, text_quant)
        check_loadable(model.quants, (quant, text_quant))
        return cls(model, quant, text_quant, computing_dtype(dtype))

    @overload
    def load(self, name: Literal["transformer"], planned: PhasePlan | None = None) -> Flux2Transformer: ...
    @overload
    def load(self, name: Literal["text_encoder"], planned: PhasePlan | None = None) -> TextEncoder: ...
    @overload
    def load(self, name: Literal["vision"], planned: PhasePlan | None = None) -> PixtralVision: ...
    @overload
    def load(self, name: Literal["vae"], planned: PhasePlan | None = None) -> VAE: ...
    def load(self, name: str, planned: PhasePlan | None = None) -> nn.Module:
        """A network with its adapters in memory, as far as what is `planned` for its phase says so; one that was kept
        is there already."""
        begin_computing()
        component = self.checkpoint.components[name]
        if planned is not None and planned.streamed:
            return self._load_streamed(component, planned.resident)
        return adapted(self._load(name), component.adapters)

    def load_language_model(self, planned: PhasePlan) -> LanguageModel:
        """The text encoder with the layers after its own, in memory as far as the plan says so. It has no adapters, as
        those are of its own layers only and made for images."""
        if not planned.streamed:
            return LanguageModel(self._load("text_encoder"), self._load("language_model"))
        own, later = (self.checkpoint.components[name] for name in ("text_encoder", "language_model"))
        encoder = self._load_streamed(replace(own, adapters=None), planned.resident)
        resident = max(0, planned.resident - own.config.num_hidden_layers)
        return LanguageModel(encoder, self._load_streamed(later, resident), by_layer=True)

    def _load(self, name: str) -> Any:  # of the class that its row of the components says
        """A whole network without adapters, which may be kept."""
        module = self.kept.get(name)
        if module is None:
            plain = replace(self.checkpoint.components[name], adapters=None)
            module = plain.load(self.dtype_of(name), self._quants[name])
            self.kept.offer(name, module)
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

    def of_run(self) -> "Networks":
        """These networks for one run, whose step decides which adapters are at work: a run that a callback makes within
        it is at another step."""
        return self.with_scale(1.0) if any(one.steps is not None for one in self.adapters) else self

    def _branched(self, adapters: Sequence[AtWork], branches: Mapping[str, Adapters | None]) -> "Networks":
        """These networks with `branches`, by the names of networks."""
        components = {name: replace(x, adapters=branches[name]) for name, x in self.checkpoint.components.items()}
        checkpoint = replace(self.checkpoint, components=components)
        return replace(self, checkpoint=checkpoint, adapters=tuple(adapters))

    @contextmanager
    def keeping(self, names: Sequence[str], spare: int) -> Iterator[None]:
        """A run, to be entered in its turn, after whose phases these networks stay in memory.

        What is in memory from earlier runs and does not fit beside this one is released before it: of this pipeline,
        and then of others, unless the run leaves `spare` bytes for what these keep. After a failure of the device
        nothing is kept, so that another run has all the memory. A run that a callback makes within another one
        releases nothing of that.
        """
        with self.kept.during(names, spare):
            try:
                yield
            except (RuntimeError, DeviceError):
                self.release()
                raise

    @property
    def may_stay(self) -> dict[str, int]:
        """Bytes of the networks that the next run may keep in memory, those first that are worth most."""
        nbytes = {name: self._added(name).all for name in self._footprints if self.kept.may_stay(name)}
        order = sorted(nbytes, key=lambda name: (COMPONENTS[name].every_run, nbytes[name], name), reverse=True)
        return {name: nbytes[name] for name in order}

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory of the networks that have been kept."""
        return self.kept.nbytes

    @property
    def planned_bytes(self) -> int:
        """Bytes that were in memory before the run that is going on, and that its plan counts: networks that were kept,
        and adapters; 0 for a run within another one."""
        return 0 if self.kept.is_nested else self.kept.nbytes + self.adapter_bytes

    def read_adapters(self) -> None:
        """Bring all arrays of adapters into memory."""
        mx.eval([part.adapters.arrays for part in self.checkpoint.components.values() if part.adapters])

    @property
    def adapter_bytes(self) -> int:
        """Bytes of memory that adapters take, all the time."""
        return sum(part.adapters.nbytes for part in self.checkpoint.components.values() if part.adapters)

    def release(self) -> None:
        """Give back the memory of the networks that have been kept."""
        self.kept.clear()

    def dtype_of(self, name: str) -> mx.Dtype:
        """The dtype that a network computes in."""
        return network_dtype(name, self.dtype)

    def needs(self, work: Workload) -> Needs:
        """What a run that makes images takes, which can be planned within a limit."""
        return Needs(self.checkpoint.fitted_variant, self._all_added, self._costs, work, self.adapter_bytes)

    def writing_needs(self, work: Writing) -> WritingNeeds:
        """What writing text takes, which can be planned within a limit."""
        return WritingNeeds(self._all_added, self._costs, work, self.adapter_bytes)

    @property
    def paints(self) -> bool:
        """Whether images can be made, and not only text be written."""
        return self.checkpoint.paints

    def stored_as(self, quant: str, text_quant: str) -> "Networks":
        """The networks of the checkpoint converted to other quantizations, with nothing to quantize at loading."""
        wanted = self.quantized(quant, text_quant)
        stored = {name: part.quantized(wanted._quants[name]) for name, part in self.checkpoint.components.items()}
        return replace(wanted, checkpoint=replace(self.checkpoint, components=stored))

    def quantized(self, quant: str, text_quant: str) -> "Networks":
        """The networks of the checkpoint as they are, quantized otherwise at loading."""
        return replace(self, quant=quant, text_quant=text_quant, reading=Reading(), kept=Kept())

    @cached_property
    def _costs(self) -> dict[str, Any]:
        """What each network takes beside its weights, of the class that its row of the components says."""
        components = self.checkpoint.components.items()
        return {
            name: COMPONENTS[name].cost(stored.config, self.dtype_of(name), self._quants[name] != "bf16")
            for name, stored in components
        }

    @property
    def _all_added(self) -> dict[str, Footprint]:
        return {name: self._added(name) for name in self._footprints}

    def _added(self, name: str) -> Footprint:
        """The footprint of a network, without the weights that the run which is going on keeps in memory."""
        weights = self._footprints[name]
        return Footprint(0, widened=weights.widened) if name in self.kept.in_use else weights

    @cached_property
    def _footprints(self) -> dict[str, Footprint]:
        components = self.checkpoint.components.items()
        return {name: loaded_footprint(stored, self._quants[name], self.dtype_of(name)) for name, stored in components}

    @property
    def _quants(self) -> dict[str, str]:
        return quantizations(self.quant, self.text_quant)
