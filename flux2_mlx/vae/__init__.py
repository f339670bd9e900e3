"""The FLUX.2 autoencoder."""

from .model import VAE

__all__ = ["VAE"]
