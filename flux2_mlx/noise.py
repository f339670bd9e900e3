"""Seeded Gaussian noise equal to PyTorch's CPU generator, so that a seed gives the image it gives in diffusers.

Source: `normal_fill` in PyTorch's CPU kernels.
"""

from collections.abc import Sequence

import numpy as np

_BLOCK = 16  # values that PyTorch makes together: 8 radii and angles give 8 cosines, then 8 sines


def torch_randn(seed: int, shape: Sequence[int]) -> np.ndarray:
    """What `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` gives, in float32.

    Args:
        seed: 0 … 2^64 − 1; PyTorch's generator keeps its lowest 32 bits.
        shape: the product must be a multiple of 16, where PyTorch fills whole blocks.
    """
    count = int(np.prod(shape))
    if count % _BLOCK:
        raise ValueError(f"noise needs a multiple of {_BLOCK} values, got shape {tuple(shape)}")
    words = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, size=count, dtype=np.uint64)
    uniform = ((words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)).reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log1p(-uniform[:, 0]))
    angle = np.float32(2 * np.pi) * uniform[:, 1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(shape)


def initial_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> np.ndarray:
    """Noise for one image a seed, float32 `[len(seeds), channels, height, width]`, as diffusers draws it."""
    return np.stack([torch_randn(seed, (channels, height, width)) for seed in seeds])
