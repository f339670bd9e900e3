"""Prompts to token ids, and generated ids back to text."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from .prompts import IMAGE, mistral_chat, qwen3_chat


class PromptTokenizer(ABC):
    """A `tokenizer.json` with the chat template, padding and end of text of a model family.

    Raises:
        CheckpointError: `path` is no tokenizer file, or of another model.
    """

    pad: str
    pads_left: bool
    ends: tuple[str, ...]

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer file: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        special = {token: self._tokenizer.token_to_id(token) for token in (self.pad, *self.ends)}
        for token, number in special.items():
            if number is None:
                raise CheckpointError(f"{path} has no {token} token; it belongs to another model")
        self._pad_id = special[self.pad]
        self.end_ids = frozenset(special[token] for token in self.ends)
        self.image_id = self._tokenizer.token_to_id(IMAGE)

    @abstractmethod
    def chat(self, prompt: str, system: str | None = None) -> str:
        """`prompt` in the family's chat template."""

    def encode(self, text: str) -> list[int]:
        """Ids of text that is already in its template."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def count(self, prompt: str) -> int:
        """Tokens of `prompt` in its template, before truncation."""
        return len(self.encode(self.chat(prompt)))

    def __call__(self, prompts: list[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and attention mask, int32 and boolean `[B, max_length]`.

        A long prompt is cut on the right, the end of its template included; a short one is padded.
        """
        ids = np.full((len(prompts), max_length), self._pad_id, dtype=np.int32)
        mask = np.zeros((len(prompts), max_length), dtype=bool)
        for row, prompt in enumerate(prompts):
            tokens = self.encode(self.chat(prompt))[:max_length]
            place = slice(max_length - len(tokens), None) if self.pads_left else slice(len(tokens))
            ids[row, place] = tokens
            mask[row, place] = True
        return ids, mask


class KleinTokenizer(PromptTokenizer):
    """Qwen3's tokenizer, for the klein models."""

    pad = "<|endoftext|>"
    pads_left = False
    ends = ("<|im_end|>", "<|endoftext|>")

    def chat(self, prompt: str, system: str | None = None) -> str:
        return qwen3_chat(prompt, system)


class DevTokenizer(PromptTokenizer):
    """Mistral's tokenizer, for dev."""

    pad = "<pad>"
    pads_left = True
    ends = ("</s>",)

    def chat(self, prompt: str, system: str | None = None) -> str:
        return mistral_chat(prompt) if system is None else mistral_chat(prompt, system)
