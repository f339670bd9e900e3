"""`flux2-mlx doctor`: all its checks are made and told, whatever becomes of each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.cli_runner import run
from helpers.findings import as_gpu, verdict

from flux2_mlx import device, doctor
from flux2_mlx.doctor import CheckUp, Finding, fits, machine, predictions, speed
from flux2_mlx.doctor.finding import UnmeasurableError
from flux2_mlx.doctor.speed import Rates, step_operations
from flux2_mlx.errors import CheckpointError, DeviceError


@pytest.mark.parametrize(
    ("chip", "name", "verdict"),
    [
        ("Apple Paravirtual device", "memory of a step", "warn"),
        ("Apple Paravirtual device", "computing while reading", "warn"),
        ("Apple Paravirtual device", "demo image", "fail"),
        ("Apple Paravirtual device", "convolution", "fail"),
        ("Apple M1", "memory of a step", "fail"),
    ],
)
def test_what_the_host_of_a_virtual_machine_decides_is_no_failure(chip, name, verdict, monkeypatch):
    monkeypatch.setattr(device, "chip", lambda: chip)
    found = doctor.as_guest(Finding(name, "fail", "2", "< 1", "report this"))
    assert (found.verdict, found.figure, found.bound) == (verdict, "2", "< 1")
    assert found.advice.endswith("report this")
    assert doctor.as_guest(Finding(name, "pass", "0")) == Finding(name, "pass", "0")


def test_what_a_machine_does_not_tell_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "cuts_float32", raising(RuntimeError("no")))
    facts = machine.describe(tmp_path)
    assert facts["tf32"] is None
    assert facts["chip"]
    assert facts["free_disk"] > 0


def test_swapping_is_told(monkeypatch):
    assert verdict(machine.check_swap(machine.swap_used())) == "pass"
    monkeypatch.setattr(machine, "swap_used", lambda: 2**30)
    assert verdict(machine.check_swap(0)) == "warn"
    assert machine.check_swap(None).verdict == "skip"


def test_a_long_operation_is_told(monkeypatch):
    assert speed.check_dispatch(mx.float32).verdict == "skip"
    as_gpu(monkeypatch)
    monkeypatch.setattr(speed, "timed", lambda work, times: [4 * 16384**2 * 24 * 128 / 1e12])  # 1 TFLOP/s at best
    assert verdict(speed.check_dispatch(mx.float32)) == "warn"
    monkeypatch.setattr(speed, "timed", lambda work, times: [1e-3])
    assert verdict(speed.check_dispatch(mx.float32)) == "pass"


def test_what_a_lack_of_cache_costs_is_told(monkeypatch):
    assert speed.check_cache(mx.float32).verdict == "skip"
    as_gpu(monkeypatch)
    monkeypatch.setattr(speed, "_block_pass", lambda config, dtype: lambda: mx.array(0))
    for seconds, expected in (((1.05, 1.0), "pass"), ((1.3, 1.0), "warn")):
        times = iter(seconds)
        monkeypatch.setattr(speed, "timed", lambda work, count, times=times: [next(times)])
        assert verdict(speed.check_cache(mx.float32)) == expected


def test_a_speed_that_varies_is_told(monkeypatch):
    monkeypatch.setattr(speed, "_block_pass", lambda config, dtype: lambda: mx.array(0))
    times = iter([[0.1], [1.0, 1.1], [0.1], [1.0, 2.0]])
    monkeypatch.setattr(speed, "timed", lambda work, count: next(times))
    rates, found = speed.measure_rates(mx.float32)
    assert verdict(found) == "pass"
    assert rates.attention == pytest.approx(4 * 1536**2 * 3072 / 0.1)
    assert rates.products == pytest.approx(2 * 1536 * 13 * 3072**2 / 0.9)
    assert verdict(speed.measure_rates(mx.float32)[1]) == "warn"


def test_operations_are_those_that_were_counted():
    """Of klein-4b, klein-9b and dev at 1024×1024, in TFLOP."""
    config = {name: doctor.VARIANTS[name].transformer for name in speed.MODELS}
    found = [sum(step_operations(config[name], 4608)) / 1e12 for name in speed.MODELS]
    assert found == pytest.approx([34.8, 75.5, 282.5], rel=0.02)


def test_predictions_follow_the_rates():
    slow, fast = predictions(Rates(1e12, 1e12)), predictions(Rates(2e12, 2e12))
    assert {name: seconds / 2 for name, seconds in slow.items()} == pytest.approx(fast)
    assert slow["klein-4b"] == pytest.approx(34.8, rel=0.02)


def test_what_fits_follows_the_memory(monkeypatch):
    monkeypatch.setattr(doctor, "device_memory", lambda: 2**42)
    assert fits() == {name: dict.fromkeys(("bf16", "qint8", "qint4"), 0) for name in speed.MODELS}
    monkeypatch.setattr(doctor, "device_memory", lambda: 8 * 2**30)
    assert fits()["dev"]["bf16"] > 40 * 2**30
    monkeypatch.setattr(doctor, "device_memory", lambda: 2**29)
    assert fits()["dev"]["bf16"] is None


def raising(error: BaseException) -> Callable[..., Any]:
    def check(*_: object, **__: object) -> Any:
        raise error

    return check


def test_a_gpu_that_fails_is_a_finding():
    error = RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
    found = doctor.made("product", raising(error))
    assert (found.name, verdict(found)) == ("product", "fail")
    assert found.figure.startswith("the GPU has no memory left for this")


@pytest.mark.parametrize(
    ("error", "figure"),
    [
        (RuntimeError("[quantized_matmul] NYI"), "RuntimeError: [quantized_matmul] NYI"),
        (RuntimeError("[read] Unable to read\nfrom file"), "RuntimeError: [read] Unable to read\\nfrom file"),
        (MemoryError("std::bad_alloc"), "MemoryError: std::bad_alloc"),
        (ValueError("shapes"), "ValueError: shapes"),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (CheckpointError("the demo is damaged"), "the demo is damaged"),
    ],
)
def test_whatever_a_check_raises_is_a_finding(error, figure):
    found = doctor.made("product", raising(error))
    assert (found.name, verdict(found), found.figure) == ("product", "fail", figure)


def test_what_can_not_be_measured_is_skipped():
    found = doctor.made("product", raising(UnmeasurableError("no disk; buy one")))
    assert found == Finding("product", "skip", "no disk; buy one")


FINDINGS = [
    Finding("product", "pass", "cosine 1.0", "> 0.9999"),
    Finding("disk", "warn", "0.1 GB/s", "> 0.3 GB/s", "use a faster disk"),
    Finding("wired memory", "skip", "only Metal wires memory"),
]


class Checks(CheckUp):
    findings = FINDINGS

    def __iter__(self):
        self.rates = Rates(1e12, 1e12)
        yield from self.findings


@pytest.mark.parametrize("good", [True, False])
def test_the_command(good, monkeypatch, models):
    found = FINDINGS if good else [*FINDINGS, Finding("float32", "fail", "error 0.1", "< 1e-5", "please report")]
    monkeypatch.setattr(Checks, "findings", found)
    monkeypatch.setattr(doctor, "CheckUp", Checks)
    result = run("doctor")
    assert result.exit_code == (0 if good else 1)
    assert "pass  product                       cosine 1.0 (> 0.9999)\n" in result.stdout
    assert "warn  disk                          0.1 GB/s (> 0.3 GB/s): use a faster disk\n" in result.stdout
    assert ("fail  float32" in result.stdout) is not good
    assert "klein-4b  34.8 s a step" in result.stdout
    result = run("doctor", "--json")
    assert result.exit_code == (0 if good else 1)
    report = json.loads(result.stdout)
    assert report["good"] is good
    assert [one["verdict"] for one in report["findings"]] == [one.verdict for one in found]
    assert report["machine"]["versions"]["mlx"]
    assert report["machine"]["models_folder"] == str(models)


def test_all_checks_are_made(monkeypatch, tmp_path):
    """In their order, each by its own name; none is left out."""
    asked = []
    monkeypatch.setattr(doctor, "made", lambda name, check: asked.append(name) or Finding(name, "pass", ""))
    assert [found.name for found in CheckUp(Path(tmp_path))] == asked
    assert len(asked) == len(set(asked)) >= 17


def test_device_errors_are_told_apart():
    assert issubclass(DeviceError, Exception)
    assert not device.is_failure(RuntimeError("[load_safetensors] Failed to open file"))
