"""A vocabulary and its merges as the `tokenizers` library has them: those of Qwen's repositories, and tekken's."""

import base64
import binascii
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

# Source: the tokenizers that Qwen released, as transformers' `Qwen2Tokenizer` makes them of vocab.json and merges.txt.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Source: mistral-common's `Tekkenizer`, of files that name none.
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_MARKER = re.compile(r"</?[^<>\s]+>")
_MAX_TOKENS = 1 << 19  # twice those of the largest vocabulary in use
_MAX_TOKEN = 1 << 10  # bytes; the longest of a released vocabulary have 128
_MAX_BYTES = 8 << 20  # of all tokens; those of tekken have one million
_MAX_PATTERN = 1 << 12  # characters


def qwen_tokenizer(vocabulary: Mapping[str, Any], merges: str, added: Sequence[tuple[int, dict[str, Any]]]) -> Any:
    """Qwen's tokenizer.

    Args:
        vocabulary: the id of each token, which is spelled in the letters of bytes.
        merges: two tokens a line, the most frequent first.
        added: tokens that text is not split in, by id, each as `tokenizers.AddedToken` takes it.

    Raises:
        ValueError: they do not belong together, or some are missing.
    """
    from tokenizers import AddedToken, normalizers

    pairs = _pairs(merges)
    _check_vocabulary(vocabulary, pairs)
    tokenizer = _byte_level(vocabulary, pairs, _QWEN, ignore_merges=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(**token) for _, token in added])
    for number, token in added:
        if (found := tokenizer.token_to_id(token["content"])) != number:
            raise ValueError(f"the added token {token['content']!r:.80} has id {number}, where {found} is the next")
    return tokenizer


def unmade(vocabulary: Mapping[str, Any], merges: str) -> dict[str, Any]:
    """The tokens that no merge makes, with their ids, if all of them are written as markers, such as `<|im_end|>`:
    those of a vocabulary that has its added tokens with the others. None otherwise, as merges are missing then."""
    made = {first + second for first, second in _pairs(merges)}.union(_letters())
    found = {token: number for token, number in vocabulary.items() if token not in made}
    return found if all(map(_MARKER.fullmatch, found)) else {}


def _pairs(merges: str) -> list[tuple[str, str]]:
    lines = [line.rstrip("\r") for line in merges.split("\n")]
    if lines[0].startswith("#version"):
        del lines[0]
    pairs = [tuple(line.split(" ")) for line in lines if line]
    if wrong := next((pair for pair in pairs if len(pair) != 2 or not all(pair)), None):
        raise ValueError(f"the merge {reprlib.repr(' '.join(wrong))} is not of two tokens")
    if len(set(pairs)) != len(pairs):
        raise ValueError("a merge stands there twice")
    return [(first, second) for first, second in pairs]


def _check_vocabulary(vocabulary: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    """ValueError if an id is none, or a token can't come of its bytes: text would be lost or split otherwise."""
    _check_size(vocabulary)
    if any(type(number) is not int for number in vocabulary.values()):
        raise ValueError("a token has an id that is no whole number")
    if sorted(vocabulary.values()) != [*range(len(vocabulary))]:
        raise ValueError(f"its {len(vocabulary)} tokens have other ids than 0 to {len(vocabulary) - 1}")
    letters = set(_letters())
    if absent := letters - vocabulary.keys():
        raise ValueError(f"{len(absent)} of the 256 bytes are no tokens")
    if unknown := next((x for pair in pairs for x in (*pair, "".join(pair)) if x not in vocabulary), None):
        raise ValueError(f"the merges make or take {reprlib.repr(unknown)}, which is no token")
    if lost := vocabulary.keys() - letters - {"".join(pair) for pair in pairs}:
        raise ValueError(f"no merge makes {len(lost)} of the tokens, such as {reprlib.repr(min(lost))}")


def tekken_tokenizer(values: Mapping[str, Any]) -> Any:
    """The tokenizer of a parsed `tekken.json`: ordinary tokens have their rank behind the special ones.

    Merges are listed as transformers' `MistralConverter` has them, which made the released tokenizers: for each token
    all the pairs that it can be made of.

    Raises:
        ValueError: it holds none.
    """
    config = values.get("config")
    entries = values.get("vocab")
    if not isinstance(config, dict) or not isinstance(entries, list):
        raise ValueError("it has no config and vocab of tekken")
    size = _number(config, "default_vocab_size")
    count = _number(config, "default_num_special_tokens")
    pattern = config.get("pattern")
    if not isinstance(pattern, str) or len(pattern) > _MAX_PATTERN:
        raise ValueError(f"its pattern is {reprlib.repr(pattern)}")
    if not 0 < count <= size - 256 or size - count > len(entries):
        raise ValueError(f"{size} tokens, {count} of them special, are not to be had of {len(entries)}")
    tokens = _tekken_tokens(entries[: size - count])
    special = _tekken_special(values.get("special_tokens"), count)
    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in tokens}
    vocabulary = {token: number for number, token in enumerate([*special, *spelled.values()])}
    if len(vocabulary) != size:
        raise ValueError("a special token is an ordinary one, too")
    merges = [(spelled[first], spelled[second]) for token in tokens for first, second in _splits(token, tokens)]
    tokenizer = _byte_level(vocabulary, merges, pattern, ignore_merges=True)
    tokenizer.add_special_tokens(special)
    return tokenizer


