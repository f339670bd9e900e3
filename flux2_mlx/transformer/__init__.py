"""The FLUX.2 diffusion transformer (MMDiT)."""

from .blocks import TOKENS_PER_PART, KeysValues
from .model import Flux2Transformer
from .rope import image_ids, rope_table, text_ids

__all__ = ["TOKENS_PER_PART", "Flux2Transformer", "KeysValues", "image_ids", "rope_table", "text_ids"]
