"""Conversion of PyTorch checkpoints: the only place that knows foreign weight names."""

from .folder import LAST_USED, check_target, check_writable, is_own
from .requantize import requantize, requantized
from .sources import Source
from .write import check_source, write_checkpoint

__all__ = [
    "LAST_USED",
    "Source",
    "check_source",
    "check_target",
    "check_writable",
    "is_own",
    "requantize",
    "requantized",
    "write_checkpoint",
]
