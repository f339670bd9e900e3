"""Adapters of random numbers for small networks."""

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from flux2_mlx.adapters import Adapter, Delta, Kronecker, Layers, LowRank, Placed, folded
from flux2_mlx.branches import AtWork, Branches
from flux2_mlx.loading import module_tensors


def linear_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of its linear layers, by layer. It is not quantized."""
    shapes = {name.removesuffix(".weight"): tensor.shape for name, tensor in module_tensors(network).items()}
    return {name: shape for name, shape in shapes.items() if len(shape) == 2 and not name.startswith("embed_tokens")}


def low_rank(outputs: int, inputs: int, rank: int = 4, seed: int = 0, scale: float = 0.5) -> LowRank:
    down, up = mx.random.split(mx.random.key(seed))
    down = mx.random.normal((rank, inputs), key=down) / inputs**0.5
    return LowRank(down, mx.random.normal((outputs, rank), key=up) / rank**0.5, scale)


def kronecker(outputs: int, inputs: int, seed: int = 0) -> Kronecker:
    w1, w2 = mx.random.split(mx.random.key(seed))
    return Kronecker(
        mx.random.normal((2, 2), key=w1) / 2, mx.random.normal((outputs // 2, inputs // 2), key=w2) / inputs**0.5
    )


def on_all(
    shapes: Mapping[str, tuple[int, ...]], make: Callable[..., Delta] = low_rank, seed: int = 0, **settings: float
) -> Layers:
    """A change of each layer, another one for each name."""
    return {
        name: (Placed(make(*shape, seed=seed + sum(map(ord, name)), **settings)),) for name, shape in shapes.items()
    }


def branches(
    adapters: Sequence[Layers], scales: Sequence[float], steps: Sequence[tuple[int, int] | None] | None = None
) -> Branches:
    """These adapters of the transformer at work."""
    uses = zip(adapters, scales, steps or [None] * len(adapters), strict=True)
    return Branches("transformer", [AtWork(Adapter("a", {"transformer": layers}), *use) for layers, *use in uses])


def merged(network: nn.Module, adapters: list[Layers], strengths: list[float]) -> nn.Module:
    """`network` with the changes in its own weights, which are kept in their dtype."""
    tensors = dict(tree_flatten(network.parameters()))
    for layers, strength in zip(adapters, strengths, strict=True):
        for name, changes in layers.items():
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = folded(weight, changes, strength).astype(weight.dtype)
    network.load_weights(list(tensors.items()))
    return network
