"""The command group: help, versions, exit codes, what is imported, and `info`."""

import json
import os
import re
import subprocess
import sys
from importlib.resources import files

import pytest
from helpers.cli_runner import done, process, refusal, run

import flux2_mlx
from flux2_mlx.cli.main import cli
from flux2_mlx.config import QUANTIZATIONS, VARIANTS

COMMANDS = (
    "bench",
    "convert",
    "describe",
    "doctor",
    "download",
    "i2i",
    "info",
    "lora",
    "models",
    "outpaint",
    "t2i",
    "upsample",
)
HIDDEN = ("cache",)  # an alias, for who knows it
HEAVY = ("mlx", "mlx_lm", "numpy", "PIL", "huggingface_hub", "tokenizers", "safetensors", "tqdm", "torch")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLUX2_MLX_HOME", str(tmp_path / "models"))
    return tmp_path


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_every_command(option):
    text = done(option).stdout
    assert sorted(cli.commands) == sorted((*COMMANDS, *HIDDEN))
    for command in cli.commands:
        assert (f"\n  {command} " in text) == (command not in HIDDEN)


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_a_way_to_call_it(command, option):
    text = done(command, option).stdout
    _, example, after = text.partition("Example")
    assert example
    assert f"\n    flux2-mlx {command} " in after.partition("Options:")[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    for parameter in cli.commands[command].params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["t2i", "-h"], ["convert", "-h"]])
