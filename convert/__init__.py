"""Conversion of PyTorch checkpoints: the only place that knows foreign weight names."""

from .sources import Source
from .write import check_target, check_writable, write_checkpoint

__all__ = ["Source", "check_target", "check_writable", "write_checkpoint"]
