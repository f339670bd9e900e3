"""Layers of the transformer. Attribute names are the weight names of the original release.

Source: `DoubleStreamBlock`, `SingleStreamBlock` and `LastLayer` of the FLUX.2 reference code.
"""

import math
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import TransformerConfig
from ..layers import attention, fused, swiglu
from .rope import rotate

KeysValues = tuple[mx.array, mx.array]


@fused
def _gated(x: mx.array, gate: mx.array, update: mx.array) -> mx.array:
    return x + gate * update


def modulate(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """LayerNorm(x)·(1 + scale) + shift, with `shift` and `scale` `[1 or B, 1, D]`."""
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
        self.in_layer = nn.Linear(channels, hidden_size, bias=False)
        self.out_layer = nn.Linear(hidden_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.out_layer(nn.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """`count` vectors `[1 or B, 1, D]` that all blocks of one kind share."""

    def __init__(self, hidden_size: int, count: int):
        super().__init__()
        self._count = count
        self.lin = nn.Linear(hidden_size, count * hidden_size, bias=False)

    def __call__(self, vec: mx.array) -> list[mx.array]:
        return mx.split(self.lin(nn.silu(vec))[:, None], self._count, axis=-1)


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


def heads_of(qkv: mx.array, heads: int, norm: QKNorm) -> tuple[mx.array, mx.array, mx.array]:
    """Split `[B, L, 3D]` into normalised q and k, and v, each `[B, heads, L, head_dim]`."""
    B, L, _ = qkv.shape
    q, k, v = qkv.reshape(B, L, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    return norm.query_norm(q), norm.key_norm(k), v


def rotated_attention(
    q: mx.array, k: mx.array, v: mx.array, rope: mx.array, past: KeysValues | None = None
) -> tuple[mx.array, KeysValues]:
    """Attention after rotation, `[B, heads, L, head_dim]` to `[B, L, D]`, with the rotated keys and the values.

    `past` are keys and values `[1, heads, Lr, head_dim]` that all tokens see as well.
    """
    B, _, L, _ = q.shape
    q, k = rotate(q, rope), rotate(k, rope)
    seen = (k, v)
    if past is not None:
        seen = tuple(
            mx.concatenate([new, mx.repeat(old, B, axis=0)], axis=2) for new, old in zip(seen, past, strict=True)
        )
    out = attention(q, *seen)
    return out.transpose(0, 2, 1, 3).reshape(B, L, -1), (k, v)


class SiLUGate(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return swiglu(*mx.split(x, 2, axis=-1))


class StreamAttention(nn.Module):
    """The attention weights of one stream of a double block."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self._heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.norm = QKNorm(config.attention_head_dim, config.eps)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        return heads_of(self.qkv(x), self._heads, self.norm)


def _mlp(config: TransformerConfig) -> list[nn.Module]:
    D, M = config.hidden_size, config.mlp_hidden_size
    return [nn.Linear(D, 2 * M, bias=False), SiLUGate(), nn.Linear(M, D, bias=False)]


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
        txt_qkv = self.txt_attn(modulate(txt, txt_mod[0], txt_mod[1], self._eps))
        img_qkv = self.img_attn(modulate(img, img_mod[0], img_mod[1], self._eps))
        q, k, v = (mx.concatenate(pair, axis=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        out, _ = rotated_attention(q, k, v, rope, past)
        L = txt.shape[1]
        txt = self._add(txt, out[:, :L], self.txt_attn, self.txt_mlp, txt_mod)
        img = self._add(img, out[:, L:], self.img_attn, self.img_mlp, img_mod)
        return img, txt

    def read(self, img: mx.array, img_mod: list[mx.array], rope: mx.array) -> tuple[mx.array, KeysValues]:
        """The image stream alone, and the keys and values that others see of it."""
        qkv = self.img_attn(modulate(img, img_mod[0], img_mod[1], self._eps))
        out, seen = rotated_attention(*qkv, rope)
        return self._add(img, out, self.img_attn, self.img_mlp, img_mod), seen

    def _add(self, x, attended, attn: StreamAttention, mlp: list[nn.Module], mod: list[mx.array]) -> mx.array:
        x = _gated(x, mod[2], attn.proj(attended))
        y = modulate(x, mod[3], mod[4], self._eps)
        for layer in mlp:
            y = layer(y)
        return _gated(x, mod[5], y)


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joined sequence, with one projection in and one out."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        D, M = config.hidden_size, config.mlp_hidden_size
        self._eps, self._heads, self._split = config.eps, config.num_attention_heads, (3 * D, 3 * D + M)
        self.linear1 = nn.Linear(D, 3 * D + 2 * M, bias=False)
        self.linear2 = nn.Linear(D + M, D, bias=False)
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
        qkv, mlp_gate, mlp = mx.split(self.linear1(modulate(x, shift, scale, self._eps)), self._split, axis=-1)
        out, seen = rotated_attention(*heads_of(qkv, self._heads, self.norm), rope, past)
        out = self.linear2(mx.concatenate([out, swiglu(mlp_gate, mlp)], axis=-1))
        return _gated(x, gate, out), seen


class LastLayer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        D = config.hidden_size
        self._eps = config.eps
        self.linear = nn.Linear(D, config.in_channels, bias=False)
        self.adaLN_modulation = [nn.SiLU(), nn.Linear(D, 2 * D, bias=False)]

    def __call__(self, x: mx.array, vec: mx.array) -> mx.array:
        for layer in self.adaLN_modulation:
            vec = layer(vec)
        shift, scale = mx.split(vec[:, None], 2, axis=-1)
        return self.linear(modulate(x, shift, scale, self._eps))
