"""The networks of a pipeline, loaded so that a run stays within its memory limit."""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .checkpoint import PAINTING, Checkpoint
from .memory import Plan, check_plan, check_references, plan
from .references import Edit
from .sampling import Request
from .streaming import Footprint, footprint, load_streamed


@dataclass(frozen=True)
class Networks:
    """The networks of a checkpoint, quantized as asked for, and the bytes of memory that a run may take."""

    checkpoint: Checkpoint
    quant: str
    text_quant: str
    dtype: mx.Dtype
    memory_limit: int

    def load(self, name: str, planned: Plan | None = None) -> nn.Module:
        """A network in memory, as far as the plan says so."""
        component = self.checkpoint.components[name]
        if planned is not None and planned.phase(name).streamed:
            return load_streamed(component, self.dtype, planned.phase(name).resident)
        return component.load(self.dtype, self._quant(name))

    def plan(self, request: Request, edit: Edit = Edit()) -> Plan:  # noqa: B008 (it is frozen)
        """What a run holds in memory, phase by phase, and what it streams from disk."""
        return plan(
            self.checkpoint.model,
            {name: self._footprint(name) for name in PAINTING},
            request.width,
            request.height,
            self.dtype,
            self.memory_limit,
            length=request.max_sequence_length,
            references=edit.token_counts(self._token_size),
        )

    def checked_plan(self, request: Request, edit: Edit) -> Plan:
        """The plan; InputError if the run does not fit into memory."""
        planned, references = self.plan(request, edit), edit.token_counts(self._token_size)
        if references and not planned.fits:
            size, weights = self._token_size, self._footprint("transformer").least
            tokens = request.max_sequence_length + math.prod((request.width // size, request.height // size))
            config = self.checkpoint.model.transformer
            check_references(config, weights, self.dtype.size, self.memory_limit, tokens, references, size)
        check_plan(planned)
        return planned

    @property
    def _token_size(self) -> int:
        return self.checkpoint.model.vae.token_size

    def _quant(self, name: str) -> str:
        return {"transformer": self.quant, "text_encoder": self.text_quant, "vae": "bf16"}[name]

    def _footprint(self, name: str) -> Footprint:
        stored = self.checkpoint.components[name]
        wanted = stored.quantized(self._quant(name))
        weights = footprint(wanted, self.dtype)
        # What is quantized at loading would be so again at every pass, so it has to stay.
        return weights if wanted == stored else Footprint(weights.all)
