"""Prompts to token ids, and generated ids back to text."""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .chat_template import check_template
from .prompts import ENCODE, IMAGE, mistral_chat, qwen3_chat
from .tokenizer_config import CONFIG, TokenizerSettings, read_settings
from .tokenizer_file import add_tokens, answers, check_vocabulary, read_tokenizer

_NO_TOOLS: dict[str, None] = {"tools": None, "documents": None}


class PromptTokenizer(ABC):
    """A `tokenizer.json` with the chat template, padding and end of text of a model family.

    Files that lie beside it are read as transformers does: they may name another token or side of padding, the side
    where long prompts are cut, and further tokens. Other chat templates are refused.

    Args:
        path: of the file.
        vocab_size: tokens that the model has rows for; None: as many as it takes.

    Raises:
        CheckpointError: `path` is no tokenizer file, of another model, or gives ids that the model has no row for; or
            a file beside it asks for what is not implemented.
    """

    named: dict[str, str]  # special tokens that a config need not name, by key
    pads_left: bool  # where nothing is said
    pads_as_file: bool  # whether the padding token of `tokenizer.json` counts
    begins_with_first: bool  # whether a template that writes the first token keeps the post-processor from adding it
    fixed: dict[str, tuple[Any, ...]]  # keys of `tokenizer_config.json` that must have one of these values
    probes: tuple[str, ...]  # prompts that tell another template
    ends: tuple[str, ...]
    chat_tokens: tuple[str, ...]

    def __init__(self, path: Path, vocab_size: int | None = None):
        self._path = path
        self._vocab_size = vocab_size
        self._tokenizer = read_tokenizer(path)
        settings = read_settings(path.parent, self.fixed)
        with answers(path):
            padding = self._tokenizer.padding or {}
            truncation = self._tokenizer.truncation or {}
            processor = self._tokenizer.post_processor
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            self._tokenizer.post_processor = None
        self._check_tokens()
        named = self._names(settings, padding)
        self._pads_left = _is_left(settings.pads_left, padding, self.pads_left)
        self._cuts_left = _is_left(settings.cuts_left, truncation, False)
        vocabulary = self._extend(settings)
        pad = named.get("pad_token")
        if pad not in vocabulary:
            shown = reprlib.repr(pad)
            raise CheckpointError(
                f"{path.with_name(CONFIG)}: pad_token is {shown}, but prompts are padded; name a token"
            )
        self._pad_id = vocabulary[pad]
        self._check_processor(processor, named.get("bos_token"))
        if settings.template:
            calls = [self.template_call(prompt) | named for prompt in self.probes]
            check_template(*settings.template, calls, [self.chat(prompt) for prompt in self.probes])

    def _names(self, settings: TokenizerSettings, padding: dict[str, Any]) -> dict[str, str]:
        """The special tokens that have a name: those of the family, unless the files say otherwise."""
        of_file = {"pad_token": padding["pad_token"]} if padding and self.pads_as_file else {}
        stated = {key: token and token["content"] for key, token in settings.named.items()}
        return {key: token for key, token in (self.named | of_file | stated).items() if token}

    def _check_tokens(self) -> None:
        path = self._path
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        check_vocabulary(vocabulary, self._vocab_size, path)
        for token in dict.fromkeys((*self.ends, *self.chat_tokens)):
            if token not in vocabulary:
                raise CheckpointError(f"{path} has no {token} token; it belongs to another model")
            if self.encode(token) != [vocabulary[token]]:
                raise CheckpointError(f"{path} does not read {token} as one token; it belongs to another model")
        if self.count("a") <= self.count(""):  # and some fail only when they are used
            raise CheckpointError(f"{path} reads nothing of a prompt; it is damaged or belongs to another model")
        self.end_ids = frozenset(vocabulary[token] for token in self.ends)
        self.image_id = vocabulary.get(IMAGE)

    def _extend(self, settings: TokenizerSettings) -> dict[str, int]:
        """Add the tokens that stand beside the file; gives the vocabulary."""
        with answers(self._path):
            add_tokens(self._tokenizer, settings)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        check_vocabulary(vocabulary, self._vocab_size, self._path)
        return vocabulary

    def _check_processor(self, processor: Any, first: str | None) -> None:
        """CheckpointError if the file's post-`processor`, as transformers uses it, changes the ids of a text.

        It is to add no special tokens where dev's template has begun with the `first` one.
        """
        special = not (first and self.begins_with_first and self.chat("").startswith(first))
        ids = self.encode("a")
        with answers(self._path):
            self._tokenizer.post_processor = processor
            processed = self._tokenizer.encode("a", add_special_tokens=special).ids
            self._tokenizer.post_processor = None
        if ids != processed:
            raise CheckpointError(
                f"{self._path}: its post_processor adds to the tokens of a prompt, FLUX.2 adds none, and nothing else "
                "is implemented"
            )

    @property
    def size(self) -> int:
        """How many tokens there are, the added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @abstractmethod
    def chat(self, prompt: str, system: str | None = None) -> str:
        """`prompt` in the family's chat template."""

    @abstractmethod
    def template_call(self, prompt: str) -> dict[str, Any]:
        """What diffusers gives to the chat template of a model for `prompt`."""

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

    def ids(self, prompt: str) -> list[int]:
        """Ids of `prompt` in its template, all of them."""
        return self.encode(self.chat(prompt))

    def count(self, prompt: str) -> int:
        """How many tokens `ids` gives."""
        return len(self.ids(prompt))

    def __call__(self, prompts: list[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and attention mask of prompts; see `padded`."""
        return self.padded([self.ids(prompt) for prompt in prompts], max_length)

    def padded(self, prompts: Sequence[list[int]], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and attention mask, int32 and boolean `[B, max_length]`, of what `ids` gives of prompts.

        A long prompt is cut, on the right unless the model's files say otherwise, the end of its template included; a
        short one is padded.
        """
        ids = np.full((len(prompts), max_length), self._pad_id, dtype=np.int32)
        mask = np.zeros((len(prompts), max_length), dtype=bool)
        for row, tokens in enumerate(prompts):
            tokens = tokens[max(0, len(tokens) - max_length) :] if self._cuts_left else tokens[:max_length]
            place = slice(max_length - len(tokens), None) if self._pads_left else slice(len(tokens))
            ids[row, place] = tokens
            mask[row, place] = True
        return ids, mask


class KleinTokenizer(PromptTokenizer):
    """Qwen3's tokenizer, for the klein models."""

    named = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
    pads_left = pads_as_file = begins_with_first = False
    fixed = {"add_prefix_space": (False, None)}  # noqa: RUF012 (nothing writes to it)
    probes = ("a red fox, in snow", "", " two\nlines & <tags> ")
    ends = ("<|endoftext|>", "<|im_end|>")
    chat_tokens = ("<|im_start|>", "<think>", "</think>")

    def chat(self, prompt: str, system: str | None = None) -> str:
        return qwen3_chat(prompt, system)

    def template_call(self, prompt: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"messages": messages, "add_generation_prompt": True, "enable_thinking": False, **_NO_TOOLS}


class DevTokenizer(PromptTokenizer):
    """Mistral's tokenizer, for dev."""

    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}  # noqa: RUF012
    pads_left = pads_as_file = begins_with_first = True
    fixed = {}  # noqa: RUF012
    probes = ("a red fox, in snow", "two\nlines & <tags>")
    ends = ("</s>",)
    chat_tokens = ("<pad>", "<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", IMAGE)

    def chat(self, prompt: str, system: str | None = None) -> str:
        return mistral_chat(prompt) if system is None else mistral_chat(prompt, system)

    def template_call(self, prompt: str) -> dict[str, Any]:
        texts = {"system": ENCODE, "user": prompt}
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
        return {"messages": messages, "add_generation_prompt": False, **_NO_TOOLS}


def _is_left(stated: bool | None, section: dict[str, Any], default: bool) -> bool:
    """The side that is `stated` beside the tokenizer, else in a `section` of its file, else the family's."""
    if stated is not None:
        return stated
    return section["direction"] == "left" if section else default
