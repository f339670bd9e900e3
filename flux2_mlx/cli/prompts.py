"""Prompts from a file, a pipe or standard input."""

import io
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError
from ..files import bounded, open_without_waiting, opened

_MAX_BYTES = 10_000_000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def read_prompts(name: str) -> list[str]:
    """The prompts of a file, one a line; `-` is standard input.

    Raises:
        InputError: it can't be read, is too large, is no text, or holds no prompt.
    """
    try:
        with _open_prompts(name) as file:
            text = bounded(file, name, _MAX_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise InputError(f"can't read {name}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from error
    lines = io.StringIO(text, newline=None).readlines()
    for number, line in enumerate(lines, 1):
        if control := _CONTROL.search(line):
            raise InputError(
                f"line {number} of {name} has the control character {control[0]!a}; write it as UTF-8 text"
            )
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{name} holds no prompt; write one a line")
    return prompts


@contextmanager
def _open_prompts(name: str) -> Iterator[BinaryIO]:
    """Standard input, a file, or what a shell gives as one: a pipe that is written to, a terminal."""
    if name == "-":
        if sys.stdin is None:
            raise InputError("can't read -: standard input is closed")
        yield sys.stdin.buffer
        return
    mode = os.stat(name).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with open(name, "rb", opener=_open_pipe) as file:
            if stat.S_ISFIFO(mode) or file.isatty():
                yield file
                return
    with opened(Path(name), _MAX_BYTES) as file:
        yield file


def _open_pipe(name: str, flags: int) -> int:
    """Open a pipe without waiting for somebody to write to it; who does already is waited for."""
    descriptor = open_without_waiting(name, flags)
    os.set_blocking(descriptor, True)
    return descriptor
