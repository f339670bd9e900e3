"""Text encoders and their tokenizers."""

from .qwen3 import Qwen3Encoder
from .tokenizer import KleinTokenizer

__all__ = ["KleinTokenizer", "Qwen3Encoder"]
