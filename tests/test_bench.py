"""`flux2-mlx bench`: what is measured, how it is told, and that it can be shared."""

import gc
import getpass
import json
import socket
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.cli_runner import done, refusal, run
from helpers.variants import change_variant

from flux2_mlx import Flux2Pipeline, layers
from flux2_mlx.benchmark import Case, measure, measurement
from flux2_mlx.config import TransformerConfig
from flux2_mlx.errors import InputError
from flux2_mlx.transformer import Flux2Transformer, pass_products

QUICK = ("--size", "64", "-s", "2", "--repeats", "1")


def demo(**settings: object) -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", prompt_cache=False, **settings)


@pytest.fixture
def ticks(monkeypatch) -> Iterator[None]:
    """A clock that is a second further whenever it is looked at, and products that take a second each."""
    clock = count()
    monkeypatch.setattr(measurement, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(measurement, "timed", lambda work, times: [3.0, 1.0, 2.0])


def test_a_row_has_all_figures(ticks):
    gc.collect()
    held = mx.get_active_memory()  # by other tests
    (row,) = measure([Case(demo, 64, 48, 3)], 2)
    assert (row.variant, row.official, row.width, row.height, row.steps, row.passes) == ("demo", True, 64, 48, 3, 1)
    assert row.cold == 4  # from before it is opened: three steps, and its end
    assert (row.warm.least, row.warm.median, row.warm.most, row.warm.count) == (4, 4, 4, 2)
    assert (row.step.median, row.step.count) == (1, 4)  # of both later runs, and none of its first steps
    assert row.first_here
    assert [phase.name for phase in row.phases] == ["text_encoder", "transformer", "vae"]
    assert all(0 < phase.peak_memory - held <= 1.05 * phase.planned for phase in row.phases)
    assert all(phase.warm.count == 2 for phase in row.phases)
    assert row.ratio == row.step.median / row.products
    assert row.expected_step is None


def test_guidance_takes_the_products_of_two_passes(ticks):
    (once,) = measure([Case(demo, 64, 64, 2)], 1)
    (twice,) = measure([Case(lambda: change_variant(demo(), distilled=False, guidance=4.0), 64, 64, 2)], 1)
    assert (once.passes, twice.passes) == (1, 2)
    assert twice.products == 2 * once.products


def test_own_products_are_those_of_a_pass(ticks):
    config = TransformerConfig(2, 3, 2, 96, 32, 32, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)
    counted = sum(pass_products(config, 5, 7).values())
    assert counted == 2 * 2 * 4 + 3 * 2 + 1
    assert measurement.own_products(config, mx.float32, 5, 7) == counted + 5


def test_own_products_are_multiplied(monkeypatch):
    config = TransformerConfig(1, 1, 2, 96, 32, 32, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)
    made = []

    def timed(work, times):
        made.append(work())
        return [1.0]

    monkeypatch.setattr(measurement, "timed", timed)
    measurement.own_products(config, mx.bfloat16, 5, 7)
    assert {(*x.shape, x.dtype) for x in made[:-2]} == {
        (rows, columns, mx.bfloat16) for rows, columns, _ in pass_products(config, 5, 7)
    }
    assert [x.shape for x in made[-2:]] == [(1, 12, 64), (1, 7, 64)]


def test_products_of_a_pass_are_those_that_it_multiplies(monkeypatch):
    config = TransformerConfig(2, 3, 2, 96, 32, 32, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)
    made: Counter[tuple[int, int, int]] = Counter()
    project = layers.project

    def counted(x, weight):
        made[x.size // x.shape[-1], *weight.shape] += 1
        return project(x, weight)

    monkeypatch.setattr(layers, "project", counted)
    Flux2Transformer(config)(mx.zeros((1, 7, 32)), mx.zeros((1, 5, 64)), mx.array([0.5]), mx.zeros((12, 2, 32)))
    before_and_after = {(7, 64, 32): 1, (7, 32, 64): 1}
    of_tokens = {shape: count for shape, count in made.items() if shape[0] > 1}  # one row is the noise level's
    assert of_tokens == pass_products(config, 5, 7) | before_and_after


def test_each_run_is_of_a_pipeline_that_keeps_its_networks():
    opened = []

    def open_once() -> Flux2Pipeline:
        opened.append(demo())
        return opened[-1]

    (row,) = measure([Case(open_once, 64, 64, 2)], 1)
    assert len(opened) == 1
    assert opened[0].networks.kept_bytes == 0, "it is released at the end"
    assert row.phases[1].warm.count == 1


def test_files_that_were_read_before_are_told(ticks):
    cases = [Case(partial(demo, quant=quant), side, 64, 2) for quant in ("bf16", "qint8") for side in (64, 80)]
    assert [row.first_here for row in measure(cases, 1)] == [True, False, False, False]
    assert [row.first_here for row in measure(cases[:1], 1)] == [True]
    lines = done("bench", *QUICK, "--size", "80", "--quiet").stdout.splitlines()
    assert lines.count("its files were read for an earlier row, so that the first run may find them in memory") == 1


def test_what_is_streamed_is_told():
    (row,) = measure([Case(lambda: demo(memory_limit="5MB"), 16, 16, 2)], 1)
    (transformer,) = (phase for phase in row.phases if phase.name == "transformer")
    assert transformer.read >= 2 * transformer.streamed > 0


@pytest.mark.parametrize(("width", "steps"), [(70, 2), (64, 2000)])
def test_a_case_that_can_not_be_is_refused(width, steps):
    with pytest.raises(InputError):
        Case(demo, width, 64, steps).check(demo())


def test_json_is_made_to_be_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = done("bench", *QUICK, "--size", "64x80", "-q", "qint4", "-q", "bf16", "--json", "--models-dir", tmp_path)
    told = json.loads(result.stdout)
    assert (told["schema"], told["complete"]) == (1, True)
    rows = [(row["variant"], row["quant"], row["width"], row["height"]) for row in told["rows"]]
    assert rows == [("demo", quant, 64, height) for quant in ("qint4", "bf16") for height in (64, 80)]
    assert told["machine"]["versions"]["mlx"]
    assert told["machine"]["versions"]["flux2-mlx"]
    assert told["machine"]["chip"]
    assert not {"models_folder", "free_disk"} & told["machine"].keys()
    for secret in (str(tmp_path), str(Path.home()), socket.gethostname(), f"/{getpass.getuser()}/"):
        assert secret not in result.stdout
    begun = result.stderr.splitlines()
    assert begun[:3] == [
        "demo qint4 64×64, first run",
        "demo qint4 64×64, run 2 of 2",
        "demo qint4 64×64, products of these shapes",
    ]
    assert len(begun) == 12


def test_a_folder_is_not_named(tmp_path):
    """Its place may tell of its user, and of others' projects."""
    copy = tmp_path / "secret"
    copy.mkdir()
    source = Path(Flux2Pipeline.from_pretrained("demo").checkpoint.folder)
    for file in source.rglob("*"):
        target = copy / file.relative_to(source)
        if file.is_dir():
            target.mkdir()
        elif file.suffix != ".py":
            target.write_bytes(file.read_bytes())
    result = done("bench", copy, *QUICK, "--quiet", "--json")
    assert "secret" not in result.stdout
    assert result.stderr == ""


def test_a_table_is_printed(ticks):
    lines = done("bench", *QUICK, "--quiet").stdout.splitlines()
    assert "flux2-mlx" in lines[0]
    assert lines[2] == "demo 64×64, 2 steps, bf16, text encoder bf16, computed in float32:"
    assert [line.split()[0] for line in lines[3:]] == ["seconds", "text_encoder", "transformer", "vae", "whole", "a"]
    assert lines[-2].split() == ["whole", "run", "3", "3", "3", "3"]
    assert lines[-1].split()[:6] == ["a", "step", "–", "1", "1", "1"]


def test_what_was_measured_is_told_when_it_is_stopped(monkeypatch):
    figures = measurement._figures
    calls = count()

    def stopped(*given, **named):
        if next(calls):
            raise KeyboardInterrupt
        return figures(*given, **named)

    monkeypatch.setattr(measurement, "_figures", stopped)
    result = run("bench", *QUICK, "--size", "80", "--json", "--quiet")
    assert (result.exit_code, result.stderr) == (130, "interrupted; nothing was left half written\n")
    told = json.loads(result.stdout)
    assert (told["complete"], [row["width"] for row in told["rows"]]) == (False, [64])
    calls = count()
    monkeypatch.setattr(measurement, "_figures", stopped)
    result = run("bench", *QUICK, "--size", "80", "--quiet")
    assert result.exit_code == 130
    assert "demo 64×64" in result.stdout
    assert "demo 80×80" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--size", "70"], "height 70 must be a positive multiple of 16; nearest are 64 and 80"),
        (["--memory-limit", "1MB"], "the VAE needs 32.8 MiB, the limit is 0.954 MiB; no size fits; "),
        (["nonsense"], "there is no model or folder 'nonsense'; choose one of demo, "),
        (["--memory-limit", "much"], "--memory-limit must be a size such as 12GB"),
    ],
)
def test_what_can_not_be_measured_is_refused_before_anything_is(arguments, line):
    assert refusal("bench", *arguments).startswith(line)


@pytest.mark.parametrize("size", ["", "x", "64x", "x64", "64x64x64", "-64", "64.0", "1e3", "９９", "123456"])
def test_a_size_that_is_none_is_refused(size):
    result = run("bench", "--size", size)
    assert result.exit_code == 2
    assert "is no size; write one such as 512 or 1024x768." in result.stderr


@pytest.mark.parametrize("arguments", [("-s", "1"), ("--repeats", "0"), ("-q", "qint3"), ("demo", "other")])
def test_options_are_checked(arguments):
    assert run("bench", *arguments).exit_code == 2
