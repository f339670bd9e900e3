"""How a pass through the transformer is computed: ways that differ in memory and time, not in what they give."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import mlx.core as mx

from ..config import TransformerConfig
from ..device import on_gpu, on_metal, relative_speed, rows_to_unpack
from ..layers import OPERATIONS_PER_CHUNK, unpacked

# What is several times as wide as the stream is worked out for this many tokens at a time where memory counts: in
# float32 that takes 47 bytes a token and channel, and all 4,608 tokens of an image of 1024² at once 104.
TOKENS_PER_PART = 1024


class Waits(Enum):
    """What a pass waits for before it asks for more."""

    PARTS = "each part of a sequence and what is joined of parts, so that little is in memory at one time"
    BLOCKS = "each block"
    BEFORE = "the block before the one that was asked for last, so that a GPU always has work, but not ever more"


@dataclass(frozen=True)
class Execution:
    """A way of computing a pass. All give the same within rounding; the default one is the reference for others.

    Attributes:
        part: how many tokens of all images together a block projects at one time.
        waits: what is waited for.
        fused: whether one kernel makes heads of projections, which needs a GPU and has no gradient.
        summed: whether what attends and the MLP are projected each by itself and added, instead of side by side.
        dense: whether a GPU multiplies packed weights as dense ones where that is faster.
    """

    part: int = TOKENS_PER_PART
    waits: Waits = Waits.PARTS
    fused: bool = False
    summed: bool = False
    dense: bool = False

    @property
    def runs_ahead(self) -> bool:
        """Whether more is asked for than is waited for within a block."""
        return self.waits is not Waits.PARTS

    @property
    def blocks(self) -> int:
        """How many blocks are in memory at one time."""
        return 2 if self.waits is Waits.BEFORE else 1

    def ready(self, part: Any, x: mx.array) -> Any:
        """Layers as all tokens of `x` are given to them. Who asks holds what is unpacked of their weights."""
        return unpacked(part, x) if self.dense else part

    def settle(self, *arrays: Any) -> None:
        """Have what a part of a block gives computed."""
        if self.runs_ahead:
            mx.async_eval(*arrays)
        else:
            mx.eval(*arrays)

    def finish(self, before: mx.array, given: mx.array, *more: Any) -> mx.array:
        """Have what a block gives computed from what the one `before` gave: the stream, and `more` of it.

        Returns:
            The stream. So a caller holds no other one while the next block is computed.
        """
        if self.waits is Waits.BEFORE:
            mx.async_eval(given, *more)
            mx.eval(before)
        else:
            mx.eval(given, *more)
        return given


PLAIN = Execution()


def executions(config: TransformerConfig, packed: bool = False) -> Iterator[Execution]:
    """The ways of computing that this device has, the fastest first and the one that takes least memory last.

    A CPU starts working when it is asked to, so that waiting costs nothing there, and parts stay in its cache. A GPU
    stands still for about 0.25 ms at every wait (MLX issue 4265), 340 times a step of klein-4b at 1024². A product
    still takes no longer than others do on the slowest chip, or macOS would stop it. If weights are `packed`, dense
    products save more time than waits cost.
    """
    if on_gpu():
        token = 2 * config.hidden_size * widest(config)
        part = max(TOKENS_PER_PART, int(OPERATIONS_PER_CHUNK * relative_speed()) // token)
        # Metal multiplies by some columns of a weight as they lie; CUDA and CPUs would copy them first.
        ahead = Execution(part, Waits.BEFORE, fused=True, summed=on_metal())
        by_block = replace(ahead, waits=Waits.BLOCKS)
        by_part = replace(ahead, waits=Waits.PARTS, part=TOKENS_PER_PART)
        if packed and rows_to_unpack() < math.inf:
            yield from (replace(way, dense=True) for way in (ahead, by_block, by_part))
        yield from (ahead, by_block, by_part)
    else:
        yield PLAIN


def widest(config: TransformerConfig) -> int:
    """Channels of the widest projection of the stream."""
    return 3 * config.hidden_size + 2 * config.mlp_hidden_size
