"""Prompts, and settings of their own, from a file, a pipe or standard input."""

import csv
import io
import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError
from ..files import bounded, open_without_waiting, opened
from ..json_files import whole_number

_MAX_BYTES = 10_000_000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SIZE = re.compile(r"(\d+) *[x×] *(\d+)", re.IGNORECASE)
_JSON = (".jsonl", ".ndjson", ".json")
_KINDS = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "images": int,
    "size": str,
    "width": int,
    "height": int,
    "steps": int,
    "guidance": float,
    "step_cache": float,
    "output": str,
}
_NAMES = {str: "text", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Prompt:
    """A prompt with settings of its own; None: it has none. `line` says where it is in which file."""

    text: str
    line: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    images: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    step_cache: float | None = None
    output: str | None = None


@contextmanager
def named(line: str | None) -> Iterator[None]:
    """Let an InputError name the line of the prompt that it is about, if that has one."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{line}: {error}" if line else str(error)) from error


def read_prompt(name: str) -> str:
    """The one prompt that is all of a file; `-` is standard input. Raises what `read_prompts` does."""
    return "".join(_lines(name)).strip()


def read_prompts(name: str) -> list[Prompt]:
    """The prompts of a file; `-` is standard input.

    There is one in each line, as text or as a JSON object with settings of its own. The lines of a .jsonl file are all
    objects, and a .csv file is a table with a head; so is standard input that begins with one of several columns. Empty
    lines and those that begin with # are skipped.

    Raises:
        InputError: the file can't be read, is too large, is no text, or holds no prompt; or a line can't be used.
    """
    lines = _lines(name)
    suffix = Path(name).suffix.lower()
    has_head = suffix not in (".csv", *_JSON) and _is_head(_first(lines))
    if has_head and name != "-":
        raise InputError(f"{name} begins with the head of a table, {_first(lines)[:80]!r}; give it a name with .csv")
    if suffix == ".csv" or has_head:
        prompts = list(_rows(lines, name))
    else:
        numbered = ((f"line {number} of {name}", line.strip()) for number, line in enumerate(lines, 1))
        read = _object if suffix in _JSON else _text_or_object
        prompts = [read(line, where) for where, line in numbered if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"{'standard input' if name == '-' else name} holds no prompt; write one a line")
    return prompts


def _lines(name: str) -> list[str]:
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
    return lines


def _text_or_object(line: str, where: str) -> Prompt:
    """A line of a text file. An object without any of our keys is a prompt: FLUX.2 is prompted in JSON, too."""
    if re.match(r'\{\s*("|$)', line):
        try:
            values = _parsed(line)
        except ValueError as error:
            raise InputError(f'{where} is no JSON object ({error}); in a text file {{" begins one') from error
        if isinstance(values, dict) and values.keys() & _KINDS:
            return _prompt(values, where, _typed)
    return Prompt(line, where)


def _object(line: str, where: str) -> Prompt:
    try:
        values = _parsed(line)
    except ValueError as error:
        raise InputError(f'{where} is no JSON ({error}); write an object such as {{"prompt": "a fox"}}') from error
    if not isinstance(values, dict):
        raise InputError(f'{where} is no JSON object; write one such as {{"prompt": "a fox", "seed": 1}}')
    return _prompt(values, where, _typed)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_table, parse_int=whole_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if one of our keys stands there twice."""
    if twice := next(
        (key for key, count in Counter(key for key, _ in pairs).items() if count > 1 and key in _KINDS), 0
    ):
        raise ValueError(f"{twice} stands there twice")
    return dict(pairs)


def _first(lines: list[str]) -> str:
    """The first line that is not skipped."""
    return next((line.strip() for line in lines if line.strip() and not line.startswith("#")), "")


def _separator(head: str) -> str:
    return max(",;\t", key=head.count)


def _is_head(line: str) -> bool:
    """Whether a line can only be meant as the head of a table: the names of several of its columns."""
    cells = [cell.strip().strip('"').lower() for cell in line.split(_separator(line))]
    return len(cells) > 1 and "prompt" in cells and set(cells) <= _KINDS.keys()


def _rows(lines: list[str], name: str) -> Iterator[Prompt]:
    """The prompts of a table; its cells are separated by what separates those of its head."""
    rows = csv.reader(lines, delimiter=_separator(_first(lines)), strict=True)
    head: list[str] | None = None
    try:
        for row in rows:
            cells = _filled(row)
            where = f"line {rows.line_num} of {name}"
            if not cells or cells[0].startswith("#"):
                continue
            if head is None:
                head = _head([cell.lower() for cell in cells], where)
            elif len(cells) > len(head):
                raise InputError(f"{where} has {len(cells)} cells, but there are {len(head)} columns; quote commas")
            else:
                yield _prompt({key: cell for key, cell in zip(head, cells, strict=False) if cell}, where, _converted)
    except csv.Error as error:
        raise InputError(f"line {rows.line_num} of {name} is no line of a table: {error}") from error


def _filled(row: list[str]) -> list[str]:
    """The cells of a row without the empty ones at its end."""
    cells = [cell.strip() for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _head(cells: list[str], where: str) -> list[str]:
    _check_keys(cells, where, "column")
    if twice := next((cell for cell in cells if cells.count(cell) > 1), None):
        raise InputError(f"{where} names the column {twice} twice")
    if "prompt" not in cells:
        raise InputError(f"{where} names no column prompt")
    return cells


def _check_keys(keys: list[str], where: str, what: str) -> None:
    for key in keys:
        if key.startswith("lora"):
            raise InputError(f"{where} has the {what} {key[:40]!r}, but all prompts have the same adapters; use --lora")
        if key not in _KINDS:
            raise InputError(f"{where} has an unknown {what} {key[:40]!r}; known are {', '.join(_KINDS)}")


def _prompt(values: Mapping[str, Any], where: str, read: Callable[[str, Any, type], Any]) -> Prompt:
    """The prompt of a line; `read` checks a value that should be of a type."""
    _check_keys(list(values), where, "key")
    with named(where):
        found = {key: read(key, value, _KINDS[key]) for key, value in values.items() if value is not None}
        if "prompt" not in found:
            raise InputError("there is no prompt")
        if found.get("images", 1) < 1:
            raise InputError(f"images must be 1 or more, got {found['images']}")
        if (size := found.pop("size", None)) is not None:
            found |= _sides(size, found)
    return Prompt(found.pop("prompt"), where, **found)


def _sides(size: str, found: Mapping[str, Any]) -> dict[str, int]:
    match = _SIZE.fullmatch(size.strip())
    if match is None or "width" in found or "height" in found:
        raise InputError(f"size must be such as 1024x768, in place of width and height, got {size[:40]!r}")
    return {"width": int(match[1]), "height": int(match[2])}


def _typed(key: str, value: Any, kind: type) -> Any:
    """A value of JSON, whose numbers have types."""
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        shown = json.dumps(value, ensure_ascii=False)[:40]
        if key == "images" and isinstance(value, list | str):
            raise InputError(
                f"images is how many to make, a whole number, not {shown}; pictures to edit are given by -i"
            )
        raise InputError(f"{key} must be {_NAMES[kind]}, got {shown}")
    if isinstance(value, str) and (control := _CONTROL.search(value)):
        raise InputError(f"{key} has the control character {control[0]!a}")
    return value


def _converted(key: str, value: str, kind: type) -> Any:
    """A cell of a table."""
    try:
        return kind(value)
    except ValueError as error:
        raise InputError(f"{key} must be {_NAMES[kind]}, got {value[:40]!r}") from error


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
