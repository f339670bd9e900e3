"""Rotary position embedding over four axes: T (reference), H, W (image) and L (text).

Source: `EmbedND` and `apply_rope` of the FLUX.2 reference code.
"""

import mlx.core as mx
import numpy as np

from ..config import TransformerConfig


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
    """Rotations e^(i·angle) for tokens at `ids` `[L, 4]`: complex64 `[L, head_dim / 2]`.

    Angles are float64 before the cosine and sine, as in the reference.
    """
    angles = [
        ids[:, axis, None] * config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        for axis, dim in enumerate(config.axes_dims_rope)
    ]
    return mx.array(np.exp(1j * np.concatenate(angles, axis=1)).astype(np.complex64))


def rotate(x: mx.array, table: mx.array) -> mx.array:
    """Rotate the pairs (x[2j], x[2j+1]) of `[B, heads, L, head_dim]` in float32, each as one complex number."""
    rotated = x.astype(mx.float32).view(mx.complex64) * table
    return rotated.view(mx.float32).astype(x.dtype)
