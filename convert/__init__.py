"""Conversion of PyTorch checkpoints: the only place that knows foreign weight names."""

from .models import converted_folders, demo_folder, find_checkpoint, look_up, models_folder, named_checkpoints
from .sources import Source
from .write import check_target, write_checkpoint

__all__ = [
    "Source",
    "check_target",
    "converted_folders",
    "demo_folder",
    "find_checkpoint",
    "look_up",
    "models_folder",
    "named_checkpoints",
    "write_checkpoint",
]
