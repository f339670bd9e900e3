"""Layers of the autoencoder, channels-last. Attribute names follow diffusers' `AutoencoderKLFlux2`."""

import mlx.core as mx
import mlx.nn as nn

from ..layers import attention

_EPS = 1e-6


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm that numbers its groups as PyTorch does."""
    return nn.GroupNorm(groups, channels, eps=_EPS, pytorch_compatible=True)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.conv1(nn.silu(self.norm1(x)))
        y = self.conv2(nn.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if "conv_shortcut" in self else x)


class Attention(nn.Module):
    """Single-head attention over all positions, with the input added."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = group_norm(channels, groups)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = [nn.Linear(channels, channels)]

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, C = x.shape
        y = self.group_norm(x).reshape(B, 1, H * W, C)
        y = attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y).reshape(B, H, W, C)


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attentions = [Attention(channels, groups)]
        self.resnets = [ResnetBlock(channels, channels, groups) for _ in range(2)]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.resnets[0](x)
        mx.eval(x)
        x = self.attentions[0](x)
        mx.eval(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Halve both sides; the zero padding is on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """Double both sides by repeating pixels, then smooth."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2))


class Level(nn.Module):
    """The residual blocks of one resolution, and the step to the next one unless it is the last."""

    def __init__(self, in_channels: int, out_channels: int, count: int, groups: int):
        super().__init__()
        self.resnets = [
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(count)
        ]

    def __call__(self, x: mx.array) -> mx.array:
        # Evaluating block by block frees each block's activations before the next one's are allocated.
        for resnet in self.resnets:
            x = resnet(x)
            mx.eval(x)
        for resample in self.get("downsamplers", self.get("upsamplers", [])):
            x = resample(x)
            mx.eval(x)
        return x
