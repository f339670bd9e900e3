"""The FLUX.2 autoencoder."""

from .cost import VAECost
from .model import VAE

__all__ = ["VAE", "VAECost"]
