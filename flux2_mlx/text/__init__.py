"""Text encoders, their tokenizers, and text generation."""

from .decoder import LanguageModel, LaterLayers, TextEncoder
from .pixtral import PixtralVision
from .tokenizer import DevTokenizer, KleinTokenizer, PromptTokenizer

TOKENIZERS: dict[str, type[PromptTokenizer]] = {"qwen3": KleinTokenizer, "mistral3": DevTokenizer}

__all__ = [
    "TOKENIZERS",
    "DevTokenizer",
    "KleinTokenizer",
    "LanguageModel",
    "LaterLayers",
    "PixtralVision",
    "PromptTokenizer",
    "TextEncoder",
]
