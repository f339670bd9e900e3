"""Signals end a command in one line and with a shell's exit code, from its first moment on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.cli_runner import PROMPT, SMALL, run, tree

from flux2_mlx.cli.main import main
from flux2_mlx.cli.stopping import Terminated, stoppable

INTERRUPTED, TERMINATED = "interrupted; nothing was left half written\n", "terminated; nothing was left half written\n"
SCRIPT = Path(sys.executable).with_name("flux2-mlx")
# Sends the process a signal when it imports a module. A shell that starts tests in the background makes its children
# ignore Ctrl-C, which a terminal does not.
HOOK = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["STOP_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(os.environ["STOP_WITH"]))

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    return tmp_path


def stopped(module, number, start=("-m", "flux2_mlx")):
    """What a `t2i` that gets this signal when it imports `module` comes to."""
    command = [sys.executable, *start, "t2i", PROMPT, *SMALL]
    environment = os.environ | {"STOP_AT": module, "STOP_WITH": str(int(number))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("module", "number", "code", "message"),
    [
        ("flux2_mlx.cli.group", signal.SIGINT, 130, INTERRUPTED),
        ("click", signal.SIGINT, 130, INTERRUPTED),
        ("flux2_mlx.cli.report", signal.SIGTERM, 143, TERMINATED),
        ("importlib.metadata", signal.SIGINT, 130, INTERRUPTED),
        ("numpy", signal.SIGINT, 130, INTERRUPTED),
        ("PIL.Image", signal.SIGINT, 130, INTERRUPTED),
        ("mlx.core", signal.SIGINT, 130, INTERRUPTED),
        ("mlx.nn", signal.SIGTERM, 143, TERMINATED),
        ("tokenizers", signal.SIGHUP, 129, TERMINATED),
        ("flux2_mlx.pipeline", signal.SIGINT, 130, INTERRUPTED),
    ],
)
def test_a_signal_while_modules_are_imported(module, number, code, message):
    result = stopped(module, number)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", message)
    assert tree() == {}


@pytest.mark.parametrize("start", [("-m", "flux2_mlx"), (SCRIPT,)])
@pytest.mark.parametrize("module", ["flux2_mlx.cli", "flux2_mlx.cli.main", "flux2_mlx.cli.stopping", "threading"])
def test_ctrl_c_before_anything_is_begun_says_nothing(module, start):
    result = stopped(module, signal.SIGINT, start)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def test_the_package_imports_nothing_slow():
    script = "import sys; before = set(sys.modules); import flux2_mlx; print(*sorted(set(sys.modules) - before))"
    command = [sys.executable, "-S", "-c", script]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == ["flux2_mlx", "flux2_mlx.errors"]


def test_the_console_script_is_stopped_like_the_module():
    result = stopped("click", signal.SIGINT, [SCRIPT])
    assert (result.returncode, result.stdout, result.stderr) == (130, "", INTERRUPTED)


def test_what_a_process_is_started_to_ignore_stays_ignored():
    before = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)]
    try:
        with stoppable():
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_handlers_are_given_back(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flux2-mlx", "--version"])
    before = handlers()
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0
    assert handlers() == before
    with pytest.raises(KeyboardInterrupt), stoppable():
        signal.raise_signal(signal.SIGTERM)
    assert handlers() == before


def test_a_thread_that_runs_a_command_leaves_signals_alone():
    seen = []

    def look():
        with stoppable():
            seen.extend(handlers())

    before = handlers()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == before


def test_a_library_call_handles_no_signals():
    before = handlers()
    assert run("--version").exit_code == 0
    assert handlers() == before


SLOW = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from flux2_mlx.cli.stopping import stoppable
with stoppable():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        print("cleaned up")
"""


def test_a_second_ctrl_c_waits_for_nothing():
    result = subprocess.run(
        [sys.executable, "-c", SLOW],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"STOP_AT": "", "STOP_WITH": ""},
    )
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


class Stopped:
    """Gets a signal where Python drops what is raised."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


def dropped(number: int) -> None:
    Stopped(number)
    time.sleep(5)  # it comes again long before


def slowly(start):
    """A `Thread.start` that returns when the signal has been sent, the first time."""
    calls = []

    def slow(thread):
        start(thread)
        calls.append(thread)
        if len(calls) == 1:
            time.sleep(1)

    return slow


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_that_comes_in_a_callback_is_not_lost(number, kind, busy, capfd, monkeypatch):
    if busy:
        monkeypatch.setattr(threading.Thread, "start", slowly(threading.Thread.start))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, see above
    try:
        with pytest.raises(kind) as stop, stoppable():
            dropped(number)
    finally:
        signal.signal(signal.SIGINT, before)
    assert type(stop.value) is kind
    assert capfd.readouterr() == ("", "")
