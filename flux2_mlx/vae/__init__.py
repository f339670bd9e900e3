"""The FLUX.2 autoencoder."""

from .cost import VAECost
from .model import VAE, patches, unpatched
from .tiny import TinyDecoder, TinyVAEConfig, autoencoder

__all__ = ["VAE", "TinyDecoder", "TinyVAEConfig", "VAECost", "autoencoder", "patches", "unpatched"]