def test_help_imports_nothing_heavy(arguments):
    script = f"""
import sys
from importlib.resources import files
from flux2_mlx.cli.main import cli
cli({arguments}, standalone_mode=False)
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "[]\n")
    assert result.stdout


def test_version():
    assert done("--version").stdout == f"flux2-mlx, version {flux2_mlx.__version__}\n"


def test_python_m_runs_the_same_command():
    result = process("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == done("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["t2i"], "give a PROMPT, --prompts-file or --replay"),
        (["t2i", "a", "--prompts-file", "b"], "give either PROMPT or --prompts-file"),
        (["t2i", "a", "red", "fox"], "unexpected extra arguments"),
        (["t2i", "a", "--nonsense"], "No such option"),
        (["t2i", "a", "-W", "wide"], "'wide' is not a valid integer"),
        (["t2i", "a", "-g", "much"], "'much' is not a valid float"),
        (["t2i", "a", "-q", "qint2"], "'bf16', 'qint8', 'qint6', 'mixed4', 'qint4'"),
        (["t2i", "a", "--dtype", "float8"], "'float32', 'bfloat16', 'float16'"),
        (["i2i", "a", "-i", "b.png", "--dtype", "bf16"], "'float32', 'bfloat16', 'float16'"),
        (["outpaint", "a.png", "--dtype", "half"], "'float32', 'bfloat16', 'float16'"),
        (["info", "demo", "--dtype", "float64"], "'float32', 'bfloat16', 'float16'"),
        (["t2i", "a", "--checkpoint", "0"], "0 is not in the range"),
        (["convert", "a"], "Missing argument 'TARGET'"),
        (["download"], "Missing argument 'MODEL'"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_how_to_get_help(arguments, message):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: flux2-mlx")
    assert "--help' for help." in result.stderr
    assert message in result.stderr.splitlines()[-1]


def test_an_unforeseen_file_error_is_one_line(monkeypatch):
    def fail(variant):
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("flux2_mlx.cli.info._print_all", fail)
    assert refusal("info") == "/some/file: Permission denied"


def test_a_closed_pipe_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "flux2_mlx", "info", "--json"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, b"")


def test_info_shows_every_model_in_a_table():
    result = done("info")
    header, *rows, limit = result.stdout.splitlines()
    assert header.split()[:4] == ["model", "licence", "steps", "guidance"]
    assert limit.startswith("the default limit of a run's memory is ")
    assert [row.split()[0] for row in rows] == list(VARIANTS)
    assert "built in" in rows[0]
    for row, variant in zip(rows, VARIANTS.values(), strict=True):
        assert f" {variant.licence} " in row
        assert f"{variant.steps:>6}{variant.guidance:10.1f} " in row
    assert result.stderr == ""


def test_info_as_json_is_one_list_of_all_models():
    rows = json.loads(done("info", "--json").stdout)
    assert [row["model"] for row in rows] == list(VARIANTS)
    assert {row["model"]: row["gated"] for row in rows} == {v.name: v.gated for v in VARIANTS.values()}


def test_info_of_a_model_names_its_page_licence_and_sizes():
    text = done("info", "klein-9b").stdout
    assert text.startswith("klein-9b: FLUX non-commercial licence, 4 steps, guidance 1.0\n")
    assert "https://huggingface.co/black-forest-labs/FLUX.2-klein-9B (gated)" in text
    assert [line.split()[0] for line in text.splitlines()[3:8]] == list(QUANTIZATIONS)


def test_info_of_a_model_as_json():
    row = json.loads(done("info", "klein-4b", "--json").stdout)
    assert set(row) >= {"model", "repo", "licence", "gated", "steps", "guidance", "size", "bytes", "folders"}
    assert set(row["bytes"]["bf16"]) == {"transformer", "text_encoder", "language_model", "vae"}
    assert (row["model"], row["repo"], row["folders"]) == ("klein-4b", "black-forest-labs/FLUX.2-klein-4B", [])
    totals = [sum(row["bytes"][quant].values()) for quant in QUANTIZATIONS]
    assert totals == sorted(totals, reverse=True)
    # bfloat16 takes two bytes a parameter; 8 bits in groups of 64 with two bfloat16 constants 8.5 bits.
    transformer = {quant: row["bytes"][quant]["transformer"] for quant in QUANTIZATIONS}
    assert transformer["bf16"] == 2 * 3_875_544_576
    assert transformer["qint8"] / transformer["bf16"] == pytest.approx(8.5 / 16, rel=1e-3)


def test_info_of_an_unknown_model_says_what_comes_close():
    message = refusal("info", "klein-5b")
    assert message == "there is no model or folder 'klein-5b'; did you mean klein-4b, klein-9b or klein-9b-kv?"


def test_info_of_the_demo_and_of_a_folder_is_what_a_run_would_load():
    for model in ("demo", str(files("flux2_mlx.demo"))):
        values = json.loads(done("info", model, "--json").stdout)
        assert (values["quant"], values["text_quant"]) == ("bf16", "bf16")
    quantized = json.loads(done("info", "demo", "-q", "qint8", "--memory-limit", "3MB", "--json").stdout)
    assert [phase["streamed"] for phase in quantized["phases"]] == [0, 0, 0]


def test_info_of_a_repo_is_that_of_its_model():
    assert json.loads(done("info", "black-forest-labs/FLUX.2-klein-4B", "--json").stdout)["model"] == "klein-4b"


def test_a_plan_needs_a_model():
    assert "--quant is about one model; give a MODEL" in run("info", "-q", "qint8").stderr


def test_info_plans_the_memory_of_a_run():
    values = json.loads(done("info", "klein-4b", "-q", "qint8", "-W", "512", "-H", "768", "--json").stdout)
    assert [values[name] for name in ("model", "quant", "text_quant", "width", "height")] == [
        "klein-4b", "qint8", "qint8", 512, 768,
    ]  # fmt: skip
    assert [phase["name"] for phase in values["phases"]] == ["text_encoder", "transformer", "vae"]
    for phase in values["phases"]:
        assert phase["peak_memory"] == phase["weights"] + phase["activations"]
        assert phase["streamed"] == 0
    assert values["peak_memory"] == max(phase["peak_memory"] for phase in values["phases"])
    assert values["fits"] == (values["peak_memory"] <= values["limit"])
    assert 4.1e9 < values["phases"][1]["weights"] < 4.5e9
    text = done("info", "klein-4b", "-q", "qint8", "-W", "512", "-H", "768").stdout
    assert "memory for 512×768 with qint8, text encoder qint8" in text
    assert f"{values['peak_memory'] / 2**30:.2f} GiB" in text


def test_info_plans_for_a_dtype():
    def planned(*arguments):
        return json.loads(done("info", "klein-4b", *arguments, "--json").stdout)

    wide, *narrow = (planned("--dtype", name) for name in ("float32", "bfloat16", "float16"))
    assert [values["dtype"] for values in (wide, *narrow)] == ["float32", "bfloat16", "float16"]
    assert narrow[0]["phases"] == narrow[1]["phases"]
    for phase, smaller in zip(wide["phases"], narrow[0]["phases"], strict=True):
        assert smaller["activations"] < phase["activations"]
    assert planned()["dtype"] in ("float32", "bfloat16", "float16")
    assert ", computed in float16, in GiB:" in done("info", "klein-4b", "--dtype", "float16").stdout


def test_info_refuses_an_odd_size():
    message = "width 100 must be a positive multiple of 16; nearest are 96 and 112"
    assert refusal("info", "klein-4b", "-W", "100") == message


def test_info_says_what_a_limit_means():
    values = json.loads(done("info", "klein-4b", "--memory-limit", "6GiB", "--json").stdout)
    text_encoder, transformer, vae = values["phases"]
    assert (text_encoder["streamed"], vae["streamed"]) == (0, 0)
    assert transformer["streamed"] > 0
    assert (values["limit"], values["fits"]) == (6 * 2**30, True)
    assert transformer["peak_memory"] <= 6 * 2**30
    read = f"{transformer['streamed'] / 2**30:.3g} GiB at every step"
    last = done("info", "klein-4b", "--memory-limit", "6GiB").stdout.splitlines()[-1]
    assert last.endswith(f"fits into the limit of 6 GiB by reading from disk: {read}")
    values = json.loads(done("info", "klein-base-4b", "--memory-limit", "6GiB", "--json").stdout)
    assert values["read_a_step"] == 2 * values["phases"][1]["streamed"] > 0  # with and without the prompt
    last = done("info", "klein-9b", "--memory-limit", "4GiB", "-W", "256", "-H", "256").stdout.splitlines()[-1]
    assert re.search(r" by reading from disk: [0-9.]+ GiB for every prompt and [0-9.]+ GiB at every step$", last)
    text = done("info", "klein-4b", "--memory-limit", "2GiB").stdout
    size = text.partition(" does not fit into the limit of 2 GiB; an image of ")[2].removesuffix(" would fit\n")
    width, height = size.split("×")
    assert "GiB fits into" in done("info", "klein-4b", "--memory-limit", "2GiB", "-W", width, "-H", height).stdout
    assert refusal("info", "klein-4b", "--memory-limit", "few").startswith("--memory-limit must be a size such as 12GB")
