"""Prompts of the klein models against transformers' tokenizer with Qwen3's own chat template."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flux2_mlx.errors import CheckpointError
from flux2_mlx.text import KleinTokenizer

PAD = 151643
# fmt: off
GOLDEN = {
    "A cat holding a sign that says hello world": [
        151644, 872, 198, 32, 8251, 9963, 264, 1841, 429, 2727, 23811, 1879, 151645, 198,
        151644, 77091, 198, 151667, 271, 151668, 271,
    ],
    "": [151644, 872, 198, 151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271],
}
# fmt: on
PROMPTS = [
    *GOLDEN,
    "  leading, double  and trailing spaces \n\n\t",
    "一只戴着红色围巾的狐狸在雪地里",
    "Лиса в снегу, العربية, हिन्दी, 日本語の看板",
    "🦊❄️ family 👨‍👩‍👧‍👦 flag 🇩🇪 skin 👍🏽",
    "e\u0301 and \u00e9, ﬁ, \u200b, \u00a0, ½",
    "ends the turn <|im_end|>\n<|im_start|>assistant\nand <|endoftext|> goes on",
    "<think>\nthis\n</think> and <|vision_start|><|image_pad|><|vision_end|>",
    '<tool_response>{"braces": {0}}</tool_response> {} {{}} %s',
    "1234567890 3.14159 I'LL don't we've",
    "\r\nline\rbreaks\u2028",
    "word " * 490,
    "狐狸🦊 " * 300,
]


@pytest.fixture(scope="module")
def reference(qwen3_tokenizer_file: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(qwen3_tokenizer_file.parent)


@pytest.fixture(scope="module")
def ours(qwen3_tokenizer_file: Path) -> KleinTokenizer:
    return KleinTokenizer(qwen3_tokenizer_file)


def templated(reference: PreTrainedTokenizerBase, prompt: str) -> str:
    message = {"role": "user", "content": prompt}
    return reference.apply_chat_template([message], tokenize=False, add_generation_prompt=True, enable_thinking=False)


@pytest.mark.parametrize("prompt", GOLDEN)
def test_golden_ids(ours, prompt):
    ids, mask = ours([prompt], 512)
    count = len(GOLDEN[prompt])
    assert (ids.shape, ids.dtype, mask.dtype) == ((1, 512), np.int32, np.bool_)
    assert ids[0].tolist() == GOLDEN[prompt] + [PAD] * (512 - count)
    assert mask[0].tolist() == [True] * count + [False] * (512 - count)
    assert ours.count(prompt) == count


@pytest.mark.parametrize("max_length", [512, 8])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_matches_transformers(ours, reference, prompt, max_length):
    text = templated(reference, prompt)
    expected = reference(text, padding="max_length", truncation=True, max_length=max_length)
    ids, mask = ours([prompt], max_length)
    assert ids[0].tolist() == expected["input_ids"]
    assert mask[0].tolist() == [bool(value) for value in expected["attention_mask"]]


def test_a_long_prompt_loses_its_end(ours, reference):
    prompt = "word " * 600
    whole = reference(templated(reference, prompt))["input_ids"]
    ids, mask = ours([prompt], 512)
    assert len(whole) == ours.count(prompt) > 512
    assert ids[0].tolist() == whole[:512]
    assert mask.all()


def test_a_batch_is_its_rows(ours):
    prompts = ["a red fox", "", "word " * 600]
    ids, mask = ours(prompts, 64)
    for row, prompt in enumerate(prompts):
        single_ids, single_mask = ours([prompt], 64)
        np.testing.assert_array_equal(ids[row], single_ids[0])
        np.testing.assert_array_equal(mask[row], single_mask[0])


def test_padding_and_truncation_of_the_file_are_ignored(qwen3_tokenizer_file, tmp_path):
    tokenizer = Tokenizer.from_file(str(qwen3_tokenizer_file))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=64, direction="left")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompt = "A cat holding a sign that says hello world"
    assert KleinTokenizer(tmp_path / "tokenizer.json").count(prompt) == len(GOLDEN[prompt])


@pytest.mark.parametrize("content", ["", "{", '{"model": {}}', "\0\1\2"])
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer file: ."):
        KleinTokenizer(path)


def test_a_truncated_real_file_is_refused(qwen3_tokenizer_file, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(qwen3_tokenizer_file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer file: ."):
        KleinTokenizer(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.json is not a tokenizer file: ."):
        KleinTokenizer(tmp_path / "absent.json")


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(path))
    with pytest.raises(CheckpointError, match=r"has no <\|endoftext\|> token; it belongs to another model"):
        KleinTokenizer(path)
