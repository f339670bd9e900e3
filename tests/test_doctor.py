"""`flux2-mlx doctor`: all its checks are made and told, whatever becomes of each."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.cli_runner import run
from helpers.findings import verdict

from flux2_mlx import device, doctor
from flux2_mlx.config import QUANTIZATIONS
from flux2_mlx.doctor import CheckUp, Finding, disk, fits, machine, numerics, speed
from flux2_mlx.doctor.finding import UnmeasurableError
from flux2_mlx.durations import Rates
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


def test_what_fits_follows_the_memory(monkeypatch):
    monkeypatch.setattr(doctor, "device_memory", lambda: 2**42)
    assert fits() == {name: dict.fromkeys(QUANTIZATIONS, 0) for name in speed.MODELS}
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


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything that takes long be skipped for that, and a small file, which is not timed, stand for the large
    one."""
    large_file = disk.large_file

    def check(file: Callable[[], Path]) -> Finding:
        return Finding("disk", "pass", str(file()))

    monkeypatch.setattr(disk, "check_reading", check)
    monkeypatch.setattr(disk, "check_overlap", check)
    monkeypatch.setattr(disk, "large_file", lambda folder: large_file(folder, 2**20))
    monkeypatch.setattr(numerics, "_CHANNELS", 16)
    monkeypatch.setattr(numerics, "LONGEST", 0)


def test_the_checks_go_on_after_one_that_can_not_be_made(monkeypatch, models):
    quick(monkeypatch)
    monkeypatch.setattr(mx, "quantized_matmul", raising(RuntimeError("[quantized_matmul] NYI")))
    monkeypatch.setattr(doctor, "device_memory", raising(ValueError("none")))
    monkeypatch.setattr(machine, "cuts_float32", raising(RuntimeError("no")))
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, result.stderr, report["good"], report["complete"]) == (1, "", False, True)
    assert report["machine"]["tf32"] is None
    assert report["machine"]["chip"]
    verdicts = {found["name"]: found["verdict"] for found in report["findings"]}
    failed = [*(f"product with {bits} bit weights" for bits in (4, 6, 8)), "what fits"]
    assert [name for name, verdict in verdicts.items() if verdict == "fail"] == failed
    assert len(verdicts) == 23  # both lines of the disk are called the same here
    assert list(models.iterdir()) == []


def test_a_slow_cpu_is_not_waited_for(monkeypatch, tmp_path):
    quick(monkeypatch)
    found = {finding.name: finding for finding in CheckUp(tmp_path)}
    for name in ("product", "memory of a step", "memory of decoding", "speed of a block"):
        assert found[name].verdict == "skip"
        assert found[name].figure.startswith("this CPU would take ")
        assert "libopenblas0-pthread" in found[name].figure
    assert found["float32"].verdict == "pass"


FINDINGS = [
    Finding("product", "pass", "error 1e-7", "< 1e-5"),
    Finding("disk", "warn", "0.1 GB/s", "> 0.3 GB/s", "use a faster disk"),
    Finding("wired memory", "skip", "only Metal wires memory"),
]


class Checks(CheckUp):
    findings = FINDINGS

    def __iter__(self):
        self.rates, self.fitting = Rates(1e12, 1e12), {"klein-4b": {"bf16": None, "qint8": 2**30, "qint4": 0}}
        for found in self.findings:
            self._begin(found.name)
            yield found


