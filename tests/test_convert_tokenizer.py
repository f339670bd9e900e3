"""Tokenizers as Qwen's and Mistral's own repositories have them."""

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert import assembled
from flux2_mlx.convert.tokenizer import _IDS, check_tokenizer, find_tokenizer, opened_tokenizer
from flux2_mlx.convert.vocabulary import qwen_tokenizer, tekken_tokenizer
from helpers.checkpoints import write_tokenizer
from helpers.cli_runner import done, refusal
from helpers.tekken import special_tokens
from tokenizers import pre_tokenizers

from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.config import VARIANTS
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.store import demo_folder
from flux2_mlx.text import TOKENIZERS, DevTokenizer, KleinTokenizer, PromptTokenizer

DEMO = demo_folder() / "tokenizer"
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
PAIRS = [("r", "e"), ("re", "d"), ("Ġ", "f"), ("Ġf", "o")]
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# What mistral-common's own encoder makes of them; 20,000 random texts without special tokens were compared once.
TEKKEN_IDS = {
    "A cat holding a sign that says": [1065, 7990, 14234, 1261, 2287, 1455, 8223],
    "  two  spaces\n\ttab": [1032, 2295, 1032, 18971, 1010, 1009, 8710],
    "123 3.14159 don't": [1049, 1050, 1051, 1032, 1051, 1046, 1049, 1052, 1049, 1053, 1057, 2607, 2405],
}
_FEW = 20_000  # tokens
TEXT = "a red fox's 12 Café\n\n in  snow 🦊"


def write_qwen(folder: Path) -> Path:
    """A tokenizer in the files that Qwen's repositories have: bytes, four merges and the tokens of the template."""
    tokens = [*LETTERS, *map("".join, PAIRS)]
    config: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>"}
    config["added_tokens_decoder"] = {
        str(len(tokens) + n): {"content": x, "special": n < 3, "normalized": False} for n, x in enumerate(ADDED)
    }
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in PAIRS))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tekken(tokens: tuple[bytes, ...] = (b"re", b"red", b" f", b" fo"), special: int = 19) -> dict[str, Any]:
    """A small tekken vocabulary, with one token more than are used."""
    every = [*(bytes([number]) for number in range(256)), *tokens, b"unused"]
    vocab = [{"rank": n, "token_bytes": base64.b64encode(x).decode(), "token_str": None} for n, x in enumerate(every)]
    size = len(every) - 1 + special
    config = {"pattern": r"\p{L}+| ?\S+|\s+", "default_vocab_size": size, "default_num_special_tokens": special}
    return {"config": config, "vocab": vocab}


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return write_qwen(tmp_path / "qwen")


def opened(place: Path, kind: type[PromptTokenizer] = KleinTokenizer) -> PromptTokenizer:
    with opened_tokenizer(find_tokenizer(place)) as folder:
        return kind(folder / "tokenizer.json", 300)


def test_vocabulary_and_merges_are_a_tokenizer(qwen):
    tokenizer = opened(qwen)
    assert [tokenizer.encode(x) for x in ("red", "re", " fox", "<|im_end|>")] == [
        [257],
        [256],
        [259, LETTERS.index("x")],
        [262],
    ]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")  # NFC
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer([""], 99)[0][0, -1] == 260


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "."])
def test_any_of_its_files_says_where_it_is(qwen, name):
    assert find_tokenizer(qwen / name) == qwen


def test_added_tokens_may_have_a_file_of_their_own(qwen):
    config = json.loads((qwen / "tokenizer_config.json").read_text())
    listed = config.pop("added_tokens_decoder")
    (qwen / "added_tokens.json").write_text(json.dumps({x["content"]: int(key) for key, x in listed.items()}))
    (qwen / "tokenizer_config.json").write_text(json.dumps(config))
    more = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
    (qwen / "special_tokens_map.json").write_text(json.dumps(more))
    tokenizer = opened(qwen)
    assert [tokenizer.encode(token) for token in ADDED] == [[number] for number in range(260, 265)]
    assert tokenizer.decode([*tokenizer.encode("<think>red"), 262]) == "<think>red"  # no special token is text
    (qwen / "tokenizer_config.json").unlink()
    assert opened(qwen)([""], 99)[0][0, -1] == 260


