"""What a benchmark gives, made to be shared: nothing in it tells of paths, of users or of other programs."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..device import system
from ..doctor import describe as describe_machine

SCHEMA = 1  # of results; another number where an older reader would take them for something else
_OF_ONE_MACHINE = ("models_folder", "free_disk")


@dataclass(frozen=True)
class Spread:
    """The smallest, the middle and the largest of `count` measured values."""

    least: float
    median: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(min(values), statistics.median(values), max(values), len(values))


@dataclass(frozen=True)
class PhaseFigures:
    """What a phase has taken.

    Attributes:
        cold: seconds of the first run, loading included.
        warm: seconds of later runs.
        peak_memory: bytes, of the run in which it was closest to what was planned.
        planned: bytes that were planned for that run.
        read: bytes of weights that a later run has streamed from disk.
        streamed: bytes of them in each pass.
    """

    name: str
    cold: float
    warm: Spread
    peak_memory: int
    planned: int
    read: int
    streamed: int


@dataclass(frozen=True)
class Measured:
    """What a model has taken in one quantization and at one size.

    Attributes:
        variant: the row of the table that it is of.
        official: whether its weights are those of the table's repo.
        fingerprint: of the weights that it was converted from.
        passes: how often the transformer is run in a step: twice with classifier-free guidance.
        first_here: whether no earlier row of this process was of these files, which the system may keep in memory when
            they have been read; what other programs have read is not known.
        cold: seconds of the first run from opening the model on.
        warm: seconds of later runs of the same pipeline, which keeps in memory what there is room for.
        step: seconds of a step of later runs, without the first step of each.
        products: seconds that this machine takes for all products and attention of a step, one after the other, in
            the dtype that is computed in.
        ratio: a step's median to that.
        expected_step: seconds that the chip is expected to take; None if it is not in the table.
    """

    variant: str
    official: bool
    fingerprint: str | None
    quant: str
    text_quant: str
    dtype: str
    width: int
    height: int
    steps: int
    passes: int
    memory_limit: int
    first_here: bool
    cold: float
    warm: Spread
    phases: tuple[PhaseFigures, ...]
    step: Spread
    products: float
    ratio: float
    expected_step: float | None


def describe() -> dict[str, Any]:
    """The machine and the versions of what computes; ask only when a pipeline has been opened."""
    facts = describe_machine(Path())
    return {name: fact for name, fact in facts.items() if name not in _OF_ONE_MACHINE} | {"system": system()}


def result(machine: dict[str, Any] | None, rows: Sequence[Measured], *, complete: bool) -> dict[str, Any]:
    """The object that is shared; `complete` is whether all that was asked for is in it."""
    return {"schema": SCHEMA, "complete": complete, "machine": machine, "rows": [asdict(row) for row in rows]}
