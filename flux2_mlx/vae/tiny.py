"""TAEF2, a tiny decoder of FLUX.2's latents: no attention and no sampling, three convolutions a block.

Source: `Decoder` of madebyollin's `taesd.py`, whose numbers of layers these are.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..config import VAEConfig
from ..device import direct_convolutions
from .layers import Conv2d, GroupNorm
from .model import VAE, unpatched
from .strips import STRIP_BYTES, Doubled, Mapped, Rows, Runner, Stored, Sum

_WIDTH = 64
_POOLED = 4 * _WIDTH
_GROUPS = 4
_EPS = 1e-5  # PyTorch's for group norms
_LIMIT = 3.0  # latents are pressed together between −3 and 3


def _relu(x: Rows) -> Rows:
    return Mapped(x, lambda rows: mx.maximum(rows, 0))


class Pool(nn.Module):
    """What the normalised features of the whole image add to each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = Conv2d(_WIDTH, _POOLED, 1, bias=False)
        self.norm = GroupNorm(_POOLED, _GROUPS, _EPS)
        self.narrow = Conv2d(_POOLED, _WIDTH, 1, bias=False)

    def __call__(self, x: Rows) -> Rows:
        return self.narrow(_relu(self.norm(self.widen(x).store(keep=True))))


class Block(nn.Module):
    """Three convolutions, with the input added; with `pooled` what the image as a whole adds comes first."""

    def __init__(self, pooled: bool = False):
        super().__init__()
        self.conv = [Conv2d(_WIDTH, _WIDTH, 3, padding=1) for _ in range(3)]
        if pooled:
            self.pool = Pool()

    def __call__(self, x: Rows) -> Rows:
        if "pool" in self:
            x = Sum(x, self.pool(x)).store()
        y = x
        for conv in self.conv[:-1]:
            y = _relu(conv(y)).store(keep=y is x)  # x is added below
        return _relu(Sum(self.conv[-1](y), x)).store()


class TinyDecoder(nn.Module):
    """From normalised latents `[B, H/8, W/8, c]` to images `[B, H, W, 3]`, about 0..1 and not clipped."""

    def __init__(self, latent_channels: int):
        super().__init__()
        self.conv_in = Conv2d(latent_channels, _WIDTH, 3, padding=1)
        self.blocks = [[Block(pooled=level == 0) for _ in range(3)] for level in range(3)]
        self.up = [Conv2d(_WIDTH, _WIDTH, 3, padding=1, bias=False) for _ in range(3)]
        self.block_out = Block()
        self.conv_out = Conv2d(_WIDTH, 3, 3, padding=1)

    def __call__(self, z: Rows) -> Rows:
        x: Rows = _relu(self.conv_in(Mapped(z, lambda rows: mx.tanh(rows / _LIMIT) * _LIMIT))).store()
        for blocks, up in zip(self.blocks, self.up, strict=True):
            for block in blocks:
                x = block(x)
            x = up(Doubled(x)).store()
        return self.conv_out(self.block_out(x))

    def decode(self, latents: mx.array, strip_bytes: int = STRIP_BYTES) -> mx.array:
        """Images of normalised latents; `strip_bytes` as for `VAE.encode`."""
        with direct_convolutions():
            return self(Stored([latents], Runner(strip_bytes))).store().whole()


@dataclass(frozen=True)
class TinyVAEConfig(VAEConfig):
    """Geometry of an autoencoder whose decoder is TAEF2; the other fields are the encoder's."""


class TinyVAE(VAE):
    """FLUX.2's encoder and statistics with TAEF2's decoder."""

    def __init__(self, config: VAEConfig):
        super().__init__(config)
        self.decoder = TinyDecoder(config.latent_channels)
        del self.post_quant_conv

    def _decode(self, latents: Stored) -> Stored:
        _, H, W, _ = latents.shape
        tokens = self.to_tokens(latents.whole().astype(mx.float32))
        normalised = unpatched(tokens, H // 2, W // 2).astype(latents.dtype)
        pixels = self.decoder(Stored([normalised], latents.runner))
        return Mapped(pixels, lambda rows: 2 * rows - 1).store()  # in 0..1 as TAEF2 gives them


def autoencoder(config: VAEConfig) -> VAE:
    """The autoencoder of a geometry."""
    return TinyVAE(config) if isinstance(config, TinyVAEConfig) else VAE(config)
