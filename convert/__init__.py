"""Conversion of PyTorch checkpoints: the only place that knows foreign weight names."""

from .assembly import assembled, is_loose
from .folder import LAST_USED, check_target, check_writable, is_own
from .requantize import requantize, requantized
from .sources import Source
from .write import check_source, write_checkpoint

__all__ = [
    "LAST_USED",
    "Source",
    "assembled",
    "check_source",
    "check_target",
    "check_writable",
    "is_loose",
    "is_own",
    "requantize",
    "requantized",
    "write_checkpoint",
]
