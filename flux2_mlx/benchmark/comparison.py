"""Two results of benchmarks, side by side."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import opened
from ..json_files import NONSENSE, parse_json
from .result import SCHEMA, Spread

_MAX_BYTES = 10_000_000
_MAX_ROWS = 1000
_MAX_TEXT = 200  # characters of a name
_MOST = 1e18  # of a number in a result: bytes or seconds
_KEY = ("variant", "quant", "text_quant", "width", "height")  # what rows must share to be compared
# What else makes a difference, by what it is called.
_MACHINE = {"chip": "chip", "system": "system", "computes_on": "device", "tf32": "TF32"}
_VERSIONS = {"flux2-mlx": "flux2-mlx", "mlx": "MLX"}
_FIRST = "whether files were read before"
_SETTINGS = {
    "dtype": "dtype",
    "passes": "guidance",
    "fingerprint": "weights",
    "official": "whether they are official",
    "memory_limit": "memory limit",
    "first_here": _FIRST,
}


@dataclass(frozen=True)
class Row:
    """A row of a result, as far as it is compared. `settings` are what may differ between rows that are."""

    key: tuple[str | int, ...]
    steps: int
    settings: dict[str, Any]
    cold: float
    warm: Spread
    step: Spread
    peak_memory: int

    @property
    def name(self) -> str:
        variant, quant, text_quant, width, height = self.key
        return f"{variant} {quant}/{text_quant} {width}×{height}"


@dataclass(frozen=True)
class Result:
    """A result that was read: `about` is what it says of the machine and versions."""

    about: dict[str, Any]
    complete: bool
    rows: dict[tuple[str | int, ...], Row]


@dataclass(frozen=True)
class Compared:
    """What a second result took of each figure of a first one, times as much. A `Spread` of ratios has the smallest and
    the largest that two of the values can have; None: it is not comparable. `differing` names why figures may differ
    besides the machine."""

    name: str
    cold: float | None
    warm: Spread | None
    step: Spread | None
    peak_memory: float
    differing: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Two results side by side: how the machines and versions differ, as `name: first, second`, whether each is whole,
    the rows that are in both, and the names of those that are in one only."""

    differences: tuple[str, ...]
    complete: tuple[bool, bool]
    rows: tuple[Compared, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def read_result(path: Path) -> Result:
    """A result of a benchmark from a file, which may be anyone's.

    Raises:
        InputError: there is none that can be read.
    """
    try:
        with opened(path, _MAX_BYTES) as file:
            return _result(parse_json(file.read(), unique=True))
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error
    except InputError:
        raise
    except NONSENSE as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} is no result of a benchmark: {what}") from error


def compare(first: Result, second: Result) -> Comparison:
    """How the figures of the `second` result stand to those of the `first`.

    Raises:
        InputError: they have no row in common.
    """
    shared = [key for key in first.rows if key in second.rows]
    if not shared:
        raise InputError(
            "the results have no model, quantization and size in common: "
            f"{_listed(first)} in the first, {_listed(second)} in the second"
        )
    differences = [
        f"{name}: {first.about[name]}, {second.about[name]}"
        for name in first.about
        if first.about[name] != second.about[name]
    ]
    only = [tuple(row.name for key, row in a.rows.items() if key not in b.rows) for a, b in _both_ways(first, second)]
    rows = tuple(_compared(first.rows[key], second.rows[key]) for key in shared)
    return Comparison(tuple(differences), (first.complete, second.complete), rows, *only)


def _both_ways(first: Result, second: Result) -> tuple[tuple[Result, Result], tuple[Result, Result]]:
    return (first, second), (second, first)


def _listed(result: Result) -> str:
    return ", ".join(row.name for row in list(result.rows.values())[:5]) or "none"


