"""A small byte-level BPE tokenizer with the released models' structure and chat template."""

from __future__ import annotations

import numpy as np
from prompts import sample_prompt
from scenes import sample_training_scene
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

VOCABULARY = 512
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINKING = ("<think>", "</think>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def chat_text(prompt: str) -> str:
    """What the text encoder reads for `prompt`: the chat template with thinking turned off."""
    return f"{START}user\n{prompt}{END}\n{START}assistant\n<think>\n\n</think>\n\n"


def train_tokenizer(sentences: int = 20_000, seed: int = 0) -> Qwen2Tokenizer:
    """A tokenizer of at most 512 entries, fitted to prompts of training scenes."""
    rng = np.random.default_rng(seed)
    texts = [sample_prompt(sample_training_scene(rng), rng, plain=0.2) for _ in range(sentences)]
    # The template's own words have no special token, and are in every text.
    texts += ["user\n", "assistant\n", "\n\n", "system\n"] * (sentences // 4)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END, *THINKING]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special[:3]])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in special[3:]])
    return Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,
        model_max_length=4096,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )
