"""A PyTorch reference and our network with the same random weights, handed over by our conversion rules."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from flux2_mlx.convert.parts import LAYOUT
from mlx.utils import tree_flatten

from .source_rules import rules_for

# Limits of ‖a − b‖ / ‖b‖ in float32 for a block and for a whole network.
BLOCK, NETWORK = 1e-5, 1e-4


def randomize(reference: torch.nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Give every weight and statistic a random value that `dtype` holds; default ones and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in reference.state_dict().items():
        if name.endswith("running_var"):
            x.uniform_(0.5, 4, generator=generator)
        elif x.ndim == 1:
            centre = 1 if name.endswith("weight") else 0
            x.uniform_(centre - 0.5, centre + 0.5, generator=generator)
        elif x.is_floating_point():
            bound = (3 / x[0].numel()) ** 0.5
            x.uniform_(-bound, bound, generator=generator)
        if dtype != torch.float32:
            x.copy_(x.to(dtype))
    return reference.eval()


def transfer(
    reference: torch.nn.Module,
    module: nn.Module,
    network: str,
    config: Any = None,
    prefix: str = "",
    source_prefix: str = "",
) -> nn.Module:
    """Load the weights of `reference` into `module`, the `network` or a part of it, by the converter's rules.

    `prefix` and `source_prefix` say where a part sits in the whole network, under our names and the reference's.
    """
    state, rule_for = reference.state_dict(), rules_for(network, config)
    weights = []
    for name, ours in tree_flatten(module.parameters()):
        rule = rule_for(prefix + name, ours.shape)
        parts = [to_mx(state.pop(source.removeprefix(source_prefix))) for source in rule.sources]
        assert [part.shape for part in parts] == [rule.source_shape(ours.shape)] * len(parts), name
        weights.append((name, rule.apply(*parts)))
    left = [name for name in state if not LAYOUT[network].is_dropped(source_prefix + name, config)]
    assert not left, f"not converted: {left}"
    return module.load_weights(weights).eval()


def to_mx(x: torch.Tensor) -> mx.array:
    return mx.array(x.numpy())


def to_numpy(x: torch.Tensor | mx.array | np.ndarray) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        return x.float().numpy()
    return np.array(x.astype(mx.float32)) if isinstance(x, mx.array) else x


def relative_error(ours: Any, reference: Any) -> float:
    """‖ours − reference‖ / ‖reference‖ of two arrays of one shape."""
    a, b = (to_numpy(x).astype(np.float64) for x in (ours, reference))
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def random_tensor(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values that `dtype` holds, as float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).float()
