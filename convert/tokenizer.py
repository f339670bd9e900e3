"""Where a tokenizer is, in what form, and the files that our checkpoints hold in place of it."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flux2_mlx.config import TextConfig
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.files import check_kind, read_bytes
from flux2_mlx.json_files import decoded, parse_json, read_json
from flux2_mlx.text import TOKENIZER_FILES, TOKENIZERS, DevTokenizer, KleinTokenizer
from flux2_mlx.text.tokenizer_config import CONFIG, TokenizerSettings, read_settings
from flux2_mlx.text.tokenizer_file import answers
from flux2_mlx.weights import Files, read_header

from .naming import TEKKEN
from .vocabulary import qwen_tokenizer, tekken_tokenizer, unmade

TOKENIZER = "tokenizer.json"
VOCABULARY = "vocab.json"
MERGES = "merges.txt"
TEKKEN_FILE = "tekken.json"
_ADDED = "added_tokens.json"
_LISTED = "added_tokens_decoder"
_WEIGHTS = ".safetensors"
_FORMS = f"{TOKENIZER}, with {VOCABULARY} and {MERGES}, or with {TEKKEN_FILE}"
_QWEN_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")
# The ids of special tokens that the families were trained with.
_IDS = {
    "qwen3": {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<think>": 151667,
        "</think>": 151668,
    },
    "mistral3": {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "[INST]": 3,
        "[/INST]": 4,
        "[IMG]": 10,
        "<pad>": 11,
        "[SYSTEM_PROMPT]": 17,
        "[/SYSTEM_PROMPT]": 18,
    },
}
_FILLED = 0.9  # of an encoder's rows, tokens have at least this share; of the released models more than 0.99
_MAX_BYTES = 64 << 20  # of a file; the largest of a released model has 20 million


def find_tokenizer(place: Path) -> Path:
    """Where the tokenizer is that `place` stands for: a folder, or the file that it is made from.

    Args:
        place: the folder of a tokenizer or of a model, one of its files, or weights that hold it as a tensor.

    Raises:
        CheckpointError: there is none.
        InputError: it is neither a file nor a folder.
    """
    check_kind(place)
    if place.is_file() and (place.name.startswith("tekken") or tekken_tensor(place)):
        return place
    folder = place.parent if place.is_file() else place
    if found := tokenizer_in(folder) or tokenizer_in(folder / "tokenizer"):
        return found
    raise CheckpointError(f"{place} holds no tokenizer; give a folder with {_FORMS}")


def tokenizer_in(folder: Path) -> Path | None:
    """`folder` if it holds a tokenizer, or the file there that one is made from; None: there is none."""
    if (folder / TOKENIZER).is_file() or (folder / VOCABULARY).is_file():
        return folder
    return folder / TEKKEN_FILE if (folder / TEKKEN_FILE).is_file() else None


def tokenizer_files(place: Path) -> tuple[Path, ...]:
    """The files that a tokenizer is made from, given what `find_tokenizer` gives; weights that hold it are none."""
    if place.is_dir():
        return tuple(place / x for x in (TOKENIZER, VOCABULARY, MERGES) if (place / x).is_file())
    return () if place.suffix.lower() == _WEIGHTS else (place,)


def tekken_tensor(file: Path) -> str | None:
    """The name of the tensor of a file of weights that is a `tekken.json`; None: there is none."""
    if file.suffix.lower() != _WEIGHTS:
        return None
    return next((name for name in read_header(file) if name.rpartition(".")[2] == TEKKEN), None)


@contextmanager
def opened_tokenizer(place: Path) -> Iterator[Path]:
    """The folder of a tokenizer as our checkpoints hold it, made for as long as this lasts if it is in another form.

    Args:
        place: what `find_tokenizer` gives.

    Raises:
        CheckpointError: it is damaged or of another kind. What is raised inside about the folder says `place`.
    """
    if (place / TOKENIZER).is_file():
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="flux2-mlx-") as made:
        folder = Path(made)
        if place.is_dir():
            _of_merges(place, folder)
        else:
            _of_tekken(place, folder)
        try:
            yield folder
        except CheckpointError as error:
            what = place if place.is_dir() else place.parent
            raise CheckpointError(str(error).replace(str(folder), str(what))) from error


def check_tokenizer(place: Path, text: TextConfig, encoder: Path) -> None:
    """CheckpointError unless a tokenizer can be that of a text encoder: its words would be others.

    Args:
        place: what `find_tokenizer` gives.
        text: the encoder's geometry.
        encoder: where the encoder is, for errors.
    """
    with opened_tokenizer(place) as folder:
        tokenizer = TOKENIZERS[text.model_type](folder / TOKENIZER, text.vocab_size)
    wrong = ""
    if tokenizer.size < _FILLED * text.vocab_size:
        wrong = f"has {tokenizer.size:,} tokens, and the text encoder {encoder} {text.vocab_size:,}"
    ids = _IDS[text.model_type]
    for token, number in ids.items() if max(ids.values()) < text.vocab_size else ():
        if not wrong and tokenizer.encode(token) != [number]:
            wrong = f"reads {token} as {tokenizer.encode(token)}, which is {number} of the text encoder {encoder}"
    if wrong:
        raise CheckpointError(f"{place} {wrong}; use the tokenizer that belongs to that model")


def _of_merges(place: Path, folder: Path) -> None:
    """Make the files of Qwen's tokenizer of its vocabulary and merges."""
    settings = read_settings(place, KleinTokenizer.fixed)
    kind = (read_json(place / CONFIG) if (place / CONFIG).exists() else {}).get("tokenizer_class")
    if kind not in _QWEN_CLASSES:
        raise CheckpointError(f"{place / CONFIG} is of a {str(kind)[:80]}, not of Qwen's; give its {TOKENIZER}")
    _make(place, folder, lambda: _qwen(place, settings))
    for name in TOKENIZER_FILES:
        if (place / name).is_file():
            shutil.copyfile(place / name, folder / name)
    if not (folder / CONFIG).exists():
        _write_json(folder / CONFIG, {"tokenizer_class": "Qwen2Tokenizer", **KleinTokenizer.named})


