"""Layers of the transformer. Attribute names are the weight names of the original release.

Source: `DoubleStreamBlock`, `SingleStreamBlock` and `LastLayer` of the FLUX.2 reference code.
"""

import math
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import TransformerConfig
from ..layers import Linear, attention, project_sum, project_to, silu
from .execution import PLAIN, Execution
from .headroom import clipped, gated_sum, in_units, swiglu, unit
from .kernel import fits, fused_heads
from .parts import by_parts, in_columns, joined, joined_column, side_by_side
from .rope import rotate

KeysValues = tuple[mx.array, mx.array]
Heads = tuple[mx.array, mx.array, mx.array]


def modulate(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """LayerNorm(x)·(1 + scale) + shift of the stream, with `shift` and `scale` `[1 or B, 1, D]`."""
    eps /= unit(x.dtype) ** 2
    if scale.shape[0] == 1:
        return mx.fast.layer_norm(x, 1 + scale[0, 0], shift[0, 0], eps)
    return mx.fast.layer_norm(x, None, None, eps) * (1 + scale) + shift


def timestep_embedding(t: mx.array, channels: int) -> mx.array:
    """Sinusoids of 1000·t for `t` `[B]` in 0..1: float32 `[B, channels]`, cosines first."""
    angles = (1000 * t.astype(mx.float32))[:, None] * _frequencies(channels // 2)
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


@cache
def _frequencies(count: int) -> mx.array:
    # The angles reach 1000 radians and more, so an error in the last place of a frequency shows: float64 first.
    return mx.array(np.exp(-math.log(10000) / count * np.arange(count)).astype(np.float32))


class MLPEmbedder(nn.Module):
    def __init__(self, channels: int, hidden_size: int):
        super().__init__()
        self.in_layer = Linear(channels, hidden_size)
        self.out_layer = Linear(hidden_size, hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.out_layer(silu(self.in_layer(x)))


class Modulation(nn.Module):
    """`count` vectors `[1 or B, 1, D]` that all blocks of one kind share."""

    def __init__(self, hidden_size: int, count: int):
        super().__init__()
        self._count = count
        self.lin = Linear(hidden_size, count * hidden_size)

    def __call__(self, vec: mx.array) -> list[mx.array]:
        return list(mx.split(self.lin(silu(vec))[:, None], self._count, axis=-1))


class HeadNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self._eps = eps
        self.scale = mx.ones((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.scale, self._eps)


class QKNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self._eps = eps
        self.query_norm = HeadNorm(dim, eps)
        self.key_norm = HeadNorm(dim, eps)

    @property
    def eps(self) -> float:
        return self._eps

    @property
    def scales(self) -> tuple[mx.array, mx.array]:
        return self.query_norm.scale, self.key_norm.scale


def rotated_heads(projected: mx.array, heads: int, norm: QKNorm, rope: mx.array, execution: Execution) -> Heads:
    """Queries and keys, normalised and rotated, and values, in units, each `[B, heads, L, head_dim]`, of a projection
    `[B, L, W]` that begins with them, in `[3, heads, head_dim]`."""
    B, L, _ = projected.shape
    head_dim = norm.query_norm.scale.size
    if execution.fused and fits(projected, head_dim, *norm.scales):
        return fused_heads(projected, heads, norm.scales, norm.eps, rope)
    qkv = projected[..., : 3 * heads * head_dim]
    q, k, v = qkv.reshape(B, L, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    # v is copied, for a view would keep the whole projection that it is cut from alive.
    return (
        rotate(norm.query_norm(clipped(q)), rope),
        rotate(norm.key_norm(clipped(k)), rope),
        mx.contiguous(in_units(v)),
    )


def keys_values(projected: mx.array, heads: int, norm: QKNorm, rope: mx.array) -> KeysValues:
    """Keys, normalised and rotated, and values, in units, each `[B, heads, L, head_dim]`, of `[B, L, 2D]`."""
    B, L, _ = projected.shape
    k, v = projected.reshape(B, L, 2, heads, -1).transpose(2, 0, 3, 1, 4)
    return rotate(norm.key_norm(clipped(k)), rope), mx.contiguous(in_units(v))


def attended(
    q: mx.array, k: mx.array, v: mx.array, *, past: KeysValues | None = None, execution: Execution
) -> mx.array:
    """What each query sees: `[B, L, D]`. `past` are keys and values `[1, heads, Lr, head_dim]` that all see as well."""
    if past is not None:
        k, v = _before(k, past[0]), _before(v, past[1])
    return attention(q, k, v, settle=execution.settle)


def _before(new: mx.array, old: mx.array) -> mx.array:
    """Keys or values of `[B, heads, L, head_dim]`, and behind them the `[1, heads, Lr, head_dim]` that all see."""
    return mx.concatenate([new, mx.repeat(old, len(new), axis=0)], axis=2)


class SiLUGate(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return swiglu(*mx.split(x, 2, axis=-1))


class StreamAttention(nn.Module):
    """The attention weights of one stream of a double block."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.attention_head_dim, config.eps)
        self.proj = Linear(config.hidden_size, config.hidden_size)


def _mlp(config: TransformerConfig) -> list[nn.Module]:
    D, M = config.hidden_size, config.mlp_hidden_size
    return [Linear(D, 2 * M), SiLUGate(), Linear(M, D)]


class DoubleBlock(nn.Module):
    """Image and text tokens attend jointly, each stream with its own weights."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self._eps = config.eps
        self._heads = config.num_attention_heads
        self.img_attn = StreamAttention(config)
        self.img_mlp = _mlp(config)
        self.txt_attn = StreamAttention(config)
        self.txt_mlp = _mlp(config)

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        img_mod: list[mx.array],
        txt_mod: list[mx.array],
        rope: mx.array,
        past: KeysValues | None = None,
        execution: Execution = PLAIN,
    ) -> tuple[mx.array, mx.array]:
        L = txt.shape[1]
        txt_heads = self._projected(txt, self.txt_attn, txt_mod, rope[:L], execution)
        heads = chain(txt_heads, self._projected(img, self.img_attn, img_mod, rope[L:], execution))
        # Keys and values are held by nobody else, so that they are gone when this is done.
        seen = attended(*joined(in_columns(heads), execution), past=past, execution=execution)
        txt = self._add(txt, seen[:, :L], self.txt_attn, self.txt_mlp, txt_mod, execution)
        img = self._add(img, seen[:, L:], self.img_attn, self.img_mlp, img_mod, execution)
        return img, txt

    def read(
        self, img: mx.array, img_mod: list[mx.array], rope: mx.array, execution: Execution = PLAIN
    ) -> tuple[mx.array, KeysValues]:
        """The image stream alone, and the keys and values that others see of it."""
        q, k, v = joined(in_columns(self._projected(img, self.img_attn, img_mod, rope, execution)), execution)
        seen = attended(q, k, v, execution=execution)
        return self._add(img, seen, self.img_attn, self.img_mlp, img_mod, execution), (k, v)

    def _projected(
        self, x: mx.array, attn: StreamAttention, mod: list[mx.array], rope: mx.array, execution: Execution
    ) -> Iterator[Heads]:
        qkv = execution.ready(attn.qkv, x)

        def heads(tokens: slice) -> Heads:
            y = qkv(modulate(x[:, tokens], mod[0], mod[1], self._eps))
            return rotated_heads(y, self._heads, attn.norm, rope[tokens], execution)

        return by_parts(x, heads, execution)

    def _add(
        self,
        x: mx.array,
        seen: mx.array,
        attn: StreamAttention,
        mlp: list[nn.Module],
        mod: list[mx.array],
        execution: Execution,
    ) -> mx.array:
        proj, mlp = execution.ready([attn.proj, mlp], x)

        def added(tokens: slice) -> mx.array:
            part = gated_sum(x[:, tokens], mod[2], proj(seen[:, tokens]))
            y = modulate(part, mod[3], mod[4], self._eps)
            for layer in mlp:
                y = layer(y)
            return gated_sum(part, mod[5], y)

        return side_by_side(by_parts(x, added, execution))


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joined sequence, with one projection in and one out."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        D, M = config.hidden_size, config.mlp_hidden_size
        self._eps = config.eps
        self._heads = config.num_attention_heads
        self._keys = slice(D, 3 * D)  # and values, among the outputs of linear1
        self._split = (3 * D, 3 * D + M)
        self.linear1 = Linear(D, 3 * D + 2 * M)
        self.linear2 = Linear(D + M, D)
        self.norm = QKNorm(config.attention_head_dim, config.eps)

    def __call__(
        self,
        x: mx.array,
        mod: list[mx.array],
        rope: mx.array,
        past: KeysValues | None = None,
        execution: Execution = PLAIN,
        wanted: slice | None = None,
    ) -> mx.array:
        """The tokens after this block: all, or those of a slice, for which alone queries and MLP are worked out."""
        if wanted is not None:
            return self._some(x, mod, rope, past, execution, wanted)
        columns = in_columns(self._all_projected(x, mod, rope, execution))
        hidden = next(columns)
        # Keys and values are held by nobody else, so that they are gone when this is done.
        seen = attended(*joined(columns, execution), past=past, execution=execution)
        return self._add(x, seen, hidden, mod[2], execution)

    def read(
        self, x: mx.array, mod: list[mx.array], rope: mx.array, execution: Execution = PLAIN
    ) -> tuple[mx.array, KeysValues]:
        """The tokens after this block, and the keys and values that others see of them."""
        columns = in_columns(self._all_projected(x, mod, rope, execution))
        hidden = next(columns)
        q, k, v = joined(columns, execution)
        return self._add(x, attended(q, k, v, execution=execution), hidden, mod[2], execution), (k, v)

    def _some(
        self,
        x: mx.array,
        mod: list[mx.array],
        rope: mx.array,
        past: KeysValues | None,
        execution: Execution,
        wanted: slice,
    ) -> mx.array:
        columns = self._some_projected(x, mod, rope, execution, wanted)
        hidden = next(columns)
        seen = attended(*columns, past=past, execution=execution)
        return self._add(x[:, wanted], seen, hidden, mod[2], execution)

    def _all_projected(
        self, x: mx.array, mod: list[mx.array], rope: mx.array, execution: Execution
    ) -> Iterator[tuple[mx.array, ...]]:
        return self._projected(execution.ready(self.linear1, x), x, slice(None), mod, rope, execution)

    def _some_projected(
        self, x: mx.array, mod: list[mx.array], rope: mx.array, execution: Execution, wanted: slice
    ) -> Iterator[Any]:
        """The MLP of each part of the tokens of a slice, then their queries, and the keys and values of all tokens."""
        linear1 = execution.ready(self.linear1, x)
        columns = in_columns(self._projected(linear1, x, wanted, mod, rope, execution))
        yield next(columns)
        yield joined_column(next(columns), execution)
        before = self._keys_values(linear1, x, slice(wanted.start), mod, rope, execution)
        after = self._keys_values(linear1, x, slice(wanted.stop, None), mod, rope, execution)
        yield from joined(in_columns(chain(before, zip(*columns, strict=True), after)), execution)

    def _projected(
        self,
        linear1: nn.Module,
        x: mx.array,
        span: slice,
        mod: list[mx.array],
        rope: mx.array,
        execution: Execution,
    ) -> Iterator[tuple[mx.array, ...]]:
        """The MLP of a span of the tokens by parts, each with its queries, keys and values."""
        some, turned = x[:, span], rope[span]

        def projected(tokens: slice) -> tuple[Heads, mx.array]:
            y = linear1(modulate(some[:, tokens], mod[0], mod[1], self._eps))
            mlp_gate, mlp = mx.split(y, self._split, axis=-1)[1:]
            # Made in this order: the other takes more memory.
            return rotated_heads(y, self._heads, self.norm, turned[tokens], execution), swiglu(mlp_gate, mlp)

        for heads, mlp in by_parts(some, projected, execution, x.shape[1]):
            yield mlp, *heads

    def _keys_values(
        self,
        linear1: nn.Module,
        x: mx.array,
        span: slice,
        mod: list[mx.array],
        rope: mx.array,
        execution: Execution,
    ) -> Iterator[KeysValues]:
        """Those of a span of the tokens alone."""
        some, turned = x[:, span], rope[span]

        def projected(tokens: slice) -> KeysValues:
            y = modulate(some[:, tokens], mod[0], mod[1], self._eps)
            return keys_values(project_to(linear1, y, self._keys), self._heads, self.norm, turned[tokens])

        return by_parts(some, projected, execution, x.shape[1])

    def _add(
        self, x: mx.array, seen: mx.array, hidden: list[mx.array], gate: mx.array, execution: Execution
    ) -> mx.array:
        parts = iter(hidden)
        linear2 = execution.ready(self.linear2, x)

        def added(tokens: slice) -> mx.array:
            mlp = next(parts)
            if execution.summed:
                return gated_sum(x[:, tokens], gate, project_sum(linear2, seen[:, tokens], mlp))
            return gated_sum(x[:, tokens], gate, linear2(mx.concatenate([seen[:, tokens], mlp], axis=-1)))

        return side_by_side(by_parts(x, added, execution))


class LastLayer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        D = config.hidden_size
        self._eps = config.eps
        self.linear = Linear(D, config.in_channels)
        self.adaLN_modulation = [nn.SiLU(), Linear(D, 2 * D)]

    def __call__(self, x: mx.array, vec: mx.array) -> mx.array:
        shift, scale = mx.split(self.adaLN_modulation[1](silu(vec))[:, None], 2, axis=-1)
        return self.linear(modulate(x, shift, scale, self._eps))
