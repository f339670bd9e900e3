"""Prompts to token ids."""

from pathlib import Path

import numpy as np

from ..errors import CheckpointError

# The Qwen3 chat template for one user message with thinking switched off.
KLEIN_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_PAD = "<|endoftext|>"


class KleinTokenizer:
    """Qwen's tokenizer with the template of the klein models.

    Raises:
        CheckpointError: `path` is no tokenizer file, or of another model.
    """

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer file: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._pad = self._tokenizer.token_to_id(_PAD)
        if self._pad is None:
            raise CheckpointError(f"{path} has no {_PAD} token; it belongs to another model")

    def count(self, prompt: str) -> int:
        """Tokens of `prompt` in its template, before truncation."""
        return len(self._ids(prompt))

    def __call__(self, prompts: list[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and attention mask, int32 and boolean `[B, max_length]`.

        A long prompt is cut on the right, its template suffix included; a short one is padded on the right.
        """
        ids = np.full((len(prompts), max_length), self._pad, dtype=np.int32)
        mask = np.zeros((len(prompts), max_length), dtype=bool)
        for row, prompt in enumerate(prompts):
            tokens = self._ids(prompt)[:max_length]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

    def _ids(self, prompt: str) -> list[int]:
        return self._tokenizer.encode(KLEIN_TEMPLATE.format(prompt), add_special_tokens=False).ids
