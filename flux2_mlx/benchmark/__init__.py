"""How fast models are on this machine, and how results of two machines or times compare."""

from .comparison import Comparison, compare, read_result
from .measurement import Case, Measured, measure
from .result import Spread, describe, result

__all__ = ["Case", "Comparison", "Measured", "Spread", "compare", "describe", "measure", "read_result", "result"]
