"""Layers of the transformer. Attribute names are the weight names of the original release.

Source: `DoubleStreamBlock`, `SingleStreamBlock` and `LastLayer` of the FLUX.2 reference code.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import TransformerConfig
from ..layers import Linear, attention, silu
from .headroom import clipped, gated_sum, in_units, swiglu, unit
from .rope import rotate

KeysValues = tuple[mx.array, mx.array]
Heads = tuple[mx.array, mx.array, mx.array]
# What is several times as wide as the stream is worked out for this many tokens at a time.
TOKENS_PER_PART = 1024


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
        self.query_norm = HeadNorm(dim, eps)
        self.key_norm = HeadNorm(dim, eps)


def by_parts(x: mx.array, work: Callable[[slice], Any]) -> Iterator[Any]:
    """What `work` makes of the tokens of `x` `[B, L, D]`, one slice of the sequence after the other."""
    B, L, _ = x.shape
    size = max(1, TOKENS_PER_PART // B)
    for start in range(0, L, size):
        part = work(slice(start, start + size))
        if size < L:
            mx.eval(part)
        yield part


def rotated_heads(qkv: mx.array, heads: int, norm: QKNorm, rope: mx.array) -> Heads:
    """Split `[B, L, 3D]` into q and k, normalised and rotated, and v, in units, each `[B, heads, L, head_dim]`."""
    B, L, _ = qkv.shape
    q, k, v = qkv.reshape(B, L, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    q, k = norm.query_norm(clipped(q)), norm.key_norm(clipped(k))
    # v is copied, for a view would keep the whole projection that it is cut from alive.
    return rotate(q, rope), rotate(k, rope), mx.contiguous(in_units(v))


def joined_attention(parts: Iterator[Heads], past: KeysValues | None = None) -> tuple[mx.array, KeysValues]:
    """Attention over all tokens of `parts`: `[B, L, D]`, with the keys and the values.

    `past` are keys and values `[1, heads, Lr, head_dim]` that all tokens see as well.
    """
    columns = [list(column) for column in zip(*parts, strict=True)]
    # The parts of a column are gone before the next is joined, so that no two columns are in memory twice.
    q, k, v = (_joined(columns.pop(0)) for _ in range(3))
    keys, values = (k, v) if past is None else (_before(k, past[0]), _before(v, past[1]))
    return attention(q, keys, values), (k, v)


def _before(new: mx.array, old: mx.array) -> mx.array:
    """Keys or values of `[B, heads, L, head_dim]`, and behind them the `[1, heads, Lr, head_dim]` that all see."""
    return mx.concatenate([new, mx.repeat(old, len(new), axis=0)], axis=2)


def _joined(column: list[mx.array]) -> mx.array:
    if len(column) == 1:
        return column[0]
    whole = mx.concatenate(column, axis=2)
    mx.eval(whole)
    return whole


class SiLUGate(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return swiglu(*mx.split(x, 2, axis=-1))


class StreamAttention(nn.Module):
    """The attention weights of one stream of a double block."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self._heads = config.num_attention_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.attention_head_dim, config.eps)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: mx.array, rope: mx.array) -> Heads:
        return rotated_heads(self.qkv(x), self._heads, self.norm, rope)


def _mlp(config: TransformerConfig) -> list[nn.Module]:
    D, M = config.hidden_size, config.mlp_hidden_size
    return [Linear(D, 2 * M), SiLUGate(), Linear(M, D)]


class DoubleBlock(nn.Module):
    """Image and text tokens attend jointly, each stream with its own weights."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self._eps = config.eps
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
    ) -> tuple[mx.array, mx.array]:
        L = txt.shape[1]
        txt_heads = self._heads(txt, self.txt_attn, txt_mod, rope[:L])
        out, _ = joined_attention(chain(txt_heads, self._heads(img, self.img_attn, img_mod, rope[L:])), past)
        txt = self._add(txt, out[:, :L], self.txt_attn, self.txt_mlp, txt_mod)
        img = self._add(img, out[:, L:], self.img_attn, self.img_mlp, img_mod)
        return img, txt

    def read(self, img: mx.array, img_mod: list[mx.array], rope: mx.array) -> tuple[mx.array, KeysValues]:
        """The image stream alone, and the keys and values that others see of it."""
        out, seen = joined_attention(self._heads(img, self.img_attn, img_mod, rope))
        return self._add(img, out, self.img_attn, self.img_mlp, img_mod), seen

    def _heads(self, x: mx.array, attn: StreamAttention, mod: list[mx.array], rope: mx.array) -> Iterator[Heads]:
        return by_parts(x, lambda tokens: attn(modulate(x[:, tokens], mod[0], mod[1], self._eps), rope[tokens]))

    def _add(
        self, x: mx.array, attended: mx.array, attn: StreamAttention, mlp: list[nn.Module], mod: list[mx.array]
    ) -> mx.array:
        def added(tokens: slice) -> mx.array:
            part = gated_sum(x[:, tokens], mod[2], attn.proj(attended[:, tokens]))
            y = modulate(part, mod[3], mod[4], self._eps)
            for layer in mlp:
                y = layer(y)
            return gated_sum(part, mod[5], y)

        return mx.concatenate(list(by_parts(x, added)), axis=1)


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joined sequence, with one projection in and one out."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        D, M = config.hidden_size, config.mlp_hidden_size
        self._eps = config.eps
        self._heads = config.num_attention_heads
        self._split = (3 * D, 3 * D + M)
        self.linear1 = Linear(D, 3 * D + 2 * M)
        self.linear2 = Linear(D + M, D)
        self.norm = QKNorm(config.attention_head_dim, config.eps)

    def __call__(self, x: mx.array, mod: list[mx.array], rope: mx.array, past: KeysValues | None = None) -> mx.array:
        return self._run(x, mod, rope, past)[0]

    def read(self, x: mx.array, mod: list[mx.array], rope: mx.array) -> tuple[mx.array, KeysValues]:
        """The tokens after this block, and the keys and values that others see of them."""
        return self._run(x, mod, rope, None)

    def _run(
        self, x: mx.array, mod: list[mx.array], rope: mx.array, past: KeysValues | None
    ) -> tuple[mx.array, KeysValues]:
        shift, scale, gate = mod
        hidden = []  # of the MLP, each part until it is added

        def projected(tokens: slice) -> tuple[Heads, mx.array]:
            y = self.linear1(modulate(x[:, tokens], shift, scale, self._eps))
            qkv, mlp_gate, mlp = mx.split(y, self._split, axis=-1)
            return rotated_heads(qkv, self._heads, self.norm, rope[tokens]), swiglu(mlp_gate, mlp)

        def heads() -> Iterator[Heads]:
            for part, mlp in by_parts(x, projected):
                hidden.append(mlp)
                yield part

        def added(tokens: slice) -> mx.array:
            y = mx.concatenate([out[:, tokens], hidden.pop(0)], axis=-1)
            return gated_sum(x[:, tokens], gate, self.linear2(y))

        out, seen = joined_attention(heads(), past)
        return mx.concatenate(list(by_parts(x, added)), axis=1), seen


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
