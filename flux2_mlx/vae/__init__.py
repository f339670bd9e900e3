"""The FLUX.2 autoencoder."""

from .cost import VAECost
from .model import VAE, patches, unpatched
from .strips import STRIP_BYTES
from .tiny import TinyDecoder, TinyVAEConfig, autoencoder

__all__ = ["STRIP_BYTES", "VAE", "TinyDecoder", "TinyVAEConfig", "VAECost", "autoencoder", "patches", "unpatched"]