@pytest.mark.parametrize("good", [True, False])
def test_the_command(good, monkeypatch, models):
    found = FINDINGS if good else [*FINDINGS, Finding("float32", "fail", "error 0.1", "< 1e-5", "please report")]
    monkeypatch.setattr(Checks, "findings", found)
    monkeypatch.setattr(doctor, "CheckUp", Checks)
    result = run("doctor")
    assert result.exit_code == (0 if good else 1)
    assert "largest buffer not told" in result.stdout
    assert "computes in float32; TF32 off" in result.stdout
    assert "pass  product                       error 1e-7 (< 1e-5)\n" in result.stdout
    assert "warn  disk                          0.1 GB/s (> 0.3 GB/s): use a faster disk\n" in result.stdout
    assert ("fail  float32" in result.stdout) is not good
    assert "klein-4b  34.8 s a step       bf16 does not fit, qint8 reads 1 GiB, qint4 fits" in result.stdout
    assert result.stderr.splitlines() == [f"checking: {one.name}" for one in found]
    assert run("doctor", "--quiet").stderr == ""
    result = run("doctor", "--json")
    assert (result.exit_code, result.stderr) == (0 if good else 1, "")
    report = json.loads(result.stdout)
    assert report["good"] is good
    assert report["complete"]
    assert [one["verdict"] for one in report["findings"]] == [one.verdict for one in found]
    assert report["machine"]["versions"]["mlx"]
    assert report["machine"]["models_folder"] == str(models)


def test_what_a_gpu_tells_is_shown(monkeypatch, models):
    monkeypatch.setattr(doctor, "CheckUp", Checks)
    gpu = {"gpu_memory": 12 * 2**30, "largest_buffer": 9 * 2**30, "tf32": True, "versions": None, "free_disk": None}
    describe = machine.describe
    monkeypatch.setattr(doctor, "describe", lambda models: describe(models) | gpu)
    shown = run("doctor").stdout
    assert "12 GiB for the GPU, largest buffer 9 GiB" in shown
    assert "TF32 on" in shown
    assert "unknown free" in shown


# A shell that starts tests in the background makes its children ignore Ctrl-C, which a terminal does not.
STOPPED = """
import os, signal, sys, time
from flux2_mlx.cli.main import main
from flux2_mlx.config import QUANTIZATIONS
from flux2_mlx.doctor import numerics

signal.signal(signal.SIGINT, signal.default_int_handler)
number = getattr(signal, sys.argv.pop())

def stop():
    os.kill(os.getpid(), number)
    while True:  # until the main thread has heard of it
        time.sleep(0.01)

numerics.check_float32, numerics.LONGEST = stop, 0
main()
"""


@pytest.mark.parametrize(("number", "word"), [("SIGINT", "interrupted"), ("SIGTERM", "terminated")])
def test_json_is_whole_when_the_command_is_stopped(number, word, tmp_path):
    command = [sys.executable, "-c", STOPPED, "doctor", "--json", "--models-dir", tmp_path, number]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 128 + getattr(signal, number)
    report = json.loads(done.stdout)
    assert (report["complete"], report["good"]) == (False, False)
    assert [found["name"] for found in report["findings"]] == ["speed of the CPU", "demo image", "product"]
    assert done.stderr == f"{word}; nothing was left half written\n"
    assert list(tmp_path.iterdir()) == []


def test_what_is_stopped_puts_its_file_away(monkeypatch, tmp_path):
    quick(monkeypatch)
    monkeypatch.setattr(disk, "check_overlap", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt) as stop:
        list(CheckUp(tmp_path))
    assert list(tmp_path.iterdir()) == []
    del stop


def test_json_is_whole_when_nothing_can_be_found_out():
    result = run("doctor", "--json", "--models-dir", "~nobody-is-called-this/models")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["complete"] is False
    assert result.stderr.startswith("Error: can't tell whose home folder")


def test_all_checks_are_made(monkeypatch, tmp_path):
    """In their order, each by its own name; none is left out, whatever the device."""
    for gpu in (False, True):
        asked, begun = [], []
        monkeypatch.setattr(doctor, "on_gpu", lambda gpu=gpu: gpu)
        monkeypatch.setattr(
            doctor, "made", lambda name, check, asked=asked: asked.append(name) or Finding(name, "pass", "")
        )
        assert [found.name for found in CheckUp(tmp_path, begun.append)] == asked == begun
        assert len(set(asked)) == 24
    assert list(tmp_path.iterdir()) == []


def test_device_errors_are_told_apart():
    assert issubclass(DeviceError, Exception)
    assert not device.is_failure(RuntimeError("[load_safetensors] Failed to open file"))
