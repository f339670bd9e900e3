"""What the files beside a `tokenizer.json` change, against transformers' own reading of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.checkpoints import SHALLOW_TEXT, SHALLOW_VARIANT, convert, save_small, write_dev_tokenizer, write_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.errors import CheckpointError
from flux2_mlx.text import DevTokenizer, KleinTokenizer, PromptTokenizer
from flux2_mlx.text.prompts import ENCODE

FILE, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
LENGTHS = [8, 40, 300]
PROMPTS = ["a red fox, in snow", "", "two\nlines 狐狸 <x> fox ends", "word " * 80]
KLEIN_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
DEV_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{% else %}[INST]{% endif %}"
    "{% for block in message.content %}{{ block.text }}{% endfor %}"
    "{% if message.role == 'system' %}[/SYSTEM_PROMPT]{% else %}[/INST]{% endif %}{% endfor %}"
)
DEV_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def klein_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> dict[str, list[int]]:
    """As diffusers' `Flux2KleinPipeline` does."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return tokenizer(text, padding="max_length", truncation=True, max_length=length)


def dev_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> dict[str, list[int]]:
    """As diffusers' `Flux2Pipeline` does by a `PixtralProcessor`, whose image side is not installed here."""
    texts = {"system": ENCODE, "user": prompt.replace("[IMG]", "")}
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    return tokenizer(text, padding="max_length", truncation=True, max_length=length, add_special_tokens=special)


class Family:
    def __init__(self, folder: Path, name: str):
        self.folder = {"klein": write_tokenizer, "dev": write_dev_tokenizer}[name](folder)
        self.ours: type[PromptTokenizer] = {"klein": KleinTokenizer, "dev": DevTokenizer}[name]
        self._reference = {"klein": (Qwen2Tokenizer, klein_ids), "dev": (PreTrainedTokenizerFast, dev_ids)}[name]
        if name == "dev":
            (folder / CONFIG).write_text(json.dumps(DEV_CONFIG | {"padding_side": "left"}))
        (folder / TEMPLATE).write_text({"klein": KLEIN_TEMPLATE, "dev": DEV_TEMPLATE}[name])

    def edit(self, name: str, **changes: Any) -> None:
        values = json.loads((self.folder / name).read_text()) | changes
        (self.folder / name).write_text(json.dumps({key: x for key, x in values.items() if x is not ...}))

    def open(self) -> PromptTokenizer:
        return self.ours(self.folder / FILE, 400)

    def check_equal(self) -> list[list[int]]:
        """Compare ids and masks with the reference; gives the ids."""
        kind, encode = self._reference
        reference, ours = kind.from_pretrained(self.folder), self.open()
        found = []
        for length in LENGTHS:
            ids, mask = ours(PROMPTS, length)
            for prompt, row, seen in zip(PROMPTS, ids, mask, strict=True):
                expected = encode(reference, prompt, length)
                assert row.tolist() == expected["input_ids"]
                assert seen.tolist() == [bool(x) for x in expected["attention_mask"]]
                found.append(row.tolist())
        return found


