"""Conversion of PyTorch checkpoints: the only place that knows foreign weight names."""

from .configs import MODEL_INDEX
from .sources import Source
from .write import check_target, check_writable, write_checkpoint

__all__ = ["MODEL_INDEX", "Source", "check_target", "check_writable", "write_checkpoint"]
