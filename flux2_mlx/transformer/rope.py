"""Rotary position embedding over four axes: T (reference), H, W (image) and L (text).

Source: `EmbedND` and `apply_rope` of the FLUX.2 reference code.
"""

import mlx.core as mx
import numpy as np

from ..config import TransformerConfig
from ..device import fused


def text_ids(length: int) -> np.ndarray:
    """Positions of `length` text tokens, padding included: `[length, 4]`, (0, 0, 0, l)."""
    ids = np.zeros((length, 4), dtype=np.int32)
    ids[:, 3] = np.arange(length)
    return ids


def image_ids(height: int, width: int, t: int = 0) -> np.ndarray:
    """Positions of `height`×`width` image tokens in row order: `[height·width, 4]`, (t, h, w, 0)."""
    ids = np.zeros((height, width, 4), dtype=np.int32)
    ids[..., 0] = t
    ids[..., 1] = np.arange(height)[:, None]
    ids[..., 2] = np.arange(width)
    return ids.reshape(-1, 4)


def rope_table(ids: np.ndarray, config: TransformerConfig) -> mx.array:
    """Rotations of tokens at `ids` `[L, 4]`, for each channel: float32 `[L, 2, head_dim]`.

    Channels turn in pairs. A channel is multiplied by (·, 0), the cosine, and the other one of its pair by (·, 1): the
    sine, negative for the first of a pair. Angles are float64 before both, as in the reference.
    """
    angles = [
        ids[:, axis, None] * config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        for axis, dim in enumerate(config.axes_dims_rope)
    ]
    angle = np.concatenate(angles, axis=1)
    cos, sin = np.cos(angle), np.sin(angle)
    table = np.stack([np.stack([cos, cos], axis=-1), np.stack([-sin, sin], axis=-1)], axis=1)
    return mx.array(table.reshape(len(ids), 2, -1).astype(np.float32))


def rotate(x: mx.array, table: mx.array) -> mx.array:
    """Rotate the pairs (x[2j], x[2j+1]) of `[B, heads, L, head_dim]` in float32."""
    # As complex numbers they would have no gradient in MLX. Pairs and swapped pairs are views of `x`.
    pairs, table = mx.unflatten(x, -1, (-1, 2)), mx.unflatten(table, -1, (-1, 2))
    return _turned(pairs, pairs[..., ::-1], table[:, 0], table[:, 1]).flatten(-2)


@fused
def _turned(x: mx.array, other: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return (x.astype(mx.float32) * cos + other.astype(mx.float32) * sin).astype(x.dtype)