def _qwen(place: Path, settings: TokenizerSettings) -> Any:
    vocabulary, merges = _vocabulary(place), _merges(place)
    others = unmade(vocabulary, merges)
    added = _added(place, settings, others)
    apart = others.keys() & {token["content"] for _, token in added}
    return qwen_tokenizer({name: x for name, x in vocabulary.items() if name not in apart}, merges, added)


def _vocabulary(place: Path) -> dict[str, Any]:
    values = parse_json(read_bytes(place / VOCABULARY, _MAX_BYTES), unique=True)
    if not isinstance(values, dict):
        raise ValueError(f"{VOCABULARY} holds no JSON object")
    return values


def _merges(place: Path) -> str:
    if not (place / MERGES).is_file():
        raise ValueError(f"there is {VOCABULARY}, but no {MERGES}; add it")
    return decoded(read_bytes(place / MERGES, _MAX_BYTES))


def _added(place: Path, settings: TokenizerSettings, others: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The added tokens by id, as transformers reads them: of the config, or else of a file of their own, or else these
    `others` that stand among the ordinary ones."""
    config = read_json(place / CONFIG) if (place / CONFIG).exists() else {}
    if numbers := sorted(map(int, config.get(_LISTED) or {})):
        return list(zip(numbers, settings.listed, strict=True))
    file = _ADDED if (place / _ADDED).is_file() else VOCABULARY
    ids = read_json(place / _ADDED) if file == _ADDED else others
    if not ids:
        where = f"none of {CONFIG}, {_ADDED} and {VOCABULARY}"
        raise ValueError(f"{where} says the ids of its added tokens; add {_ADDED}, or give its {TOKENIZER}")
    if any(type(number) is not int or number < 0 for number in ids.values()):
        raise ValueError(f"{file} has an id that is no whole number")
    special = {token["content"] for token in (*filter(None, settings.named.values()), *settings.more)}
    flags = {name: {"special": name in special, "normalized": name not in special} for name in ids}
    return [(number, {"content": name, **flags[name]}) for name, number in sorted(ids.items(), key=lambda x: x[1])]


def _of_tekken(place: Path, folder: Path) -> None:
    """Make the files of Mistral's tokenizer of a `tekken.json`, or of weights that hold it."""

    def made() -> Any:
        values = parse_json(_tekken(place), unique=True)
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        return tekken_tokenizer(values)

    _make(place, folder, made)
    # The class is the one that takes the file as it is.
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **DevTokenizer.named, "padding_side": "left"}
    _write_json(folder / CONFIG, values)


def _tekken(place: Path) -> bytes:
    if (name := tekken_tensor(place)) is None:
        return read_bytes(place, _MAX_BYTES)
    files = Files([place])
    info = files.infos[name]
    if info.dtype != "U8" or info.nbytes > _MAX_BYTES:
        raise ValueError(f"its tensor {name} is {info}, which is no tokenizer")
    (array,) = files.read([name])
    return np.array(array).tobytes()


def _make(place: Path, folder: Path, made: Callable[[], Any]) -> None:
    """Write the tokenizer that is `made`; CheckpointError says what of `place` is wrong."""
    try:
        with answers(place):
            (folder / TOKENIZER).write_text(made().to_str(), encoding="utf-8")
    except (InputError, OSError) as error:
        raise CheckpointError(f"{place} holds no tokenizer: {error}") from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
