"""Conversion of PyTorch checkpoints: the only place that knows foreign weight names."""

from .sources import Source
from .write import write_checkpoint

__all__ = ["Source", "write_checkpoint"]
