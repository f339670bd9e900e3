"""The FLUX.2 diffusion transformer (MMDiT)."""

from .blocks import KeysValues
from .cost import TransformerCost, pass_operations, pass_products
from .execution import PLAIN, Execution
from .model import Flux2Transformer, Shared
from .rope import image_ids, rope_table, text_ids

__all__ = [
    "PLAIN",
    "Execution",
    "Flux2Transformer",
    "KeysValues",
    "Shared",
    "TransformerCost",
    "image_ids",
    "pass_operations",
    "pass_products",
    "rope_table",
    "text_ids",
]
