"""Prompts to token ids, and generated ids back to text."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from .prompts import IMAGE, mistral_chat, qwen3_chat
from .tokenizer_file import answers, check_vocabulary, read_tokenizer


class PromptTokenizer(ABC):
    """A `tokenizer.json` with the chat template, padding and end of text of a model family.

    Args:
        path: of the file.
        vocab_size: tokens that the model has rows for; None: as many as it takes.

    Raises:
        CheckpointError: `path` is no tokenizer file, of another model, or gives ids that the model has no row for.
    """

    pad: str
    pads_left: bool
    ends: tuple[str, ...]
    chat_tokens: tuple[str, ...]

    def __init__(self, path: Path, vocab_size: int | None = None):
        self._path, self._vocab_size = path, vocab_size
        self._tokenizer = read_tokenizer(path)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        check_vocabulary(vocabulary, vocab_size, path)
        for token in dict.fromkeys((self.pad, *self.ends, *self.chat_tokens)):
            if token not in vocabulary:
                raise CheckpointError(f"{path} has no {token} token; it belongs to another model")
            if self.encode(token) != [vocabulary[token]]:
                raise CheckpointError(f"{path} does not read {token} as one token; it belongs to another model")
        if self.count("a") <= self.count(""):  # and some fail only when they are used
            raise CheckpointError(f"{path} reads nothing of a prompt; it is damaged or belongs to another model")
        self._pad_id = vocabulary[self.pad]
        self.end_ids = frozenset(vocabulary[token] for token in self.ends)
        self.image_id = vocabulary.get(IMAGE)

    @abstractmethod
    def chat(self, prompt: str, system: str | None = None) -> str:
        """`prompt` in the family's chat template."""

    def encode(self, text: str) -> list[int]:
        """Ids of text that is already in its template."""
        with answers(self._path):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._vocab_size is not None and max(ids, default=0) >= self._vocab_size:
            raise CheckpointError(
                f"{self._path} gives the token id {max(ids)}, but the text encoder has only {self._vocab_size} tokens"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens."""
        with answers(self._path):
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
    chat_tokens = ("<|im_start|>", "<think>", "</think>")

    def chat(self, prompt: str, system: str | None = None) -> str:
        return qwen3_chat(prompt, system)


class DevTokenizer(PromptTokenizer):
    """Mistral's tokenizer, for dev."""

    pad = "<pad>"
    pads_left = True
    ends = ("</s>",)
    chat_tokens = ("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", IMAGE)

    def chat(self, prompt: str, system: str | None = None) -> str:
        return mistral_chat(prompt) if system is None else mistral_chat(prompt, system)
