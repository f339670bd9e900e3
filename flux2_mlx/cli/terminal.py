"""Text that is printed: nothing in it drives the terminal, whoever it comes from."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import click

_MAX_LINE = 1000
# Settings as the library's messages write them, and the flags that say the same. Several stand one after the other.
_FLAGS = {
    "model": "-m",
    "quant": "-q",
    "text_quant": "--text-quant",
    "dtype": "--dtype",
    "memory_limit": "--memory-limit",
    "models_dir": "--models-dir",
    "variant": "--variant",
    "force": "--force",
    "replace": "--force",
}
# Those whose names are no words of a sentence may stand without a value.
_NAMES = re.compile(r"(?<![\w/.'-])(memory_limit|text_quant|models_dir)(?![\w/.='-])")
_SETTING = re.compile(rf"((?<='), )?\b({'|'.join(_FLAGS)})=(?:'([\w.-]+)'|True\b|NAME\b)")
_VERIFY = "`flux2_mlx.verification.verify`", "`flux2-mlx models verify`"
# Control characters but for tab and line feed, what changes the direction of text, ends of lines that are not shown as
# such, and bytes that are no text.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with escapes such as \\x1b in place of what would drive a terminal."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def line(text: str) -> str:
    """`text` in one line of bounded length; of what is longer, the beginning and the end."""
    text = printable(" ".join(text.split()))
    half = _MAX_LINE // 2
    return text if len(text) <= _MAX_LINE else f"{text[: half - 1]}…{text[-half:]}"


def in_flags(message: str) -> str:
    """A message of the library, which says `quant='qint4'`, `force=True` or `variant=NAME`, in the words of the command
    line: `-q qint4`, `--force`, `--variant`."""
    message = _SETTING.sub(lambda x: f"{' ' if x[1] else ''}{_FLAGS[x[2]]}{f' {x[3]}' if x[3] else ''}", message)
    return _NAMES.sub(lambda found: _FLAGS[found[1]], message.replace(*_VERIFY))


def said(message: str) -> str:
    """What the library says, an error, warning or advice, as the command line shows it: in flags, and in one line."""
    return line(in_flags(message))


def to_json(value: Any) -> str:
    """`value` as JSON in one line, with letters of all languages as they are."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def print_result(result: str | Path) -> None:
    """Print a result on stdout: byte for byte for a program, `printable` for a terminal."""
    if sys.stdout.isatty():
        click.echo(printable(str(result)))
    elif isinstance(result, Path):
        click.echo(os.fsencode(result))
    else:
        click.echo(result.encode(sys.stdout.encoding or "utf-8", "surrogateescape"))
