"""What a Mac is asked for: to stay awake while a command works, and to leave models out of backups and its index."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.cli_runner import DEMO, PROMPT, SMALL, done, run
from helpers.hub_client import fetch, storage

from flux2_mlx import exclusion
from flux2_mlx.cli import wakefulness
from flux2_mlx.cli.group import cli
from flux2_mlx.cli.wakefulness import awake
from flux2_mlx.exclusion import MARK, exclude
from flux2_mlx.store import checkpoints

# Notes how it was started and its own number, then waits as the real one does, saying things that nobody may see.
CAFFEINATE = """#!/bin/sh
echo "$@" >> "$NOTES/words"
echo noise; echo noise >&2
echo $$ > "$NOTES/id.part" && mv "$NOTES/id.part" "$NOTES/id"
while kill -0 "$3" 2>/dev/null; do sleep 0.05; done
"""
TMUTIL = """#!/bin/sh
echo "$@" >> "$NOTES/tmutil"
echo noise; echo noise >&2
exit $STATUS
"""
# A command that works until it is ended.
WORK = """
import sys, time
sys.platform = "darwin"
from flux2_mlx.cli.wakefulness import awake
with awake():
    print("working", flush=True)
    time.sleep(600)
"""


def run_on(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be elsewhere to the modules in question; the rest of the process would then need a Mac's processor."""
    for module in (wakefulness, exclusion):
        monkeypatch.setattr(module, "sys", SimpleNamespace(platform=platform))


@pytest.fixture
def mac(tmp_path, monkeypatch):
    """A Mac, as far as its programs go; the folder of their notes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("caffeinate", CAFFEINATE), ("tmutil", TMUTIL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path))
    monkeypatch.setenv("STATUS", "0")
    run_on("darwin", monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(notes: Path) -> int:
    """The process id of the stand-in, once it runs."""
    while not (notes / "id").exists():
        time.sleep(0.01)
    return int((notes / "id").read_text())


def ended(number: int) -> bool:
    """Wait for the end of a process that is nobody's child here, or is not waited for."""
    while True:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)


def test_a_mac_is_kept_awake_for_a_while(mac):
    with awake():
        number = started(mac)
    assert (mac / "words").read_text() == f"-i -w {os.getpid()}\n"
    assert ended(number)


def test_it_ends_with_an_exception_too(mac):
    with contextlib.suppress(KeyboardInterrupt), awake():
        number = started(mac)
        raise KeyboardInterrupt
    assert ended(number)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_however_the_command_ends(how, mac):
    with subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as work:
        assert work.stdout.readline() == b"working\n"
        number = started(mac)
        work.send_signal(how)
        assert work.communicate() == (b"", b"")
    assert ended(number)


def test_it_ends_even_if_it_would_not(mac, monkeypatch):
    program = mac / "bin" / "caffeinate"
    program.write_text(CAFFEINATE.replace("\n", "\ntrap '' TERM\n", 1))
    monkeypatch.setattr(wakefulness, "_PATIENCE", 0)
    with awake():
        number = started(mac)
    assert ended(number)


def test_ctrl_c_of_the_terminal_does_not_reach_it(mac):
    with awake():
        assert os.getsid(started(mac)) != os.getsid(0)


@pytest.mark.parametrize("broken", ["linux", "missing", "not executable", "no program"])
def test_where_it_is_not_there_nothing_happens(broken, mac, monkeypatch):
    program = mac / "bin" / "caffeinate"
    if broken == "linux":
        run_on("linux", monkeypatch)
    elif broken == "missing":
        monkeypatch.setenv("PATH", str(mac / "none"))
    elif broken == "not executable":
        program.chmod(0o644)
        monkeypatch.setenv("PATH", str(program.parent))
    else:
        program.write_bytes(b"\0not a program")
    with awake():
        pass
    assert not (mac / "words").exists()


