"""What needs a process of its own: Ctrl-C, and a machine without a network."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cli_runner import Terminal, done, error_line, process, tree
from PIL import Image

# A shell that starts tests in the background makes its children ignore Ctrl-C, which a terminal does not.
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from flux2_mlx.cli.main import main
main()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def environment(folder):
    """Variables of a user with empty caches and a hub that can't be reached."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    unset = ("HF_", "HUGGING", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unset)}
    homes = {"HF_HOME": str(folder / "hub"), "FLUX2_MLX_HOME": str(folder / "models")}
    return {**kept, **homes, "HF_ENDPOINT": f"http://127.0.0.1:{port}"}


def interrupted(*arguments, when, number=signal.SIGINT):
    """stderr of a `t2i` that gets a signal as soon as its stderr matches `when`."""
    command = [sys.executable, "-c", START, "t2i", "a red circle", "-m", "demo", *arguments]
    with Terminal() as terminal:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal.file)
        terminal.started()
        seen = b""
        while not re.search(when, seen):
            new = terminal.read()
            assert new, seen
            seen += new
        run.send_signal(number)
        out, _ = run.communicate(timeout=120)
        seen += terminal.read_all()
    assert (run.returncode, out) == (128 + number, b""), seen
    return seen.decode()


def test_ctrl_c_while_denoising_is_one_line_and_leaves_no_file():
    stderr = interrupted("-s", "500", "-o", "a.png", when=rb"denoising: +\d+%.* [1-9]\d*/500 ")
    *bars, message, end = re.split(r"[\r\n]+", stderr)
    assert (message, end) == ("interrupted; nothing was left half written", "")
    assert all(re.match(r"(text encoder|denoising): +\d+%|$", bar) for bar in bars), stderr
    assert tree() == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_a_run_as_ctrl_c_does(number):
    stderr = interrupted("-s", "500", "-o", "a.png", when=rb"denoising: +\d+%.* [1-9]\d*/500 ", number=number)
    assert re.split(r"[\r\n]+", stderr)[-2:] == ["terminated; nothing was left half written", ""]
    assert tree() == {}


@pytest.mark.parametrize("when", [rb"text encoder: +\d", rb"denoising: +\d+%.* 2/", rb"decoding: +\d+%.* 1/"])
def test_a_killed_run_leaves_whole_files_only(when, environment, folder, monkeypatch):
    arguments = ["t2i", "a red circle", "-m", "demo", "-s", "4", "-n", "2", "--seed", "1", "-W", "160", "-H", "160"]
    arguments += ["--checkpoint", "1", "-o", "out/"]
    command = [sys.executable, "-m", "flux2_mlx", *arguments]
    Path("out").mkdir()
    with (
        Terminal() as terminal,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal.file, env=environment) as run,
    ):
        terminal.started()
        seen = b""
        while not re.search(when, seen):
            new = terminal.read()
            assert new, seen
            seen += new
        run.kill()
    assert run.returncode == -signal.SIGKILL
    left = sorted(Path("out").glob("[!.]*"))
    for path in left:
        assert Image.open(path).convert("RGB").size == (160, 160)
    assert (len(left) > 0) == (when.startswith((b"denoising", b"decoding")))
    monkeypatch.setenv("FLUX2_MLX_HOME", environment["FLUX2_MLX_HOME"])
    assert len(done(*arguments, "--force", "--quiet").stdout.splitlines()) == 2
    assert len(list((folder / "models" / "prompts").glob("*.safetensors"))) == 1


def test_ctrl_c_keeps_the_checkpoint_images_that_are_complete():
    interrupted("-s", "500", "-o", "a.png", "--checkpoint", "1", when=rb" [3-9]/500 ")
    assert {"a-step-001.png", "a-step-002.png"} <= set(tree())
    assert all(re.fullmatch(r"a-step-\d{3}\.png", name) for name in tree())


def test_no_network(environment):
    result = process("t2i", "a red fox", "-m", "klein-4b", environment=environment)
    assert (result.returncode, result.stdout) == (1, "")
    message = error_line(result.stderr)
    assert message.startswith(f"cannot reach {environment['HF_ENDPOINT']} (")
    assert message.endswith("; check the connection, or give a folder")
    assert tree() == {}
    assert not Path(environment["FLUX2_MLX_HOME"]).exists()


def test_no_network_wanted(environment):
    result = process("t2i", "a red fox", "-m", "klein-4b", environment=environment | {"HF_HUB_OFFLINE": "1"})
    assert (result.returncode, result.stdout) == (1, "")
    message = error_line(result.stderr)
    assert message.startswith("black-forest-labs/FLUX.2-klein-4B is not complete in the cache ")
    assert "offline mode is on" in message
    assert tree() == {}


def test_the_built_in_model_needs_no_network(environment):
    result = process("t2i", "a red circle", "-m", "demo", "-s", "1", "-o", "a.png", environment=environment)
    assert (result.returncode, result.stdout) == (0, "a.png\n")
    assert list(tree()) == ["a.png"]
