"""The FLUX.2 autoencoder."""

from .model import VAE, activation_bytes

__all__ = ["VAE", "activation_bytes"]