def test_a_command_keeps_awake_and_prints_nothing_of_it(mac):
    result = done("t2i", PROMPT, *SMALL, "--quiet", "-o", "a.png")
    assert (result.stdout, result.stderr) == ("a.png\n", "")
    assert (mac / "words").read_text() == f"-i -w {os.getpid()}\n"
    assert ended(started(mac))


def test_a_command_need_not(mac):
    done("t2i", PROMPT, *SMALL, "--quiet", "-o", "a.png", "--no-caffeinate")
    assert not (mac / "words").exists()


@pytest.mark.parametrize("words", [["--help"], ["--no-such-option"]])
def test_a_command_that_does_nothing_does_not(words, mac):
    run("t2i", *words)
    assert not (mac / "words").exists()


def test_commands_that_work_long_know_the_option():
    known = {name for name, command in cli.commands.items() if any(p.name == "no_caffeinate" for p in command.params)}
    assert known == {"bench", "t2i", "i2i", "outpaint", "upsample", "describe", "convert", "download", "doctor"}
    assert any(p.name == "no_caffeinate" for p in cli.commands["models"].commands["verify"].params)


@pytest.mark.parametrize("status", ["0", "1"])
def test_a_folder_is_excluded_once(status, mac, monkeypatch, capfd):
    monkeypatch.setenv("STATUS", status)
    folder = mac / "a model"
    folder.mkdir()
    exclude(folder)
    exclude(folder)
    assert (mac / "tmutil").read_text() == f"addexclusion {folder}\n"
    assert [path.name for path in folder.iterdir()] == [MARK]
    assert capfd.readouterr() == ("", "")


def test_a_relative_folder_is_named_in_full(mac):
    Path("model").mkdir()
    exclude(Path("model"))
    assert (mac / "tmutil").read_text() == f"addexclusion {mac / 'model'}\n"


def test_nothing_is_excluded_elsewhere(mac, monkeypatch):
    exclude(mac / "none")
    run_on("linux", monkeypatch)
    (mac / "model").mkdir()
    exclude(mac / "model")
    assert not (mac / "tmutil").exists()
    assert list((mac / "model").iterdir()) == []


def test_a_mac_without_the_program(mac, monkeypatch):
    monkeypatch.setenv("PATH", str(mac / "none"))
    (mac / "model").mkdir()
    exclude(mac / "model")
    assert [path.name for path in (mac / "model").iterdir()] == [MARK]


def test_a_download_is_left_out_of_backups_once(hub, home, mac):
    """What is fetched can be fetched again. No file is left in the Hub's cache that is not the Hub's."""
    fetch(hub, home)
    assert (mac / "tmutil").read_text() == f"addexclusion {storage(home)}\n"
    assert not (storage(home) / MARK).exists()
    shutil.rmtree(storage(home) / "snapshots")
    fetch(hub, home)
    assert len((mac / "tmutil").read_text().splitlines()) == 1


@pytest.fixture
def converted(mac, monkeypatch):
    """A converted model that is taken from the models folder, which may hold files of the user's beside it."""
    folder = mac / "models" / "tiny-bf16"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("__*"))
    monkeypatch.setenv("FLUX2_MLX_HOME", str(folder.parent))
    checkpoints._used(folder)
    return folder


def test_a_model_of_the_store_is_excluded_and_nothing_else_is(converted, mac):
    assert (mac / "tmutil").read_text() == f"addexclusion {converted}\n"
    assert (converted / MARK).is_file()
    assert not (converted.parent / MARK).exists()


def test_the_mark_is_part_of_the_model(converted):
    """It is not listed, goes with the model, and does not keep it from being replaced."""
    assert "not ours" not in done("models").stdout
    done("models", "verify", "tiny-bf16")
    from flux2_mlx.convert import check_target

    (converted / "star.png").unlink()  # of the package
    check_target(converted, True)
    done("models", "rm", "tiny-bf16", "--yes")
    assert not converted.exists()
