"""Tokenizer files that are damaged, hostile or another model's: one line, in bounded time and memory."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.checkpoints import (
    SHALLOW_TEXT,
    SHALLOW_VARIANT,
    convert,
    record,
    save_small,
    write_dev_tokenizer,
    write_tokenizer,
)

from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.errors import CheckpointError, Flux2Error
from flux2_mlx.text import DevTokenizer, KleinTokenizer

FILE = "tokenizer.json"
CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
DEV_CHAT = ["<pad>", "</s>", "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.fixture
def klein(tmp_path: Path) -> Path:
    """A tokenizer of 261 tokens, to be damaged."""
    return write_tokenizer(tmp_path / "klein") / FILE


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with 272 rows in its embedding; not to be changed."""
    return save_small(tmp_path_factory.mktemp("official") / "model", text=SHALLOW_TEXT)


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("converted") / "demo", variant=SHALLOW_VARIANT)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    record(path)


def shift_added(by: int) -> Callable[[dict[str, Any]], object]:
    """Give the tokens of the template, in both of their lists, ids that are larger `by` this."""

    def change(values: dict[str, Any]) -> None:
        for token in values["added_tokens"]:
            token["id"] += by
            values["model"]["vocab"][token["content"]] = token["id"]

    return change


def extend(number: int) -> Callable[[dict[str, Any]], object]:
    """Add an ordinary token with the id `number`."""
    return lambda values: values["model"]["vocab"].update({"extended": number})


def put(section: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.update({section: value})


def sequence(name: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: list(parts)}


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


# --- ids beyond the vocabulary


@pytest.mark.parametrize("damage", [shift_added(1_000), shift_added(10_000_000), extend(272), extend(2**31)])
def test_ids_beyond_the_vocabulary_are_refused_everywhere(damage, source, checkpoint, tmp_path):
    match = (
        r"tokenizer.json has the token '.+' with id \d+, but the text encoder has only 272 tokens; use the tokenizer"
    )
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    edit(copy / "tokenizer" / FILE, damage)
    refused(lambda: convert(copy, tmp_path / "converted", variant=SHALLOW_VARIANT), match)
    assert not (tmp_path / "converted").exists()
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    edit(copy / "tokenizer" / FILE, damage)
    refused(lambda: Checkpoint.open(copy), match)
    refused(lambda: Flux2Pipeline.from_pretrained(copy), match)


def test_the_last_row_of_the_vocabulary_may_have_a_token(checkpoint, tmp_path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    edit(copy / "tokenizer" / FILE, extend(271))
    Checkpoint.open(copy)


def test_no_id_leaves_without_being_compared(klein):
    tokenizer = KleinTokenizer(klein, 272)
    tokenizer._vocab_size = 100  # as if the file's list of tokens had hidden some
    refused(lambda: tokenizer(["a"], 8), "gives the token id 260, but the text encoder has only 100 tokens")


# --- files


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"null", b'{"model": 1, "model": 2}'])
def test_odd_json_is_refused(content, klein):
    klein.write_bytes(content)
    refused(lambda: KleinTokenizer(klein), "is not a tokenizer file: .")


def test_a_file_too_large_is_not_read(klein):
    os.truncate(klein, 20 << 30)  # a hole, which takes no disk
    refused(lambda: KleinTokenizer(klein), "is not a tokenizer file: .* is too large")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / FILE)
    refused(lambda: KleinTokenizer(tmp_path / FILE), "is not a tokenizer file: .*a named pipe")
    refused(lambda: KleinTokenizer(Path("/dev/zero")), "is not a tokenizer file: .*a device")
    refused(lambda: KleinTokenizer(tmp_path), "is not a tokenizer file: Is a directory")


def test_a_pipe_in_place_of_the_tokenizer_is_not_waited_for(source, checkpoint, tmp_path):
    for folder, use in [
        (source, lambda x: convert(x, tmp_path / "out", variant="demo")),
        (checkpoint, Checkpoint.open),
    ]:
        copy = Path(shutil.copytree(folder, tmp_path / folder.name))
        (copy / "tokenizer" / FILE).unlink()
        os.mkfifo(copy / "tokenizer" / FILE)
        refused(lambda use=use, copy=copy: use(copy), "is incomplete: there is no .*tokenizer.json")


# --- tokens of the template


@pytest.mark.parametrize("token", CHAT)
def test_a_template_without_its_tokens_is_refused(token, klein):
    def remove(values: dict[str, Any]) -> None:
        values["added_tokens"] = [x for x in values["added_tokens"] if x["content"] != token]
        del values["model"]["vocab"][token]

    edit(klein, remove)
    refused(lambda: KleinTokenizer(klein), "has no .* token; it belongs to another model")


@pytest.mark.parametrize("token", DEV_CHAT)
def test_a_template_of_dev_without_its_tokens_is_refused(token, tmp_path):
    path = write_dev_tokenizer(tmp_path) / FILE
    DevTokenizer(path)

    def rename(values: dict[str, Any]) -> None:
        for x in values["added_tokens"]:
            x["content"] = "other" if x["content"] == token else x["content"]
        values["model"]["vocab"]["other"] = values["model"]["vocab"].pop(token)

    edit(path, rename)
    refused(lambda: DevTokenizer(path), "has no .* token; it belongs to another model")


def test_a_token_of_the_template_that_is_read_as_its_letters_is_refused(klein):
    edit(klein, lambda values: values["added_tokens"].pop(1))
    refused(lambda: KleinTokenizer(klein), r"does not read <\|im_start\|> as one token")


# --- what fails or grows only when it is used

