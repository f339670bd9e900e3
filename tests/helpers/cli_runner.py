"""Runs of the command line for its tests, in this process or in one of their own."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from flux2_mlx.cli.main import cli

DEMO = Path(str(files("flux2_mlx.demo")))
PROMPT = "a small red circle on a blue background"
SMALL = ("-m", "demo", "-W", "64", "-H", "64", "-s", "2")


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    """The outcome of `flux2-mlx` with these arguments; an exception that it does not handle is raised."""
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli, words, input=stdin, catch_exceptions=False, prog_name="flux2-mlx")


def done(*arguments: object, stdin: str | bytes | None = None) -> Result:
    """The same, for arguments that must work."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def make(*arguments: object, prompt: str = PROMPT) -> list[Path]:
    """The files that `t2i` says it made with small settings, after a look that they are there."""
    paths = [Path(line) for line in done("t2i", prompt, *SMALL, *arguments).stdout.splitlines()]
    assert all(path.is_file() for path in paths)
    return paths


def refusal(*arguments: object, stdin: str | bytes | None = None) -> str:
    """The one line on stderr of a command that must fail and leave the current folder as it was."""
    before = tree()
    result = run(*arguments, stdin=stdin)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert tree() == before
    return error_line(result.stderr)


def error_line(stderr: str) -> str:
    """The message of a `stderr` that holds one error in one line and nothing else."""
    assert stderr.startswith("Error: "), stderr
    assert stderr.endswith("\n"), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr.removeprefix("Error: ").removesuffix("\n")


def process(*arguments: object, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """The outcome of `python -m flux2_mlx` in a process of its own."""
    command = [sys.executable, "-m", "flux2_mlx", *map(str, arguments)]
    return subprocess.run(
        command, env={**(environment or os.environ)}, capture_output=True, encoding="utf-8", timeout=300, check=False
    )


class Terminal:
    """A terminal of 100 columns that a process started with `file` for its stderr writes to."""

    def __init__(self):
        self._ours, self.file = pty.openpty()
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._ours)

    def started(self) -> None:
        """Leave the terminal to the process, so that its end is the end of what can be read."""
        os.close(self.file)

    def read(self) -> bytes:
        """What is there next; nothing at the end."""
        try:
            return os.read(self._ours, 65_536)
        except OSError:  # how the end reads on Linux
            return b""

    def read_all(self) -> bytes:
        return b"".join(iter(self.read, b""))


def tree() -> dict[str, bytes | None]:
    """Every path in the current folder with the bytes of files, hidden ones included."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(Path().rglob("*"))}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def difference(first: Path, second: Path) -> float:
    """Mean difference of two pictures in levels of 255; below 0.5 no eye sees any.

    Several images in one pass are added up in another order than one, so their last bits may differ.
    """
    return float(np.abs(pixels(first).astype(float) - pixels(second)).mean())