@pytest.fixture(params=["klein", "dev"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Family:
    return Family(tmp_path / request.param, request.param)


@pytest.fixture
def klein(tmp_path: Path) -> Family:
    return Family(tmp_path / "klein", "klein")


@pytest.fixture
def dev(tmp_path: Path) -> Family:
    return Family(tmp_path / "dev", "dev")


PADDING = {"strategy": {"Fixed": 9}, "pad_to_multiple_of": None, "pad_id": 20, "pad_type_id": 0, "pad_token": "!"}
TRUNCATION = {"max_length": 3, "strategy": "LongestFirst", "stride": 0}
FOX = {"content": "fox", "single_word": True, "lstrip": True, "rstrip": False, "normalized": False, "special": False}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padded on the left": ({"padding_side": "left"}, {}),
    "padded on the right": ({"padding_side": "right"}, {}),
    "cut on the left": ({"truncation_side": "left"}, {}),
    "both": ({"truncation_side": "left", "padding_side": "left"}, {}),
    "padded with another token": ({"pad_token": "!"}, {}),
    "padded with an object": ({"pad_token": {"__type": "AddedToken", "content": "!", "lstrip": True}}, {}),
    "padded with a new token": ({"pad_token": "<new>"}, {}),
    "padded as the file says": ({"padding_side": ..., "pad_token": ...}, {"padding": PADDING | {"direction": "Left"}}),
    "padded otherwise than the file": ({"padding_side": "right"}, {"padding": PADDING | {"direction": "Left"}}),
    "cut as the file says": ({}, {"truncation": TRUNCATION | {"direction": "Left"}}),
    "an ordinary word is special": ({"sep_token": "fox"}, {}),
    "further tokens": ({"additional_special_tokens": ["fox", "<x>"]}, {}),
    "further tokens of today": ({"extra_special_tokens": ["fox"]}, {}),
    "further tokens with names": ({"extra_special_tokens": {"fox_token": "fox"}}, {}),
    "tokens of a model": ({"image_token": "<x>"}, {}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_changes_the_result_is_done(case, family):
    before = family.check_equal()
    config, file = CHANGES[case]
    family.edit(CONFIG, **config)
    family.edit(FILE, **file)
    after = family.check_equal()
    assert (before == after) == (config == {"padding_side": "left" if family.ours is DevTokenizer else "right"})


HARMLESS = [
    {},
    {"add_bos_token": True},
    {"add_eos_token": True},
    {"model_max_length": 5},
    {"max_length": 5},
    {"clean_up_tokenization_spaces": True},
    {"tokenizer_class": "LlamaTokenizerFast"},
    {"processor_class": "PixtralProcessor"},
    {"legacy": True, "use_default_system_prompt": True, "errors": "ignore", "stride": 3, "padding": True},
    {"add_prefix_space": None, "split_special_tokens": False},
    {"mask_token": None, "cls_token": None, "lr": 3},
    {"pad_to_multiple_of": 7, "truncation_strategy": "only_first"},
]


@pytest.mark.parametrize("change", HARMLESS, ids=str)
def test_what_changes_nothing_is_let_pass(change, family):
    before = family.check_equal()
    family.edit(CONFIG, **change)
    assert family.check_equal() == before


def test_listed_tokens_are_added(family):
    own = json.loads((family.folder / FILE).read_text())["added_tokens"]
    listed = {str(x["id"]): {key: value for key, value in x.items() if key != "id"} for x in own}
    before = family.check_equal()
    family.edit(CONFIG, added_tokens_decoder=listed)
    assert family.check_equal() == before
    family.edit(CONFIG, added_tokens_decoder=listed | {"350": FOX})
    assert family.check_equal() != before


def test_an_old_list_of_special_tokens_counts_where_no_tokens_are_listed(family):
    before = family.check_equal()
    (family.folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    changed = family.check_equal()
    assert changed != before
    own = json.loads((family.folder / FILE).read_text())["added_tokens"]
    listed = {str(x["id"]): {key: value for key, value in x.items() if key != "id"} for x in own}
    family.edit(CONFIG, added_tokens_decoder=listed)
    assert family.check_equal() == before


def test_dev_pads_on_the_left_where_nothing_is_said(dev):
    before = dev.check_equal()
    (dev.folder / CONFIG).unlink()
    ours = dev.open()
    found = [row.tolist() for length in LENGTHS for row in ours(PROMPTS, length)[0]]
    assert found == before


# --- what is refused


def refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1500


REFUSED = [
    ({"split_special_tokens": True}, r"tokenizer_config\.json: split_special_tokens is True, FLUX\.2 has False"),
    ({"init_inputs": [1]}, "init_inputs is"),
    ({"tokenizer_padding": {"direction": "left"}}, "tokenizer_padding is"),
    ({"padding_side": "top"}, "padding_side is 'top', neither 'left' nor 'right'"),
    ({"padding_side": ["left"]}, "padding_side is"),
    ({"truncation_side": "a\nb"}, "truncation_side is"),
    ({"pad_token": None}, "pad_token is None, but prompts are padded; name a token"),
    ({"pad_token": ""}, "pad_token is None, but prompts are padded"),
    ({"pad_token": 7}, "'pad_token' is 7, which is no token"),
    ({"pad_token": {"content": "!", "lstrip": "yes"}}, "which is no token"),
    ({"pad_token": "x" * 5000}, "has a token of 5,000 characters"),
    ({"extra_special_tokens": 3}, "extra_special_tokens are no tokens"),
    ({"extra_special_tokens": [[]]}, "is no token|which is no token"),
    ({"added_tokens_decoder": {"a": FOX}}, "added_tokens_decoder or"),
    ({"added_tokens_decoder": [1]}, "added_tokens_decoder or"),
    ({"extra_special_tokens": [f"<{number}>" for number in range(200)]}, "but the text encoder has only 400 tokens"),
]


@pytest.mark.parametrize(("change", "match"), REFUSED, ids=str)
def test_what_is_not_implemented_is_refused(change, match, family):
    family.edit(CONFIG, **change)
    refused(family.open, match)


def test_a_space_before_klein_prompts_is_refused(klein, dev):
    klein.edit(CONFIG, add_prefix_space=True)
    refused(klein.open, "add_prefix_space is True, FLUX.2 has False")
    before = dev.check_equal()
    dev.edit(CONFIG, add_prefix_space=True)  # which nothing reads
    assert dev.check_equal() == before


def bos(name: str, number: int) -> dict[str, Any]:
    piece, text = {"SpecialToken": {"id": name, "type_id": 0}}, [{"Sequence": {"id": x, "type_id": 0}} for x in "AB"]
    special = {name: {"id": name, "ids": [number], "tokens": [name]}}
    return {"type": "TemplateProcessing", "single": [piece, text[0]], "pair": [piece, *text], "special_tokens": special}


def test_a_post_processor_that_adds_tokens_is_refused_unless_the_template_has_them(klein, dev):
    klein.edit(FILE, post_processor=bos("<|im_start|>", 257))
    refused(klein.open, "post_processor adds to the tokens of a prompt")
    before = dev.check_equal()
    dev.edit(FILE, post_processor=bos("<s>", 1))
    assert dev.check_equal() == before
    dev.edit(CONFIG, bos_token=None)
    (dev.folder / TEMPLATE).unlink()
    refused(dev.open, "post_processor adds to the tokens of a prompt")


# --- chat templates

OTHER = "the chat template makes .* of a prompt, FLUX.2 has "
NO_END = r"can't be used: it takes too much time or memory"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "another": ("{{ messages[-1].content }}", OTHER),
    "trimmed": (KLEIN_TEMPLATE.replace("message.content", "message.content | trim"), OTHER),
    "no thinking": (KLEIN_TEMPLATE.replace("is false", "is true"), OTHER),
    "system": ("<|im_start|>system\nYou are.<|im_end|>\n" + KLEIN_TEMPLATE, OTHER),
    "nothing": ("", OTHER),
    "much": ("{% for a in range(9999) %}" + "x" * 999 + "{% endfor %}", OTHER),
    "broken": ("{% for %}", r"chat_template\.jinja: the chat template can't be used: TemplateSyntaxError: "),
    "raises": ("{{ raise_exception('no\nsystem') }}", r"can't be used: TemplateError: no\\nsystem"),
    "escapes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "can't be used: SecurityError"),
    "includes": ("{% include '/etc/passwd' %}", "can't be used: TypeError: no loader"),
    "for ever": (LOOPS, NO_END),
    "fills memory": ("{% set x = namespace(y='x') %}{% for a in range(99) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
                     "can't be used: MemoryError|too much time or memory"),
    "is large": ("x" * (2 << 20), "is no chat template: .* is too large"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEMPLATES)
def test_other_templates_are_refused(case, klein):
    template, match = TEMPLATES[case]
    (klein.folder / TEMPLATE).write_text(template)
    refused(klein.open, match)


def test_other_templates_of_dev_are_refused(dev):
    (dev.folder / TEMPLATE).write_text(DEV_TEMPLATE.replace("[INST]", "[INST] "))
    refused(dev.open, OTHER)
    (dev.folder / TEMPLATE).write_text(DEV_TEMPLATE)
    dev.edit(CONFIG, bos_token="</s>")
    refused(dev.open, OTHER)


SPELLINGS = [
    "{% generation %}" + KLEIN_TEMPLATE + "{% endgeneration %}",
    "{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}" + KLEIN_TEMPLATE,
    KLEIN_TEMPLATE.replace("messages %}", "messages %}{% if false %}{% break %}{% endif %}"),
    "{% set today = strftime_now('%Y') %}" + KLEIN_TEMPLATE,
]  # fmt: skip


@pytest.mark.parametrize("template", SPELLINGS)
def test_the_same_in_other_words_is_let_pass(template, klein):
    (klein.folder / TEMPLATE).write_text(template)
    klein.check_equal()


@pytest.mark.parametrize("wrong", ["{{ messages }}", [{"name": "rag", "template": KLEIN_TEMPLATE}], 7, [7]])
def test_a_template_in_the_config_counts_unless_there_is_a_file(wrong, klein):
    klein.edit(CONFIG, chat_template=wrong)
    klein.check_equal()
    (klein.folder / TEMPLATE).unlink()
    refused(klein.open, r"tokenizer_config\.json: (the chat template makes|none of the chat|chat_template is)")
    for right in (KLEIN_TEMPLATE, [{"name": "rag", "template": "x"}, {"name": "default", "template": KLEIN_TEMPLATE}]):
        klein.edit(CONFIG, chat_template=right)
        klein.check_equal()


def test_an_old_file_of_a_template_counts(dev):
    (dev.folder / TEMPLATE).unlink()
    (dev.folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    refused(dev.open, r"chat_template\.json: the chat template makes")
    (dev.folder / "chat_template.json").write_text(json.dumps({"chat_template": DEV_TEMPLATE}))
    dev.open()


def test_no_template_is_the_released_one(family):
    before = family.check_equal()
    (family.folder / TEMPLATE).unlink()
    ours = family.open()
    assert [row.tolist() for length in LENGTHS for row in ours(PROMPTS, length)[0]] == before


# --- conversion and opening


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_small(tmp_path_factory.mktemp("official") / "model", text=SHALLOW_TEXT)
    (folder / "tokenizer" / TEMPLATE).write_text(KLEIN_TEMPLATE)
    return folder


@pytest.mark.parametrize(("name", "text"), [(CONFIG, '{"padding_side": "top"}'), (TEMPLATE, "{{ messages }}")])
def test_conversion_and_opening_refuse_alike(name, text, source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    converted = convert(copy, tmp_path / "converted", variant=SHALLOW_VARIANT)
    (copy / "tokenizer" / name).write_text(text)
    refused(lambda: convert(copy, tmp_path / "other", variant=SHALLOW_VARIANT), f"tokenizer/{name}")
    assert not (tmp_path / "other").exists()
    (converted / "tokenizer" / name).write_text(text)
    refused(lambda: Checkpoint.open(converted), f"tokenizer/{name}")


def test_a_conversion_keeps_what_was_said(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    path = copy / "tokenizer" / CONFIG
    values = json.loads(path.read_text()) | {"padding_side": "left", "truncation_side": "left"}
    path.write_text(json.dumps(values))
    (copy / "tokenizer/special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    before = KleinTokenizer(path.with_name(FILE))
    tokenizer = Checkpoint.open(convert(copy, tmp_path / "converted", variant=SHALLOW_VARIANT)).tokenizer
    for length in LENGTHS:
        for found, expected in zip(tokenizer(PROMPTS, length), before(PROMPTS, length), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert tokenizer(["a"], 99)[0][0, 0] == before.encode("!")[0]
