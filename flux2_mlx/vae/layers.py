"""Layers of the autoencoder, on rows of activations. Attribute names follow diffusers' `AutoencoderKLFlux2`."""

import mlx.core as mx
import mlx.nn as nn

from .. import layers
from ..device import fused, on_gpu
from ..layers import Linear, attention, silu
from .strips import Convolved, Doubled, Mapped, Moments, Rows, Sum

_EPS = 1e-6  # diffusers' for all group norms of `AutoencoderKLFlux2`


class Conv2d(layers.Conv2d):
    def __call__(self, x: Rows) -> Rows:
        return Convolved(x, self)


class GroupNorm(nn.Module):
    """Normalise each of `groups` groups of neighbouring channels over the whole image, as PyTorch does."""

    def __init__(self, channels: int, groups: int, eps: float = _EPS):
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self.groups = groups
        self.eps = eps

    def __call__(self, x: Rows) -> Rows:
        scale, shift = self._scale_and_shift(x)
        return Mapped(x, lambda rows: _affine(rows, scale, shift))

    def silu(self, x: Rows) -> Rows:
        """SiLU of the normalised rows."""
        B, _, W, C = x.shape
        scale, shift = self._scale_and_shift(x)
        gate = 0 if on_gpu() else B * W * C * mx.float32.size  # where it is not one kernel
        return Mapped(x, lambda rows: _affine_silu(rows, scale, shift), workspace=gate)

    def _scale_and_shift(self, x: Rows) -> tuple[mx.array, mx.array]:
        """Per image and channel, `[B, 1, 1, C]` in float32."""
        B, H, _, C = x.shape
        # All rows count alike, so the variance is the mean of their variances plus the variance of their means.
        mean, variance = Moments(x).store(keep=True).whole().reshape(B, H, 2, self.groups, -1).split(2, axis=2)
        centre = mean.mean(axis=(1, 4), keepdims=True)
        variance = (variance + mx.square(mean - centre)).mean(axis=(1, 4), keepdims=True)
        scale = self.weight.reshape(self.groups, -1) * mx.rsqrt(variance + self.eps)
        shift = self.bias.reshape(self.groups, -1) - centre * scale
        return scale.reshape(B, 1, 1, C), shift.reshape(B, 1, 1, C)


@fused
def _affine(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


@fused
def _affine_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return silu(x.astype(mx.float32) * scale + shift).astype(x.dtype)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(in_channels, groups)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels, groups)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = Conv2d(in_channels, out_channels, 1)

    def __call__(self, x: Rows) -> Rows:
        inner = self.conv1(self.norm1.silu(x)).store(keep=True)  # x is added below
        y = self.conv2(self.norm2.silu(inner))
        return Sum(y, self.conv_shortcut(x) if "conv_shortcut" in self else x).store()


class Attention(nn.Module):
    """Single-head attention over all positions, with the input added."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(channels, groups)
        self.to_q = Linear(channels, channels, bias=True)
        self.to_k = Linear(channels, channels, bias=True)
        self.to_v = Linear(channels, channels, bias=True)
        self.to_out = [Linear(channels, channels, bias=True)]

    def __call__(self, x: Rows) -> Rows:
        B, H, W, _ = x.shape
        y = self.group_norm(x).store(keep=True)
        k, v = (Mapped(y, layer).store(keep=True).whole() for layer in (self.to_k, self.to_v))
        scores = B * W * (H * W) * mx.float32.size
        return Sum(x, Mapped(y, lambda rows: self._attend(rows, k, v), workspace=scores)).store()

    def _attend(self, x: mx.array, k: mx.array, v: mx.array) -> mx.array:
        B, _, _, C = x.shape
        q, k, v = (a.reshape(B, 1, -1, C) for a in (self.to_q(x), k, v))
        return self.to_out[0](attention(q, k, v).reshape(x.shape))


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attentions = [Attention(channels, groups)]
        self.resnets = [ResnetBlock(channels, channels, groups) for _ in range(2)]

    def __call__(self, x: Rows) -> Rows:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Halve both sides; the zero padding is on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: Rows) -> Rows:
        return self.conv(x).store()


class Upsample(nn.Module):
    """Double both sides by repeating pixels, then smooth."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: Rows) -> Rows:
        return self.conv(Doubled(x)).store()


class Level(nn.Module):
    """The residual blocks of one resolution, and the step to the next one unless it is the last."""

    def __init__(self, in_channels: int, out_channels: int, count: int, groups: int):
        super().__init__()
        self.resnets = [
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(count)
        ]

    def __call__(self, x: Rows) -> Rows:
        for layer in self.resnets + self.get("downsamplers", self.get("upsamplers", [])):
            x = layer(x)
        return x
