"""Tables of PEFT that name layers by regular expressions."""

import re

import pytest
from flux2_mlx.convert.lora.patterns import Patterns

from flux2_mlx.errors import CheckpointError

NAMES = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.attn.to_k",
    "transformer_blocks.12.attn.add_q_proj",
    "transformer_blocks.12.ff_context.linear_in",
    "single_transformer_blocks.1.attn.to_q",
    "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
    "x_embedder",
    "time_guidance_embed.timestep_embedder.linear_1",
]
PATTERNS = [
    *("to_q", "attn.to_q", "^transformer_blocks.1.attn.to_k", "x_embedder$", "^to_q", r"attn\.to_q$", "attn"),
    *(".*q_proj", r".*\.to_q", "to_.", "to_q?", r".*\.\d+\.attn\..+", r"blocks\.[01]\.attn\.to_[^k]", "[a-z_]+q"),
    *("(to_q|to_k)", "(?:add_(q|v)_proj|linear_in)", "to_q|to_k", "^(single_)", r"(.*)1(.*)", "()", ".to_q", ".*?q"),
    *("^.*$", r"\w+", r"transformer_blocks\.\d\d?\..*", "t?o*_+q", "(|single_)transformer_blocks.1.+", r"\D+", "to_q-"),
]


def of_peft(table: dict[str, float], name: str) -> float | None:
    """`get_pattern_key` of PEFT."""
    return next((value for pattern, value in table.items() if re.match(rf"(.*\.)?({pattern})$", name)), None)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_what_peft_has_them_match(pattern):
    table = {pattern: 5.0}
    for name in NAMES:
        assert Patterns.of("alpha_pattern", table).value(name, None) == of_peft(table, name), name


@pytest.mark.parametrize("shift", range(0, len(PATTERNS), 3))
def test_the_first_pattern_counts(shift):
    table = {pattern: float(number) for number, pattern in enumerate(PATTERNS[shift:] + PATTERNS[:shift])}
    for name in NAMES:
        assert Patterns.of("alpha_pattern", table).value(name, None) == of_peft(table, name)


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model.", "transformer.base_model.model."])
def test_names_are_those_that_peft_saw(prefix):
    table = Patterns.of("alpha_pattern", {"^x_embedder": 2.0, "^transformer_blocks.*": 3.0})
    assert table.value(f"{prefix}x_embedder", 1.0) == 2
    assert table.value(f"{prefix}transformer_blocks.0.attn.to_q", 1.0) == 3
    assert table.value(f"{prefix}single_transformer_blocks.0.attn.to_q", 1.0) == 1


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|b)*", "a{3}", "(?=a)", r"(a)\1", "[a", "(a", "a)", "*a", r"\Z", "[z-a]", "a**", "(" * 21 + ")" * 21],
)
def test_other_expressions_are_refused(pattern):
    with pytest.raises(CheckpointError, match=r"its rank_pattern has .*, which is not understood; write the name of"):
        Patterns.of("rank_pattern", {pattern: 4.0})


@pytest.mark.parametrize("pattern", [".*" * 101, "(a|b)" * 401])
def test_long_expressions_are_refused(pattern):
    with pytest.raises(CheckpointError, match="its rank_pattern has too many expressions; write the name of each"):
        Patterns.of("rank_pattern", {pattern: 4.0})


def test_many_repetitions_take_no_time_that_grows_with_their_power():
    assert Patterns.of("rank_pattern", {"(a|a)(a|.)" * 50 + ".*" * 50 + "b": 4.0}).value("a" * 200, None) is None


def test_tables_of_names_may_be_long():
    names = {f"^transformer_blocks.{number}.attn.to_q": float(number) for number in range(500)}
    assert Patterns.of("rank_pattern", names).value("transformer_blocks.499.attn.to_q", None) == 499