def _compared(first: Row, second: Row) -> Compared:
    differing = [name for name in first.settings if first.settings[name] != second.settings[name]]
    same_steps, same_passes = first.steps == second.steps, "guidance" not in differing
    whole = same_steps and same_passes
    return Compared(
        first.name,
        second.cold / first.cold if whole and _FIRST not in differing else None,
        _ratio(first.warm, second.warm) if whole else None,
        _ratio(first.step, second.step) if same_passes else None,
        second.peak_memory / first.peak_memory,
        (*differing, *(() if same_steps else (f"steps ({first.steps}, {second.steps})",))),
    )


def _ratio(first: Spread, second: Spread) -> Spread:
    return Spread(
        second.least / first.most,
        second.median / first.median,
        second.most / first.least,
        min(first.count, second.count),
    )


def _result(values: Any) -> Result:
    """What parsed JSON says; one of `NONSENSE` if it is no result."""
    if not isinstance(values, dict) or "schema" not in values:
        raise ValueError("there is no schema; write it with `flux2_mlx.benchmark.result`")
    if values["schema"] != SCHEMA:
        raise ValueError(f"its schema is {str(values['schema'])[:20]}, and this version reads {SCHEMA}")
    rows = [_row(row) for row in _objects(values, "rows")]
    names = Counter(row.name for row in rows)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise ValueError(f"it has {twice} twice")
    return Result(_about(_object(values, "machine")), values["complete"] is True, {row.key: row for row in rows})


def _object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values[name]
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {str(value)[:40]!r}, not an object")
    return value


def _objects(values: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    objects = values[name]
    if not isinstance(objects, list) or len(objects) > _MAX_ROWS or not all(isinstance(x, dict) for x in objects):
        raise ValueError(f"its {name} are no list of at most {_MAX_ROWS} objects")
    return objects


def _about(machine: Mapping[str, Any]) -> dict[str, Any]:
    versions = {} if machine["versions"] is None else _object(machine, "versions")
    known = {name: _text(machine[key]) for key, name in _MACHINE.items()}
    return known | {name: _text(versions.get(key)) for key, name in _VERSIONS.items()}


def _row(values: Mapping[str, Any]) -> Row:
    key = tuple(_size(values, name) if name in ("width", "height") else _name(values, name) for name in _KEY)
    phases = _objects(values, "phases")
    if not phases:
        raise ValueError("a row has no phases")
    settings: dict[str, Any] = {name: _text(values[key]) for key, name in _SETTINGS.items()}
    settings["what is read from disk"] = tuple(_text(phase["read"]) for phase in phases)
    return Row(
        key,
        _size(values, "steps"),
        settings,
        _number(values, "cold"),
        _spread(_object(values, "warm")),
        _spread(_object(values, "step")),
        max(int(_number(phase, "peak_memory")) for phase in phases),
    )


def _spread(values: Mapping[str, Any]) -> Spread:
    least, median, most = (_number(values, name) for name in ("least", "median", "most"))
    if not least <= median <= most:
        raise ValueError(f"a median of {median} is not between {least} and {most}")
    return Spread(least, median, most, _size(values, "count"))


def _number(values: Mapping[str, Any], name: str) -> float:
    """A number above 0."""
    value = values[name]
    if type(value) not in (int, float) or not 0 < value < _MOST or not math.isfinite(value):
        raise ValueError(f"{name} is {str(value)[:40]!r}, not a number above 0")
    return float(value)


def _size(values: Mapping[str, Any], name: str) -> int:
    value = _number(values, name)
    if value != int(value):
        raise ValueError(f"{name} is {value}, not a whole number")
    return int(value)


def _name(values: Mapping[str, Any], name: str) -> str:
    value = values[name]
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
        raise ValueError(f"{name} is no text of at most {_MAX_TEXT} characters")
    return value


def _text(value: Any) -> str:
    """A value to be compared and shown; what a machine does not tell is `not told`."""
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{str(value)[:40]!r} is no text")
    return "not told" if value is None else str(value)[:_MAX_TEXT]
