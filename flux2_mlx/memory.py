"""How much memory a run needs phase by phase, and what fits."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .config import TextConfig, TransformerConfig, Variant
from .errors import InputError
from .layers import on_metal, score_bytes
from .streaming import Footprint
from .vae import activation_bytes as vae_activation_bytes

# Bytes for each token and channel while a block is at work, measured: arrays in the activations' dtype, and the
# rotation of queries and keys, which is in float32.
_ARRAYS = 7.5
_ROTATION_BYTES = 66
# Arrays as wide as the stream and as the MLP that a layer of the text encoder holds, the states it keeps included.
_TEXT_ARRAYS, _TEXT_MLP_ARRAYS = 11.2, 3


@dataclass(frozen=True)
class PhasePlan:
    """What a phase is expected to hold, in bytes. The first `resident` blocks stay in memory; `streamed` bytes of the
    others are read from disk at every pass."""

    name: str
    weights: int
    activations: int
    resident: int = 0
    streamed: int = 0

    @property
    def peak_memory(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True)
class Plan:
    """The phases of a run and the memory that there is, in bytes. Networks of different phases are never in memory
    together."""

    phases: tuple[PhasePlan, ...]
    limit: int

    @property
    def peak_memory(self) -> int:
        return max(phase.peak_memory for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak_memory <= self.limit

    def phase(self, name: str) -> PhasePlan:
        return next(phase for phase in self.phases if phase.name == name)


def plan(
    variant: Variant,
    networks: dict[str, Footprint],
    width: int,
    height: int,
    dtype: mx.Dtype,
    limit: int,
    *,
    length: int | None = None,
    references: Sequence[int] = (),
) -> Plan:
    """What making one image takes if as much as fits into `limit` stays in memory.

    Args:
        variant: the model.
        networks: the weights of `text_encoder`, `transformer` and `vae` in memory.
        width: pixels.
        height: pixels.
        dtype: of the activations.
        limit: bytes that there are.
        length: text tokens; None: the variant's.
        references: tokens of each reference image.
    """
    size, length = variant.vae.token_size, length or variant.max_sequence_length
    tokens = length + (width // size) * (height // size) + sum(references)
    # Text states of one or, for classifier-free guidance, two prompts, before and after their projection.
    states = (1 + variant.uses_cfg) * length * (variant.text.output_size + variant.transformer.hidden_size) * dtype.size
    activations = {
        "text_encoder": text_activation_bytes(variant.text, length, dtype.size),
        "transformer": states + activation_bytes(variant.transformer, tokens, dtype.size),
        "vae": vae_activation_bytes(variant.vae, height, width, dtype)[1],
    }
    return Plan(tuple(_phase(name, networks[name], peak, limit) for name, peak in activations.items()), limit)


def _phase(name: str, network: Footprint, activations: int, limit: int) -> PhasePlan:
    resident = network.resident(limit - activations)
    return PhasePlan(name, network.held(resident), activations, resident, sum(network.blocks[resident:]))


def check_plan(planned: Plan) -> None:
    """Raise InputError if the plan exceeds its limit with everything streamed that can be."""
    worst = max(planned.phases, key=lambda phase: phase.peak_memory)
    if worst.peak_memory > planned.limit:
        raise InputError(
            f"the {worst.name.replace('_', ' ')} needs {worst.peak_memory / 2**30:.2f} GiB, the limit is "
            f"{planned.limit / 2**30:.2f} GiB; make the image smaller, choose -q qint4 or raise the limit"
        )


def text_activation_bytes(config: TextConfig, tokens: int, itemsize: int) -> int:
    """Peak of encoding one prompt of so many tokens, padding included, above the encoder's weights."""
    arrays = _TEXT_ARRAYS * config.hidden_size + _TEXT_MLP_ARRAYS * config.intermediate_size
    return int(itemsize * tokens * arrays) + score_bytes(config.num_attention_heads, tokens, itemsize)


def activation_bytes(config: TransformerConfig, tokens: int, itemsize: int) -> int:
    """Peak of a denoising pass above the transformer's weights.

    Args:
        config: the geometry.
        tokens: of text, image and references, times the images of the pass.
        itemsize: bytes of an activation.
    """
    arrays = int(tokens * config.hidden_size * (_ARRAYS * itemsize + _ROTATION_BYTES))
    return arrays + score_bytes(config.num_attention_heads, tokens, itemsize)


def max_tokens(config: TransformerConfig, weights: int, itemsize: int, memory: int) -> int:
    """The most tokens whose pass fits into `memory` bytes beside the weights; 0 if none do."""
    low, high = 0, 2**24
    while low < high:
        middle = (low + high + 1) // 2
        fits = weights + activation_bytes(config, middle, itemsize) <= memory
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def parse_memory(text: str | int) -> int:
    """Bytes of a size such as `12GB`, `7.5GiB` or `800MB`; InputError if it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise InputError(f"memory must be a size such as 12GB or 7.5GiB, got {text!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def device_memory() -> int:
    """Bytes that networks can have: what Metal recommends on an Apple GPU, else the physical memory."""
    if on_metal():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_references(
    config: TransformerConfig, weights: int, itemsize: int, memory: int, tokens: int, references: list[int], size: int
) -> None:
    """Raise InputError if a pass with references does not fit into memory, saying what would.

    Args:
        config: the transformer's geometry.
        weights: its bytes in memory.
        itemsize: bytes of an activation.
        memory: bytes that are there.
        tokens: of the text and the image.
        references: tokens of each reference.
        size: pixels of a token along one side.
    """
    needed = weights + activation_bytes(config, tokens + sum(references), itemsize)
    if needed <= memory:
        return
    room = max_tokens(config, weights, itemsize, memory) - tokens
    side = size * math.isqrt(max(0, room) // len(references))
    count = f"{len(references)} references" if len(references) > 1 else "the reference"
    advice = f"{count} of {side}×{side} pixels would fit" if side >= 64 else "not even small ones would fit"
    raise InputError(
        f"references of {sum(references)} tokens need {needed / 2**30:.1f} GiB, this machine has "
        f"{memory / 2**30:.1f} GiB: {advice}; a smaller image or -q qint4 leaves more room"
    )
