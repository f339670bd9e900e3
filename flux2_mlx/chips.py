"""Apple's chips: what their GPUs are said to do at most, and who says so."""

import re
from dataclasses import dataclass
from typing import Any

from .errors import InputError

# Apple's own announcements and pages of technical specifications.
_APPLE = "Apple"
# Cores of the GPU times 256 operations a cycle times its clock, which Apple does not tell: 1.40 GHz of M2 (applegpuinfo
# issue 10), 1.39 of M3 (huggingface.js PR 1044), 1.58 to 1.80 of M4 (the same; the middle is taken).
_BY_CLOCK = "cores and clock"
# 1.58 GHz was seen while 94 % of this were reached: michaelstinkerings.org/apple-m5-gpu-roofline-analysis.
_MEASURED = "measured clock"
# Operations a cycle and core of the matrix units in 16 bits, 4 times those of the others. Measured on an A19:
# tzakharko.github.io/apple-neural-accelerators-benchmark.
_UNITS = 4

# The share of `tflops` that every operation is trusted to reach. Whole steps reach more, see `durations`.
REACHED = 0.6


@dataclass(frozen=True)
class Chip:
    """A chip with all cores of its GPU.

    Attributes:
        name: such as `M3 Max`.
        tflops: 1e12 operations a second in 32 bits, and in 16 bits where there are no units for those.
        bandwidth: bytes a second of its memory, of which Apple tells.
        source: where `tflops` is from.
        has_matrix_units: whether products in 16 bits are computed by units of their own, from macOS 26.2 on.
    """

    name: str
    tflops: float
    bandwidth: float
    source: str
    has_matrix_units: bool = False

    @property
    def generation(self) -> int:
        return int(self.name.partition(" ")[0][1:])

    @property
    def has_bfloat16(self) -> bool:
        """Whether its GPU computes in bfloat16; else Metal makes do with float32 and conversions."""
        return self.generation > 2

    @property
    def dtype(self) -> str:
        """What is computed in by default."""
        return "bfloat16" if self.has_bfloat16 else "float16"

    @property
    def matrix_tflops(self) -> float:
        """1e12 operations a second of products in 16 bits."""
        return self.tflops * (_UNITS if self.has_matrix_units else 1)


def _chip(name: str, tflops: float, gigabytes: int, source: str, **more: Any) -> Chip:
    return Chip(name, tflops, gigabytes * 1e9, source, **more)


# Those of a generation from the slowest to the fastest, each the fastest that is sold under its name.
CHIPS = (
    _chip("M1", 2.6, 68, _APPLE),
    _chip("M1 Pro", 5.2, 200, _APPLE),
    _chip("M1 Max", 10.4, 400, _APPLE),
    _chip("M1 Ultra", 20.8, 800, _APPLE),
    _chip("M2", 3.6, 100, _APPLE),
    _chip("M2 Pro", 6.8, 200, _BY_CLOCK),
    _chip("M2 Max", 13.6, 400, _BY_CLOCK),
    _chip("M2 Ultra", 27.2, 800, _APPLE),
    _chip("M3", 3.5, 100, _BY_CLOCK),
    _chip("M3 Pro", 6.4, 150, _BY_CLOCK),
    _chip("M3 Max", 14.2, 400, _BY_CLOCK),
    _chip("M3 Ultra", 28.4, 819, _BY_CLOCK),
    _chip("M4", 4.3, 120, _BY_CLOCK),
    _chip("M4 Pro", 8.6, 273, _BY_CLOCK),
    _chip("M4 Max", 17.2, 546, _BY_CLOCK),
    _chip("M5", 4.0, 153, _MEASURED, has_matrix_units=True),
    _chip("M5 Pro", 8.1, 307, _MEASURED, has_matrix_units=True),
    _chip("M5 Max", 16.2, 614, _MEASURED, has_matrix_units=True),
)


def find_chip(name: str) -> Chip | None:
    """The chip called `name`, with or without `Apple` in front; None: it is not in the table."""
    wanted = " ".join(name.split()).lower().removeprefix("apple ")
    return next((chip for chip in CHIPS if chip.name.lower() == wanted), None)


def chip_named(name: str) -> Chip:
    """The same; InputError lists the names if there is none."""
    if chip := find_chip(name):
        return chip
    raise InputError(f"unknown chip {name[:80]!r}; choose one of {', '.join(chip.name for chip in CHIPS)}")


def like(name: str) -> Chip:
    """The chip of known speed that one called `name` is taken for: itself, or the next slower one of the table. Other
    Apple GPUs, which are virtual, or of telephones and small Macs, are taken for the slowest."""
    match = re.fullmatch(r"Apple M(\d+)( Pro| Max| Ultra|)", name)
    if not match:
        return CHIPS[0]
    generation = min(int(match[1]), CHIPS[-1].generation)
    return find_chip(f"M{generation}{match[2]}") or [chip for chip in CHIPS if chip.generation == generation][-1]