def test_added_tokens_may_stand_among_the_others(qwen):
    expected = opened(qwen)
    config = json.loads((qwen / "tokenizer_config.json").read_text())
    listed = {x["content"]: int(key) for key, x in config.pop("added_tokens_decoder").items()}
    (qwen / "tokenizer_config.json").write_text(json.dumps(config))
    path = qwen / "vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | listed))
    found = opened(qwen)
    assert [found.encode(x) for x in (*ADDED, TEXT)] == [expected.encode(x) for x in (*ADDED, TEXT)]
    (qwen / "merges.txt").write_text("r e\nre d\n")
    with pytest.raises(CheckpointError, match=r"none of .* says the ids of its added tokens"):
        opened(qwen)


def change_vocabulary(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        values = json.loads((folder / "vocab.json").read_text())
        (folder / "vocab.json").write_text(json.dumps(change(values) or values))

    return broken


def change_config(**values: Any) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return broken


def merges(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "merges.txt").write_bytes(text.encode("utf-8", "surrogateescape")) and None


BROKEN = {
    "no merges": (lambda folder: (folder / "merges.txt").unlink(), "but no merges.txt"),
    "fewer merges": (merges("r e\nre d\n"), "no merge makes 2 of the tokens"),
    "a merge twice": (merges("r e\nr e\n"), "a merge stands there twice"),
    "a merge of three": (merges("r e d\n"), "the merge 'r e d' is not of two tokens"),
    "a merge of one": (merges("r \n"), "is not of two tokens"),
    "unknown tokens": (merges("r e\nre d\nĠ f\nĠf o\nx y\n"), "'xy', which is no token"),
    "bytes": (merges("r \udcff\n"), "it is no text in UTF-8"),
    "an id twice": (change_vocabulary(lambda x: x.update({"a": 0})), "other ids than 0 to 259"),
    "a huge id": (change_vocabulary(lambda x: x.update({"a": 10**30})), "other ids than 0 to 259"),
    "a fraction": (change_vocabulary(lambda x: x.update({"a": 0.5})), "no whole number"),
    "true": (change_vocabulary(lambda x: x.update({"a": True})), "no whole number"),
    "NaN": (change_vocabulary(lambda x: x.update({"a": float("nan")})), "NaN is not a number"),
    "a token that is a list": (change_vocabulary(lambda x: x.update({"a": []})), "no whole number"),
    "no byte": (
        change_vocabulary(lambda x: {k: n for n, k in enumerate(k for k in x if k != "a")}),
        "1 of the 256 bytes",
    ),
    "no tokens": (change_vocabulary(lambda x: x.clear()), "no tokens"),
    "a long token": (change_vocabulary(lambda x: x.update({"a" * 2000: 260})), "a token of 2,000 bytes"),
    "a list": (change_vocabulary(lambda x: [1]), "no JSON object"),
    "a key twice": (lambda folder: (folder / "vocab.json").write_text('{"a": 0, "a": 1}'), "'a' stands there twice"),
    "deep": (lambda folder: (folder / "vocab.json").write_text("[" * 100_000), "it is nested too deep"),
    "no ids of added tokens": (change_config(added_tokens_decoder={}), "says the ids of its added tokens"),
    "other ids": (change_config(added_tokens_decoder={"900": {"content": "<x>"}}), "has id 900, where 260 is the next"),
    "another kind": (change_config(tokenizer_class="GPT2Tokenizer"), "is of a GPT2Tokenizer"),
    "an ending": (change_config(add_prefix_space=True), "add_prefix_space is True"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_said_in_a_line(case, qwen):
    broken, message = BROKEN[case]
    broken(qwen)
    with pytest.raises(CheckpointError) as error:
        opened(qwen)
    assert message in str(error.value)
    assert str(qwen) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_tekken_is_a_tokenizer(tmp_path):
    (tmp_path / "tekken.json").write_text(json.dumps(tekken()))
    tokenizer = opened(tmp_path, DevTokenizer)
    assert [tokenizer.encode(x) for x in ("red", "re", "a", "[INST]")] == [[19 + 257], [19 + 256], [19 + 97], [3]]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer(["a"], 300)[0][0, 0] == 11
    assert opened(tmp_path / "tekken.json", DevTokenizer).encode(TEXT) == tokenizer.encode(TEXT)


def test_tekken_may_name_its_special_tokens():
    names = [{"rank": n, "token_str": x, "is_control": True} for n, x in enumerate(["<a>", "<b>"])]
    tokenizer = tekken_tokenizer(tekken(special=4) | {"special_tokens": names})
    assert tokenizer.encode("<a><b><SPECIAL_3>r").ids == [0, 1, 3, 4 + ord("r")]


def with_vocab(change: Callable[[list[Any]], Any]) -> dict[str, Any]:
    values = tekken()
    change(values["vocab"])
    return values


def with_config(**config: Any) -> dict[str, Any]:
    values = tekken()
    return values | {"config": values["config"] | config}


SPECIAL = [{"rank": n, "token_str": x} for n, x in enumerate(special_tokens(19))]
BAD_TEKKEN = {
    "a rank twice": (with_vocab(lambda x: x[258].update(rank=257)), "its token 258 is"),
    "no rank": (with_vocab(lambda x: x[258].pop("rank")), "its token 258 is"),
    "a token twice": (with_vocab(lambda x: x[258].update(token_bytes="cmU=")), "a token twice"),
    "no base64": (with_vocab(lambda x: x[258].update(token_bytes="é!")), "which is no base64"),
    "no text": (with_vocab(lambda x: x[258].update(token_bytes=7)), "which is no base64"),
    "an empty token": (with_vocab(lambda x: x[258].update(token_bytes="")), "an empty one"),
    "a long token": (with_vocab(lambda x: x[258].update(token_bytes="aaaa" * 1000)), "a token of 3,000 bytes"),
    "a list": (with_vocab(lambda x: x.__setitem__(258, [])), "its token 258 is []"),
    "other bytes": (with_vocab(lambda x: x[3].update(token_bytes="enp6")), "first 256 tokens are not the bytes"),
    "too few": (with_vocab(lambda x: x.__delitem__(slice(200, None))), "are not to be had of 200"),
    "no tokens": (tekken() | {"vocab": {}}, "no config and vocab of tekken"),
    "no config": (tekken() | {"config": None}, "no config and vocab of tekken"),
    "a huge size": (with_config(default_vocab_size=10**9), "default_vocab_size is 1000000000"),
    "a fraction": (with_config(default_num_special_tokens=1.5), "default_num_special_tokens is 1.5"),
    "all special": (with_config(default_num_special_tokens=279), "279 of them special"),
    "a bad pattern": (with_config(pattern="("), "tekken.json"),
    "a long pattern": (with_config(pattern="a" * 5000), "its pattern is"),
    "no pattern": (with_config(pattern=None), "its pattern is None"),
    "special twice": (tekken() | {"special_tokens": [*SPECIAL[:-1], SPECIAL[0] | {"rank": 18}]}, "special token twice"),
    "special ranks": (tekken() | {"special_tokens": SPECIAL[::-1]}, "its special token 0 is"),
    "many special": (tekken() | {"special_tokens": SPECIAL * 2}, "no list of at most 19"),
    "special and not": (
        tekken() | {"special_tokens": [*SPECIAL[:-1], {"rank": 18, "token_str": "re"}]},
        "ordinary one",
    ),
}


@pytest.mark.parametrize("case", BAD_TEKKEN)
def test_what_is_broken_of_tekken_is_said_in_a_line(case, tmp_path):
    values, message = BAD_TEKKEN[case]
    (tmp_path / "tekken.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path, DevTokenizer)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_tokenizer_is_said(tmp_path):
    with pytest.raises(InputError, match="is no file or folder of a model but a device"):
        find_tokenizer(Path("/dev/zero"))
    with pytest.raises(CheckpointError, match="holds no tokenizer; give a folder with tokenizer"):
        find_tokenizer(tmp_path)


def with_tekken(encoder: Path, path: Path) -> Path:
    """The weights of an encoder in a file with a tekken vocabulary, as ComfyUI has them."""
    data = np.frombuffer(json.dumps(tekken(())).encode(), np.uint8)
    tensors = {f"model.{name}": array for name, array in mx.load(str(encoder)).items()}
    mx.save_safetensors(str(path), {**tensors, "tekken_model": mx.array(data)})
    return path


def test_an_encoder_holds_its_tokenizer(tmp_path):
    encoder = with_tekken(demo_folder() / "text_encoder" / "model.safetensors", tmp_path / "encoder.safetensors")
    assert assembled(encoder, {}, text_only=True).tokenizer == find_tokenizer(encoder) == encoder
    assert opened(encoder, DevTokenizer).encode("re[INST]") == [19 + ord("r"), 19 + ord("e"), 3]
    assert assembled(encoder, {"tokenizer": DEMO}, text_only=True).tokenizer == DEMO
    assert assembled(demo_folder(), {"text_encoder": encoder}).tokenizer == DEMO


def test_a_tensor_that_is_no_tokenizer_is_refused(tmp_path):
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"tekken_model": mx.zeros((4,))})
    with pytest.raises(CheckpointError, match=r"a.safetensors .*its tensor tekken_model is .*, which is no tokenizer"):
        opened(tmp_path / "a.safetensors")


def test_a_model_may_have_vocabulary_and_merges(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(source / "tokenizer")
    write_qwen(source / "tokenizer")
    done("convert", source, "made", "--variant", "klein-4b", "--text-quant", "bf16")
    assert Checkpoint.open(tmp_path / "made").tokenizer.encode("red") == [257]
    (source / "tokenizer" / "merges.txt").unlink()
    message = refusal("convert", source, "other", "--variant", "klein-4b")
    assert message.startswith(f"{source / 'tokenizer'} is not a tokenizer file: there is vocab.json, but no merges.txt")


def test_another_model_s_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tekken.json").write_text(json.dumps(tekken()))
    message = refusal("convert", "demo", "made", "--tokenizer", tmp_path / "tekken.json")
    assert message == f"{tmp_path / 'tokenizer.json'} has no <|endoftext|> token; it belongs to another model"


def test_the_released_tokenizer_comes_of_its_vocabulary(qwen3_tokenizer_file):
    released = json.loads(qwen3_tokenizer_file.read_text())
    model, added = released["model"], released["added_tokens"]
    # The whole of it was compared once, which takes seconds.
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < _FEW}
    model["merges"] = model["merges"][: _FEW - 256]
    added = [token | {"id": _FEW + number} for number, token in enumerate(added)]
    pairs = "".join(f"{a} {b}\n" for a, b in model["merges"])
    flags = [(x["id"], {key: x[key] for key in x if key != "id"}) for x in added]
    made = json.loads(qwen_tokenizer(model["vocab"], pairs, flags).to_str())
    del made["decoder"], released["decoder"]  # whose options only tell how it encodes
    assert made == released | {"added_tokens": added}


def test_the_released_ids_come_of_tekken(tekken_file):
    values = json.loads(tekken_file.read_bytes())
    values["config"]["default_vocab_size"] = 1000 + _FEW
    tokenizer = tekken_tokenizer(values)
    for text, ids in TEKKEN_IDS.items():
        assert tokenizer.encode(text).ids == ids


def test_a_tokenizer_of_another_size_is_not_the_encoder_s(tmp_path):
    assembled(demo_folder(), {"tokenizer": DEMO})
    small = write_tokenizer(tmp_path / "small")
    message = refusal("convert", "demo", tmp_path / "made", "--tokenizer", small)
    encoder = demo_folder() / "text_encoder"
    assert message.startswith(f"{small} has 261 tokens, and the text encoder {encoder} 480; use the tokenizer")


@pytest.mark.parametrize(("network", "token"), [("qwen3", "<|endoftext|>"), ("mistral3", "<unk>")])
def test_special_tokens_have_the_ids_of_the_family(network, token, monkeypatch):
    fake = SimpleNamespace(size=152_000, encode=lambda text: [_IDS[network][text]])
    monkeypatch.setitem(TOKENIZERS, network, lambda *arguments: fake)
    row = next(row for row in VARIANTS.values() if row.text.model_type == network and row.repo)
    check_tokenizer(DEMO, row.text, Path("te.safetensors"))
    monkeypatch.setattr(fake, "encode", lambda text: [_IDS[network][text] + 2])
    with pytest.raises(CheckpointError, match=re.escape(f"reads {token} as [")) as error:
        check_tokenizer(DEMO, row.text, Path("te.safetensors"))
    assert str(DEMO) in str(error.value)
    assert "of the text encoder te.safetensors" in str(error.value)
