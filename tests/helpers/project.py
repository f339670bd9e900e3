"""What tests ask of the project's own files: where they are, and which commands a text shows."""

import shlex
import tomllib
from itertools import takewhile
from pathlib import Path

import click

from flux2_mlx.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """The arguments of every `flux2-mlx` line in shell text, but for where its output goes."""
    lines = (line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines())
    words = (shlex.split(line, comments=True) for line in lines if line.startswith("flux2-mlx "))
    return [[*takewhile(">".__ne__, arguments)] for _, *arguments in words]


def understand(name: str, arguments: list[str]) -> None:
    """Parse the arguments of a command as the group does, whose settings a command keeps once it has seen them."""
    cli.commands[name].make_context(name, arguments, parent=click.Context(cli, **cli.context_settings))
