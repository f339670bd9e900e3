"""Text encoders, their tokenizers, and text generation."""

from .cost import TextCost, VisionCost
from .decoder import LanguageModel, LaterLayers, TextEncoder
from .pixtral import PixtralVision
from .tokenizer import DevTokenizer, KleinTokenizer, PromptTokenizer

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)
TOKENIZERS: dict[str, type[PromptTokenizer]] = {"qwen3": KleinTokenizer, "mistral3": DevTokenizer}

__all__ = [
    "TOKENIZERS",
    "TOKENIZER_FILES",
    "DevTokenizer",
    "KleinTokenizer",
    "LanguageModel",
    "LaterLayers",
    "PixtralVision",
    "PromptTokenizer",
    "TextCost",
    "TextEncoder",
    "VisionCost",
]
