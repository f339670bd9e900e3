"""The FLUX.2 diffusion transformer (MMDiT)."""

from .model import Flux2Transformer
from .rope import image_ids, rope_table, text_ids

__all__ = ["Flux2Transformer", "image_ids", "rope_table", "text_ids"]
