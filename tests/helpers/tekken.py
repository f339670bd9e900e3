"""Mistral's tekken vocabulary as a tokenizer of the `tokenizers` library, as in the released models."""

import base64
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = {
    0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 10: "[IMG]", 11: "<pad>", 12: "[IMG_BREAK]",
    13: "[IMG_END]", 17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]",
}  # fmt: skip


def special_tokens(count: int) -> list[str]:
    """The first `count` special tokens; those that no prompt of ours holds have placeholders."""
    return [SPECIAL_TOKENS.get(number, f"<SPECIAL_{number}>") for number in range(count)]


def tekken_tokenizer(tekken: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a parsed `tekken.json`: ordinary tokens have their rank behind the special tokens."""
    config = tekken["config"]
    special = special_tokens(config["default_num_special_tokens"])
    tokens = [base64.b64decode(x["token_bytes"]) for x in tekken["vocab"]]
    tokens = tokens[: config["default_vocab_size"] - len(special)]
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in tokens}
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        parts = [(a, b) for a, b in parts if a in ranks and b in ranks]
        merges += [(spelled[a], spelled[b]) for a, b in sorted(parts, key=lambda x: (ranks[x[0]], ranks[x[1]]))]
    vocabulary = {token: number for number, token in enumerate([*special, *spelled.values()])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in GPT-2's byte-level vocabularies: itself, or the next one from Ā on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
