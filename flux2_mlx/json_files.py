"""JSON in the strict sense, from files that may be anyone's."""

import json
import math
import re
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CheckpointError, InputError
from .files import open_regular

# What Python raises when values of a JSON file have other types or sizes than they should.
NONSENSE = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError)
_MAX_BYTES = 10_000_000  # the largest file that belongs to a model, an index of its tensors, takes less than 1 MB
_MAX_DIGITS = 640  # of a whole number: the lowest limit that Python can be given
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_model_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; CheckpointError if there is none."""
    try:
        return open_regular(path)
    except InputError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:  # a name with a NUL
        raise CheckpointError(f"can't read {str(path)!r}: {error}") from error


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if there is none, or a name stands twice where names are `unique`."""
    with open_model_file(path) as file:
        try:
            data = file.read(_MAX_BYTES + 1)
            if len(data) > _MAX_BYTES:
                raise CheckpointError(f"{path} has more than {_MAX_BYTES} bytes, so it is no part of a model")
            value = parse_json(data, unique=unique)
        except OSError as error:
            raise CheckpointError(f"can't read {path}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def parse_json(data: bytes, *, unique: bool = False) -> Any:
    """What JSON in UTF-8 says, in the strict sense: Python's own reader takes more than MLX's does.

    Raises:
        ValueError: it is damaged, in another encoding or nested too deep; NaN, infinity or too many digits; halves of
            surrogate pairs; a name that stands twice where names are `unique`.
    """
    try:
        return _parse(decoded(data), unique)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"\\u{ord(error.object[error.start]):04x} is half a character") from error


def decoded(data: bytes) -> str:
    """Text in UTF-8; ValueError if it is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8 from byte {error.start} on") from error


def _parse(text: str, unique: bool) -> Any:
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
    value = json.loads(
        text,
        parse_constant=_refuse_constant,
        parse_float=_finite,
        parse_int=whole_number,
        object_pairs_hook=_unique if unique else None,
    )
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number there")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def whole_number(text: str) -> int:
    """A whole number of JSON; ValueError if it has too many digits to be meant."""
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(text):,} digits, of which at most {_MAX_DIGITS} are read")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"{name!r} stands there twice")
        table[name] = value
    return table
