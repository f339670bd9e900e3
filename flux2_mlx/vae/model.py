"""The FLUX.2 autoencoder: images to latents and back, and latents to normalised tokens and back.

Source: `AutoEncoder` of the FLUX.2 reference code; names of diffusers' `AutoencoderKLFlux2`.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..config import VAEConfig
from ..device import direct_convolutions
from .layers import Conv2d, Downsample, GroupNorm, Level, MidBlock, Upsample
from .strips import STRIP_BYTES, Rows, Runner, Stored


def patches(latents: mx.array) -> mx.array:
    """Tokens `[B, h·w, 4c]`, each a 2×2 patch of latents: token channel = 4·channel + 2·row + column."""
    B, H, W, C = latents.shape
    return latents.reshape(B, H // 2, 2, W // 2, 2, C).transpose(0, 1, 3, 5, 2, 4).reshape(B, -1, 4 * C)


def unpatched(tokens: mx.array, height: int, width: int) -> mx.array:
    """The inverse of `patches` for `height`×`width` tokens."""
    B, _, C = tokens.shape
    x = tokens.reshape(B, height, width, C // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(B, 2 * height, 2 * width, C // 4)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.block_out_channels
        groups = config.norm_num_groups
        self.conv_in = Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = [
            Level(before, after, config.layers_per_block, groups)
            for before, after in zip((channels[0], *channels), channels, strict=False)
        ]
        for level, width in zip(self.down_blocks[:-1], channels, strict=False):
            level.downsamplers = [Downsample(width)]
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = GroupNorm(channels[-1], groups)
        self.conv_out = Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def __call__(self, x: Rows) -> Rows:
        x = self.conv_in(x).store()
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out.silu(x))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.decoder_channels[::-1]
        groups = config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = [
            Level(before, after, config.layers_per_block + 1, groups)
            for before, after in zip((channels[0], *channels), channels, strict=False)
        ]
        for level, width in zip(self.up_blocks[:-1], channels, strict=False):
            level.upsamplers = [Upsample(width)]
        self.conv_norm_out = GroupNorm(channels[-1], groups)
        self.conv_out = Conv2d(channels[-1], 3, 3, padding=1)

    def __call__(self, z: Rows) -> Rows:
        x = self.mid_block(self.conv_in(z).store())
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out.silu(x))


class LatentStatistics(nn.Module):
    """Mean and variance of each token channel over the training images (an inference-time batch norm)."""

    def __init__(self, channels: int):
        super().__init__()
        self.running_mean = mx.zeros((channels,))
        self.running_var = mx.ones((channels,))


class VAE(nn.Module):
    """Latents are `[B, H/8, W/8, c]`, tokens `[B, h·w, 4c]` with h = H/16 and w = W/16 (released models: c = 32)."""

    decoder: Callable[[Rows], Rows]

    def __init__(self, config: VAEConfig):
        super().__init__()
        c = config.latent_channels
        self._eps = config.batch_norm_eps
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = Conv2d(c, c, 1)
        self.bn = LatentStatistics(config.token_channels)

    def encode(self, images: mx.array, strip_bytes: int = STRIP_BYTES) -> mx.array:
        """Mean latents of images `[B, H, W, 3]` in −1..1 with sides that are multiples of 16.

        The layers run in strips of rows; `strip_bytes` is what they may allocate for one strip beside the activations
        that they keep.
        """
        with direct_convolutions():
            moments = self._encode(Stored([images], Runner(strip_bytes))).whole()
        return mx.split(moments, 2, axis=-1)[0]

    def decode(self, latents: mx.array, strip_bytes: int = STRIP_BYTES) -> mx.array:
        """Images `[B, H, W, 3]`, about −1..1 and not clipped; `strip_bytes` as in `encode`."""
        with direct_convolutions():
            return self._decode(Stored([latents], Runner(strip_bytes))).whole()

    def to_tokens(self, latents: mx.array) -> mx.array:
        """Gather patches of latents, and normalise them."""
        return (patches(latents) - self.bn.running_mean) / self._std()

    def from_tokens(self, tokens: mx.array, height: int, width: int) -> mx.array:
        """The inverse of `to_tokens` for `height`×`width` tokens."""
        return unpatched(tokens * self._std() + self.bn.running_mean, height, width)

    def _encode(self, images: Rows) -> Stored:
        return self.quant_conv(self.encoder(images)).store()

    def _decode(self, latents: Stored) -> Stored:
        return self.decoder(self.post_quant_conv(latents)).store()

    def _std(self) -> mx.array:
        return mx.sqrt(self.bn.running_var + self._eps)
