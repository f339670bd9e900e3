"""Of a check-up, the disk of the models folder, and that its large file never stays there."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.findings import verdict

from flux2_mlx.doctor import CheckUp, disk, made
from flux2_mlx.store.inventory import inventory
from flux2_mlx.weights import READER, Files


@pytest.mark.parametrize("waits", [False, True])
def test_a_computation_that_waits_for_a_file_fails(waits, monkeypatch, tmp_path):
    def slow(path: Path) -> dict[str, mx.array]:
        """Work of a second or so stands for a slow disk."""
        stream = mx.default_stream(mx.default_device()) if waits else READER
        numbers = mx.random.uniform(shape=(5_000_000,), key=mx.random.key(0))
        mx.eval(numbers)
        return {"weight": mx.sort(numbers, stream=stream)}

    monkeypatch.setattr("flux2_mlx.weights._load_arrays", slow)
    with disk.large_file(tmp_path, 2**10) as file:
        assert verdict(disk.check_overlap(lambda: file)) == ("fail" if waits else "pass")


@pytest.mark.parametrize(("rate", "expected"), [(1e9, "pass"), (0.2e9, "warn")])
def test_a_slow_disk_is_told(rate, expected, tmp_path, monkeypatch):
    clock = iter([0.0, 2**20 / rate])
    monkeypatch.setattr(disk.time, "perf_counter", lambda: next(clock))
    with disk.large_file(tmp_path / "models", 2**20) as file:
        assert Files([file]).infos["weight"].shape == (2**20,)
        assert verdict(disk.check_reading(lambda: file)) == expected
    assert list((tmp_path / "models").iterdir()) == []


def lines(folder: Path, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the two lines of the disk say that can't be measured."""
    large_file = disk.large_file
    monkeypatch.setattr(disk, "large_file", lambda folder: large_file(folder, nbytes))
    found = [made(name, check) for name, check in CheckUp(folder)._checks(None) if "reading" in name]
    assert [finding.name for finding in found] == ["reading from disk", "computing while reading"]
    assert {finding.verdict for finding in found} == {"skip"}
    return [finding.figure for finding in found]


def test_a_full_disk_is_left_alone(tmp_path, monkeypatch):
    reason, same = lines(tmp_path, 2**60, monkeypatch)
    assert reason == same
    assert reason.startswith(f"{tmp_path} has ")
    assert reason.endswith("; make room, or name another folder with models_dir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_takes_no_file_is_no_end(code, tmp_path, monkeypatch):
    def full(size: int) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(disk.os, "urandom", full)
    for reason in lines(tmp_path, 2**10, monkeypatch):
        assert reason == f"can't write to {tmp_path}: {os.strerror(code)}; {disk._ELSEWHERE}"
    assert list(tmp_path.iterdir()) == []


def test_a_models_folder_that_can_not_be_made_is_no_end(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "models"
    assert lines(folder, 2**10, monkeypatch)[0].startswith(f"can't write to {folder}: Not a directory; ")


KILLED = """
import os, signal, sys
from pathlib import Path
from flux2_mlx.doctor import disk

def urandom(size, real=os.urandom, written=[]):
    written.append(size)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(size)

disk._CHUNK, disk.os.urandom = 1000, urandom
with disk.large_file(Path(sys.argv[1]), 10_000):
    pass
"""


def test_what_a_killed_check_up_leaves_is_known_and_removed(tmp_path):
    def leave() -> None:
        killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False, timeout=300)
        assert killed.returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 1

    leave()
    (item,) = inventory(tmp_path, tmp_path / "none")
    assert (item.kind, item.note, item.removable) == ("leftover", "of doctor", True)
    assert item.remove() == []
    assert list(tmp_path.iterdir()) == []
    leave()
    with disk.large_file(tmp_path, 10):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
