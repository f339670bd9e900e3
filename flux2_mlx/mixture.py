"""Which layers of a network in `mixed4` have 8 bits and which have 4."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .components import COMPONENTS
from .quantization import BITS, FINER, GROUP_SIZE, MIXED, is_quantizable

# The most bits that a weight of the blocks has on average, with its share of scales and biases. It keeps the whole
# transformer of every released model below 5.
BUDGET = 4.8
CALIBRATION = "calibration"  # in what a manifest says of the source: how that was `measured`
_COARSE = BITS[MIXED] or 16
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Calibration:
    """The layers of a transformer's blocks, those first that are worst in 4 bits, and how that was `measured`, as JSON
    can hold it."""

    ranking: tuple[str, ...]
    measured: dict[str, Any]


def finer_layers(component: str, layers: Shapes, ranking: Sequence[str] | None = None) -> list[str]:
    """The layers that have 8 bits.

    All that belong to no block: modulations, embedders and the last layer, which reach every token or block, and are
    few. Of the blocks, those first in the `ranking` that fit into the `BUDGET`. Without one the last blocks come first
    where their row of the components says so, else the first; see `scripts/tried.md`.

    Args:
        component: the name of the network.
        layers: the shapes of the weights of its linear layers and embeddings.
        ranking: layers of blocks, the worst in 4 bits first; None: by their places.
    """
    sizes = {name: math.prod(shape) for name, shape in layers.items() if is_quantizable(component, shape)}
    blocks = {name: size for name, size in sizes.items() if is_of_block(component, name)}
    room = sum(blocks.values()) * (BUDGET - bits_a_weight(_COARSE)) / (FINER - _COARSE)
    chosen = [name for name in sizes if name not in blocks]
    for name in _by_place(component, blocks) if ranking is None else ranking:
        if name in blocks and blocks[name] <= room:
            room -= blocks[name]
            chosen.append(name)
    return chosen


def _by_place(component: str, layers: Iterable[str]) -> list[str]:
    return [*layers][:: -1 if COMPONENTS[component].worst_last else 1]


def bits_a_weight(bits: int) -> float:
    """The bits of a weight with its share of the scales and biases of its group, 16 each."""
    return bits + 32 / GROUP_SIZE


def is_of_block(component: str, layer: str) -> bool:
    """Whether a layer belongs to one of the blocks of a network."""
    return layer.split(".")[0] in COMPONENTS[component].streamed
