"""The FLUX.2 diffusion transformer (MMDiT)."""

from .blocks import KeysValues
from .cost import TransformerCost
from .model import Flux2Transformer
from .rope import image_ids, rope_table, text_ids

__all__ = ["Flux2Transformer", "KeysValues", "TransformerCost", "image_ids", "rope_table", "text_ids"]
