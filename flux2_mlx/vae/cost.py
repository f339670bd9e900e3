"""What the autoencoder takes beside its weights."""

from dataclasses import dataclass

import mlx.core as mx

from ..config import VAEConfig
from .model import VAE
from .strips import STRIP_BYTES, Meter, Stored


@dataclass(frozen=True)
class VAECost:
    """Costs of an autoencoder of such a geometry, computing in `dtype`, whose strips allocate up to `strip_bytes`.

    They are counted by running it without computing, and at most some 15 % above what is measured, never below.
    """

    config: VAEConfig
    dtype: mx.Dtype
    strip_bytes: int = STRIP_BYTES

    def encoding(self, height: int, width: int) -> int:
        """Peak bytes of encoding one image of `height`×`width` pixels, above weights and input."""
        meter = Meter(self.strip_bytes)
        VAE(self.config)._encode(Stored([mx.zeros((1, height, width, 3), self.dtype)], meter))
        return meter.peak

    def decoding(self, height: int, width: int) -> int:
        """Peak bytes of decoding one image of `height`×`width` pixels, above weights and input."""
        meter = Meter(self.strip_bytes)
        scale = self.config.scale_factor
        latents = mx.zeros((1, height // scale, width // scale, self.config.latent_channels), self.dtype)
        VAE(self.config)._decode(Stored([latents], meter))
        return meter.peak
