"""Blocks that more than one network uses. Arrays are channels-last; attention is `[B, heads, tokens, head_dim]`."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

# Metal's attention kernel has these head sizes and never stores the scores. Elsewhere MLX stores them for all
# queries at once, so the queries are taken in chunks of at most this many scores.
_FUSED_HEAD_SIZES = (64, 80, 128)
_SCORES_PER_CHUNK = 8 * 1024 * 1024


def on_metal() -> bool:
    """Whether MLX computes on an Apple GPU."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def fused(function: Callable) -> Callable:
    """`function`, compiled into one kernel where that needs no C++ compiler at run time."""
    return mx.compile(function, shapeless=True) if mx.metal.is_available() else function


@fused
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """SiLU(gate) · x."""
    return nn.silu(gate) * x


def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """Scaled dot-product attention; `k` and `v` may have fewer heads than `q` (grouped queries).

    `mask` is boolean, `[B, 1, Lq, Lk]`, True where a query may look.
    """
    scale = q.shape[-1] ** -0.5
    if on_metal() and q.shape[-1] in _FUSED_HEAD_SIZES:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    B, heads, Lq, _ = q.shape
    rows = max(1, _SCORES_PER_CHUNK // (B * heads * k.shape[2]))
    chunks = []
    for start in range(0, Lq, rows):
        part = slice(start, start + rows)
        chunk_mask = None if mask is None else mask[:, :, part]
        chunks.append(mx.fast.scaled_dot_product_attention(q[:, :, part], k, v, scale=scale, mask=chunk_mask))
        mx.eval(chunks[-1])
    return mx.concatenate(chunks, axis=2) if len(chunks) > 1 else chunks[0]
