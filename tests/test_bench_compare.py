"""`flux2-mlx bench compare`: two results side by side, whoever they come from."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from helpers.cli_runner import done, refusal, run

from flux2_mlx.benchmark import Measured, Spread, compare, read_result, result
from flux2_mlx.benchmark.result import PhaseFigures
from flux2_mlx.errors import InputError

MACHINE = {
    "chip": "Apple M3 Max",
    "system": "macOS 26.2",
    "computes_on": "Metal",
    "tf32": False,
    "versions": {"flux2-mlx": "0.1.0", "mlx": "0.32.4"},
}


def row(seconds: float = 1.0, **changes: Any) -> Measured:
    spread = Spread(0.9 * seconds, seconds, 1.2 * seconds, 3)
    settings = {
        "variant": "klein-4b", "official": True, "fingerprint": "a", "quant": "bf16", "text_quant": "qint8",
        "dtype": "bfloat16", "width": 1024, "height": 768, "steps": 4, "passes": 1, "memory_limit": 2**33,
        "first_here": True, "cold": 10 * seconds, "warm": spread, "step": spread, "products": 0.8, "ratio": 1.25,
        "expected_step": None,
        "phases": (PhaseFigures("transformer", 5.0, spread, 2**32, 2**32, 0, 0),),
    }  # fmt: skip
    return Measured(**settings | changes)


def write(path: Path, *rows: Measured, complete: bool = True, **machine: Any) -> Path:
    path.write_text(json.dumps(result(MACHINE | machine, rows, complete=complete)), encoding="utf-8")
    return path


def test_ratios_have_their_spread(tmp_path):
    first, second = write(tmp_path / "a", row()), write(tmp_path / "b", row(2.0))
    found = compare(read_result(first), read_result(second))
    (both,) = found.rows
    assert found.differences == ()
    assert both.cold == 2
    assert both.step == both.warm
    assert (both.step.least, both.step.median, both.step.most) == pytest.approx((1.8 / 1.2, 2, 2.4 / 0.9))
    assert (both.peak_memory, both.differing) == (1, ())


def test_what_differs_is_said(tmp_path):
    first = write(tmp_path / "a", row(), row(quant="qint4"))
    second = write(tmp_path / "b", row(dtype="float16", fingerprint="b"), row(height=64), chip="Apple M1", tf32=None)
    shown = done("bench", "compare", first, second).stdout.splitlines()
    assert shown == [
        "A and B differ, so that their ratios tell of all of it: chip: Apple M3 Max, Apple M1; TF32: False, not told",
        "klein-4b bf16/qint8 1024×768: B took, in times of A,",
        "first run 1.00; later runs 1.00 (0.75 to 1.33); a step 1.00 (0.75 to 1.33); peak 1.00",
        "other things that differ: dtype, weights",
        "only in A: klein-4b qint4/qint8 1024×768",
        "only in B: klein-4b bf16/qint8 1024×64",
    ]


def test_runs_of_other_steps_are_not_compared(tmp_path):
    first, second = write(tmp_path / "a", row()), write(tmp_path / "b", row(steps=8))
    shown = done("bench", "compare", first, second).stdout
    assert "first run –; later runs –; a step 1.00 (0.75 to 1.33); peak 1.00" in shown
    assert "other things that differ: steps (4, 8)" in shown


def test_steps_of_other_passes_are_not_compared(tmp_path):
    first, second = write(tmp_path / "a", row()), write(tmp_path / "b", row(passes=2))
    assert "a step –; peak 1.00\nother things that differ: guidance" in done("bench", "compare", first, second).stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [({"memory_limit": 2**34}, "memory limit"), ({"official": False}, "whether they are official")],
)
def test_other_limits_and_sources_are_said(change, said, tmp_path):
    first, second = write(tmp_path / "a", row()), write(tmp_path / "b", row(**change))
    shown = done("bench", "compare", first, second).stdout
    assert "first run 1.00; later runs 1.00 (0.75 to 1.33); a step 1.00 (0.75 to 1.33); peak 1.00\n" in shown
    assert shown.endswith(f"other things that differ: {said}\n")


def test_first_runs_of_another_order_are_not_compared(tmp_path):
    first, second = write(tmp_path / "a", row()), write(tmp_path / "b", row(first_here=False))
    shown = done("bench", "compare", first, second).stdout
    assert "first run –; later runs 1.00 " in shown
    assert shown.endswith("other things that differ: whether files were read before\n")


def test_a_result_that_is_not_whole_is_compared_as_far_as_it_is(tmp_path):
    first, second = write(tmp_path / "a", row(), complete=False), write(tmp_path / "b", row())
    told = json.loads(done("bench", "compare", first, second, "--json").stdout)
    assert len(told["rows"]) == 1
    assert "A is not whole" in done("bench", "compare", first, second).stdout


def test_nothing_in_common_is_an_error(tmp_path):
    first, second = write(tmp_path / "a", row()), write(tmp_path / "b", row(quant="qint4"))
    message = refusal("bench", "compare", first, second)
    assert message.endswith("klein-4b bf16/qint8 1024×768 in the first, klein-4b qint4/qint8 1024×768 in the second")
    assert refusal("bench", "compare", first, write(tmp_path / "c")).endswith("none in the second")


def damaged(change: str) -> str:
    values = json.loads(json.dumps(result(MACHINE, [row()], complete=True)))
    scope = {"values": values, "deepcopy": deepcopy}
    exec(change, scope)
    return json.dumps(scope["values"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("values.pop('schema')", "there is no schema"),
        ("values['schema'] = 2", "its schema is 2, and this version reads 1"),
        ("values['schema'] = 'x' * 10**6", "its schema is xxxxxxxxxxxxxxxxxxxx, and"),
        ("values = [values]", "there is no schema"),
        ("values.pop('rows')", "it lacks 'rows'"),
        ("values['rows'] = {}", "its rows are no list"),
        ("values['rows'] *= 1001", "its rows are no list of at most 1000"),
        ("values['rows'] = [1]", "its rows are no list of at most 1000 objects"),
        ("values['rows'] *= 2", "it has klein-4b bf16/qint8 1024×768 twice"),
        ("values['machine'] = None", "machine is 'None', not an object"),
        ("values['machine']['chip'] = {}", "'{}' is no text"),
        ("values['machine']['versions'] = []", "versions is '[]', not an object"),
        ("values['rows'][0]['cold'] = 0", "cold is '0', not a number above 0"),
        ("values['rows'][0]['cold'] = -1", "cold is '-1', not a number above 0"),
        ("values['rows'][0]['cold'] = True", "cold is 'True', not a number above 0"),
        ("values['rows'][0]['cold'] = '1'", "cold is '1', not a number above 0"),
        ("values['rows'][0]['cold'] = 10**400", "cold is '1000"),
        ("values['rows'][0]['step']['median'] = 100", "a median of 100.0 is not between"),
        ("values['rows'][0]['warm'] = None", "warm is 'None', not an object"),
        ("values['rows'][0]['width'] = 10.5", "width is 10.5, not a whole number"),
        ("values['rows'][0]['variant'] = 'x' * 201", "variant is no text of at most 200 characters"),
        ("values['rows'][0]['phases'] = []", "a row has no phases"),
        ("values['rows'][0]['phases'] = None", "its phases are no list of at most 1000 objects"),
        ("values['rows'][0]['phases'] = [None]", "its phases are no list of at most 1000 objects"),
    ],
)
def test_what_is_no_result_is_refused_in_a_line(change, said, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(damaged(change), encoding="utf-8")
    message = refusal("bench", "compare", path, path)
    assert message.startswith(f"{path} is no result of a benchmark: ")
    assert said in message


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"{", b"NaN", b"[" * 10**5, b'{"schema": 1, "schema": 1}', b'{"schema": 1' + b"0" * 1000 + b"}"],
)
def test_what_is_no_json_is_refused(data, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match="is no result of a benchmark: "):
        read_result(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="can't read"):
        read_result(tmp_path / "missing")
    with pytest.raises(InputError, match="can't read"):
        read_result(tmp_path)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(10**7 + 1)
    with pytest.raises(InputError, match="too large"):
        read_result(large)


def test_names_from_files_do_not_drive_a_terminal(tmp_path):
    path = write(tmp_path / "a", row(variant="\x1b[31mred"), chip="\x1b[2J")
    other = write(tmp_path / "b", row(variant="\x1b[31mred"))
    assert "\x1b" not in done("bench", "compare", path, other).stdout
    assert "\\u001b" in done("bench", "compare", path, other, "--json").stdout


def test_options_of_a_comparison_may_stand_before_it(tmp_path):
    first, second = write(tmp_path / "a", row()), write(tmp_path / "b", row())
    told = done("bench", "compare", first, second, "--json").stdout
    assert done("bench", "--json", "compare", first, second).stdout == told
    assert done("bench", "compare", "--json", first, second).stdout == told
    assert "Compare two results" in done("bench", "compare", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("demo", "compare", "a", "b"), "a comparison is of two results, not of the model 'demo'; write `flux2-mlx b"),
        (("-q", "bf16", "compare", "a", "b"), "a comparison measures nothing, so -q has no effect on it; leave it out"),
        (("demo", "extra"), "one model is measured at a time, 'demo' or 'extra'; give one of them"),
        (("demo", "--json", "extra"), "one model is measured at a time, 'demo' or 'extra'; give one of them"),
        (("compare",), "Missing argument 'A'"),
        (("compare", "a", "b", "c"), "Got unexpected extra argument (c)"),
    ],
)
def test_what_is_no_comparison_is_refused(arguments, said):
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
