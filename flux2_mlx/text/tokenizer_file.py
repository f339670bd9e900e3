"""Reading a `tokenizer.json` that may be anyone's, within bounds of time and memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from ..files import read_bytes
from ..json_files import parse_json
from .tokenizer_config import TokenizerSettings

_MAX_BYTES = 64 << 20  # four times the largest of a released model
_MAX_GROWTH = 256  # a prompt of the longest that is read then has a few million characters
_MAX_TOKEN = 4096  # characters; the longest of a released model have 128
_SEQUENCES = ("normalizers", "pretokenizers", "decoders")
# Characters that one becomes at most. Kinds that are not here give no more than they take.
_GROWTH = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "ByteLevel": 4, "Precompiled": math.inf}
# Texts that a part puts before, behind or between what it reads.
_ADDED = ("prepend", "replacement", "prefix", "suffix", "word_delimiter_token")


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a file; CheckpointError if there is none."""
    from tokenizers import Tokenizer

    try:
        data = read_bytes(path, _MAX_BYTES)
        _check_parts(parse_json(data, unique=True))
    except OSError as error:
        raise CheckpointError(f"{path} is not a tokenizer file: {error.strerror}") from error
    except (InputError, ValueError) as error:
        raise CheckpointError(f"{path} is not a tokenizer file: {error}") from error
    with answers(path):
        return Tokenizer.from_buffer(data)


def add_tokens(tokenizer: Any, settings: TokenizerSettings) -> None:
    """Add to the tokenizer's own tokens those that stand beside it, as transformers does."""
    from tokenizers import AddedToken

    before = tokenizer.get_added_tokens_decoder().values()
    known = {repr(token) for token in before}
    new = [token for token in (AddedToken(**x) for x in settings.listed) if repr(token) not in known]
    names = {token.content for token in (*before, *new)}
    for token in (*filter(None, settings.named.values()), *settings.more):
        if token["content"] not in names:
            new.append(AddedToken(**{**token, "special": True}))
            names.add(token["content"])
    tokenizer.add_tokens(new)


@contextmanager
def answers(path: Path) -> Iterator[None]:
    """CheckpointError in place of what the tokenizer library raises."""
    try:
        yield
    except Exception as error:  # it raises bare Exception
        raise _refusal(path, error) from error
    except BaseException as error:  # a panic of its Rust code is none
        if type(error).__name__ != "PanicException":
            raise
        raise _refusal(path, error) from error


def _refusal(path: Path, error: BaseException) -> CheckpointError:
    reason = str(error).partition("\n")[0]
    return CheckpointError(f"{path} is not a tokenizer file: {reason:.200}")


def check_vocabulary(vocabulary: dict[str, int], vocab_size: int | None, path: Path) -> None:
    """CheckpointError if a token has no row in an embedding of `vocab_size`, or is too long to be one."""
    token = max(vocabulary, key=len, default="")
    if len(token) > _MAX_TOKEN:
        raise CheckpointError(f"{path} has a token of {len(token):,} characters, more than {_MAX_TOKEN:,}")
    token = max(vocabulary, key=vocabulary.__getitem__, default="")
    if vocab_size is not None and vocabulary.get(token, 0) >= vocab_size:
        raise CheckpointError(
            f"{path} has the token {token!r:.80} with id {vocabulary[token]}, but the text encoder has only "
            f"{vocab_size} tokens; use the tokenizer that belongs to this model"
        )


def _check_parts(values: Any) -> None:
    """ValueError if a part of the tokenizer may make much text of little."""
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if _growth(values.get(name)) > _MAX_GROWTH:
            raise ValueError(f"its {name} may make more than {_MAX_GROWTH} characters of one")
    if _growth(values.get("normalizer")) * _growth(values.get("pre_tokenizer")) > _MAX_GROWTH:
        raise ValueError(f"its normalizer and pre_tokenizer may make more than {_MAX_GROWTH} characters of one")
    model = values.get("model")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if isinstance(model, dict) and len(str(model.get(name))) > _MAX_GROWTH:
            raise ValueError(f"its {name} has more than {_MAX_GROWTH} characters")


def _growth(part: Any) -> float:
    """How many characters a `part` of the tokenizer makes of one at most."""
    if not isinstance(part, dict):
        return 1
    parts = [inner for name in _SEQUENCES if isinstance(part.get(name), list) for inner in part[name]]
    kind = part.get("type", "ByteLevel")  # old files name none, and this one has no text to be known by
    growth = _GROWTH.get(str(kind), 1) * math.prod(map(_growth, parts))
    if isinstance(part.get("content"), str):  # of a Replace
        pattern = part.get("pattern")
        found = pattern.get("String") if isinstance(pattern, dict) else None
        # An expression may match nothing, before each character and at the end.
        growth *= max(1, len(part["content"]) / len(found)) if found else 1 + 2 * len(part["content"])
    return growth * math.prod(1 + len(part[name]) for name in _ADDED if isinstance(part.get(name), str))