GROWING = {
    "a letter": put("normalizer", replace("x" * 1_000_000, String="q")),
    "any letter": put("normalizer", replace("x" * 1_000_000, Regex=".")),
    "nothing": put("normalizer", replace("x" * 200, Regex="")),
    "an empty text": put("normalizer", replace("x" * 1_000, String="")),
    "step by step": put("normalizer", sequence("normalizers", *[replace("qqqqqqqq", String="q")] * 4)),
    "nested": put(
        "normalizer", sequence("normalizers", sequence("normalizers", *[replace("qqqqqqqq", String="q")] * 4))
    ),
    "before": put("normalizer", {"type": "Prepend", "prepend": "x" * 1_000_000}),
    "bytes of bytes": put("pre_tokenizer", sequence("pretokenizers", *[BYTE_LEVEL] * 40)),
    "no kind": put(
        "pre_tokenizer",
        sequence("pretokenizers", *[{k: v for k, v in BYTE_LEVEL.items() if k != "type"}] * 40),
    ),
    "decoder": put("decoder", sequence("decoders", replace("x" * 1_000_000, String="a"))),
    "token": lambda values: values["model"]["vocab"].update({"x" * 1_000_000: 270}),
    "prefix": lambda values: values["model"].update(continuing_subword_prefix="x" * 1_000_000),
}


@pytest.mark.parametrize("damage", GROWING.values(), ids=GROWING)
def test_what_multiplies_text_is_refused(damage, klein):
    edit(klein, damage)
    refused(lambda: KleinTokenizer(klein), "more than [0-9,]+( characters)?")


@pytest.mark.parametrize(
    "damage",
    [
        put("normalizer", sequence("normalizers", {"type": "NFKC"}, {"type": "Lowercase"})),
        put("normalizer", {"type": "NFC"}),
        put("decoder", sequence("decoders", replace(" ", String="▁"), {"type": "ByteFallback"}, {"type": "Fuse"})),
        put("post_processor", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}),
        put("padding", {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
            | {"pad_type_id": 0, "pad_token": "!"}),
        put("truncation", {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}),
    ],
    ids=["nfkc", "nfc", "decoder", "post-processor", "padding", "truncation"],
)  # fmt: skip
def test_what_does_not_is_let_pass(damage, klein):
    before = KleinTokenizer(klein)(["a cat"], 32)
    edit(klein, damage)
    np.testing.assert_array_equal(KleinTokenizer(klein)(["a cat"], 32), before)


def test_a_post_processor_that_repeats_the_prompt_is_refused(klein):
    pieces = [{"Sequence": {"id": x, "type_id": 0}} for x in "AB"]
    repeated = {"type": "TemplateProcessing", "single": pieces[:1] * 1_000, "pair": pieces, "special_tokens": {}}
    edit(klein, put("post_processor", repeated))
    refused(lambda: KleinTokenizer(klein), "its post_processor adds to the tokens of a prompt")


def test_one_that_fails_at_any_text_is_refused_at_opening(klein):
    vocabulary = {token: number for number, token in enumerate(CHAT)}
    edit(klein, put("model", {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}))
    edit(klein, lambda values: [x.update(id=vocabulary[x["content"]]) for x in values["added_tokens"]])
    refused(lambda: KleinTokenizer(klein), "is not a tokenizer file: WordLevel error: Missing")


def test_one_that_fails_at_some_text_says_so(klein):
    tokens = dict.fromkeys([*CHAT, *"user assistant", "Ċ", "ĊĊ", "Ġ"])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    letters = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    edit(klein, lambda values: [x.update(id=vocabulary[x["content"]]) for x in values["added_tokens"]])
    edit(klein, put("model", {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}))
    edit(klein, put("pre_tokenizer", sequence("pretokenizers", letters, BYTE_LEVEL)))
    tokenizer = KleinTokenizer(klein)
    assert tokenizer.count("rats")
    refused(lambda: tokenizer(["q"], 32), "is not a tokenizer file: WordLevel error: Missing")


def test_a_panic_of_the_library_is_a_plain_error(klein):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+c"}, "behavior": "Isolated", "invert": False}
    edit(klein, put("pre_tokenizer", sequence("pretokenizers", split, BYTE_LEVEL)))
    tokenizer = KleinTokenizer(klein)
    refused(lambda: tokenizer(["a" * 10_000], 512), "is not a tokenizer file: Onig: .*retry-limit")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interruption_stays_one(error, klein, monkeypatch):
    tokenizer = KleinTokenizer(klein)

    class Interrupted:
        def encode(self, *texts, **options):
            raise error

    monkeypatch.setattr(tokenizer, "_tokenizer", Interrupted())
    with pytest.raises(error):
        tokenizer.encode("a")


def test_answers_that_can_not_be_decoded_say_so(klein):
    tokenizer = KleinTokenizer(klein)
    assert tokenizer.decode([10_000_000]) == ""
    refused(lambda: tokenizer.decode([2**40]), "is not a tokenizer file: .")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_give_plain_errors(seed, klein):
    random, data, outcomes = np.random.default_rng(seed), klein.read_bytes(), set()
    for _ in range(50):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 4)):
            damaged[place] = random.integers(0, 256)
        klein.write_bytes(damaged)
        try:
            KleinTokenizer(klein, 272)(["a red cat, é"], 32)
            outcomes.add("read")
        except Flux2Error as error:
            outcomes.add("\n" not in str(error))
    assert outcomes <= {"read", True}


def test_a_tokenizer_that_reads_nothing_of_a_prompt_is_refused(klein):
    edit(klein, lambda values: values["model"].update(vocab={}, merges=[]))
    refused(lambda: KleinTokenizer(klein), "reads nothing of a prompt|no <|does not read|is not a tokenizer file")