def _tekken_tokens(entries: Sequence[Any]) -> dict[bytes, int]:
    """The rank of each token."""
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(entries):
        if not isinstance(entry, dict) or type(entry.get("rank")) is not int or entry["rank"] != rank:
            raise ValueError(f"its token {rank} is {reprlib.repr(entry)}, of another rank")
        ranks[_decoded(entry)] = rank
    _check_size(ranks)
    if len(ranks) != len(entries):
        raise ValueError("it has a token twice")
    if [*ranks][:256] != [bytes([number]) for number in range(256)]:
        raise ValueError("its first 256 tokens are not the bytes")
    return ranks


def _decoded(entry: Mapping[str, Any]) -> bytes:
    try:
        return base64.b64decode(entry.get("token_bytes", ""), validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"a token is {reprlib.repr(entry)}, which is no base64") from error


def _tekken_special(entries: Any, count: int) -> list[str]:
    """The special tokens in their order; those without a name have placeholders."""
    if entries is None:
        entries = [{"rank": rank, "token_str": name} for rank, name in enumerate(_TEKKEN_SPECIAL[:count])]
    if not isinstance(entries, list) or len(entries) > count:
        raise ValueError(f"it has no list of at most {count} special tokens")
    names = [f"<SPECIAL_{rank}>" for rank in range(count)]
    for rank, entry in enumerate(entries):
        name = entry.get("token_str") if isinstance(entry, dict) else None
        if type(name) is not str or not name or type(entry.get("rank")) is not int or entry["rank"] != rank:
            raise ValueError(f"its special token {rank} is {reprlib.repr(entry)}")
        names[rank] = name
    if len(set(names)) != count:
        raise ValueError("it has a special token twice")
    return names


def _splits(token: bytes, ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that make `token`, those of the lowest ranks first."""
    pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    found = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    return sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 <= value <= _MAX_TOKENS:
        raise ValueError(f"its {key} is {reprlib.repr(value)}")
    return value


def _check_size(tokens: Mapping[Any, Any]) -> None:
    """ValueError if there is more than any vocabulary has, of which much time would be made."""
    if len(tokens) > _MAX_TOKENS or sum(map(len, tokens)) > _MAX_BYTES:
        raise ValueError(f"it has {len(tokens):,} tokens, more or longer ones than any vocabulary")
    if not min(map(len, tokens), default=0):
        raise ValueError("it has no tokens, or an empty one")
    if (length := max(map(len, tokens))) > _MAX_TOKEN:
        raise ValueError(f"it has a token of {length:,} bytes, more than {_MAX_TOKEN:,}")


def _byte_level(vocabulary: Any, merges: Any, pattern: str, *, ignore_merges: bool) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges, **affixes))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    settings = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    byte_level = pre_tokenizers.ByteLevel(**settings)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(**settings)
    return tokenizer


def _letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies: itself, or the next one from Ā on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
