"""What the autoencoder takes beside its weights."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx

from ..config import VAEConfig
from ..device import on_gpu
from .strips import STRIP_BYTES, Meter, Stored
from .tiny import autoencoder


@dataclass(frozen=True)
class VAECost:
    """Costs of an autoencoder of such a geometry, computing in `dtype`, whose strips allocate up to `strip_bytes`.

    They are counted by running it without computing, and at most some 15 % above what is measured, never below.
    """

    config: VAEConfig
    dtype: mx.Dtype
    strip_bytes: int = STRIP_BYTES

    @property
    def ways(self) -> "Iterator[VAECost]":
        """These costs with strips of each size that this device has a use for, the largest first. A GPU stands still
        after every strip, 401 times while klein-4b decodes an image of 1024², and 132 times with those of 1 GiB."""
        return (replace(self, strip_bytes=times * self.strip_bytes) for times in ((8, 4, 2, 1) if on_gpu() else (1,)))

    def encoding(self, height: int, width: int) -> int:
        """Peak bytes of encoding one image of `height`×`width` pixels, above weights and input."""
        meter = Meter(self.strip_bytes)
        autoencoder(self.config)._encode(Stored([mx.zeros((1, height, width, 3), self.dtype)], meter))
        return meter.peak

    def decoding(self, height: int, width: int) -> int:
        """Peak bytes of decoding one image of `height`×`width` pixels, above weights and input."""
        meter = Meter(self.strip_bytes)
        scale = self.config.scale_factor
        latents = mx.zeros((1, height // scale, width // scale, self.config.latent_channels), self.dtype)
        autoencoder(self.config)._decode(Stored([latents], meter))
        return meter.peak

    def decoding_operations(self, height: int, width: int) -> int:
        """Operations of all convolutions and attention of decoding one image of `height`×`width` pixels."""
        config = self.config
        widths = config.decoder_channels[::-1]
        c = config.latent_channels
        pixels = height * width // config.scale_factor**2
        total = pixels * (c * c + 9 * c * widths[0]) + _middle(widths[0], pixels)
        for level, (before, after) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            total += pixels * _level(before, after, config.layers_per_block + 1)
            if level < len(widths) - 1:
                pixels *= 4
                total += pixels * 9 * after**2
        return 2 * (total + pixels * 9 * widths[-1] * 3)

    def encoding_operations(self, height: int, width: int) -> int:
        """Operations of all convolutions and attention of encoding one image of `height`×`width` pixels."""
        config = self.config
        widths = config.block_out_channels
        c = config.latent_channels
        pixels = height * width
        total = pixels * 9 * 3 * widths[0]
        for level, (before, after) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            total += pixels * _level(before, after, config.layers_per_block)
            if level < len(widths) - 1:
                pixels //= 4
                total += pixels * 9 * after**2
        return 2 * (total + _middle(widths[-1], pixels) + pixels * (9 * widths[-1] * 2 * c + 4 * c * c))


def _level(before: int, after: int, blocks: int) -> int:
    """Multiplications a pixel of the residual blocks of a level."""
    first = 9 * before * after + (before * after if before != after else 0)
    return first + 9 * after**2 * (2 * blocks - 1)


def _middle(channels: int, pixels: int) -> int:
    """Multiplications of the lowest level, where every pixel attends to every other one."""
    return pixels * (_level(channels, channels, 2) + 4 * channels**2 + 2 * pixels * channels)
