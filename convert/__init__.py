"""Conversion of PyTorch checkpoints: the only place that knows foreign weight names."""

from .models import converted_folders, find_checkpoint, look_up, models_folder
from .sources import Source
from .write import check_target, write_checkpoint

__all__ = [
    "Source",
    "check_target",
    "converted_folders",
    "find_checkpoint",
    "look_up",
    "models_folder",
    "write_checkpoint",
]
