"""The store of models: what a name means, and the converted checkpoint that it stands for. Only this room calls the Hub
and the converter."""

from .acquisition import Announce, FirstUse, Progress
from .checkpoints import conversions, converted_folders, find_checkpoint, named_checkpoints
from .conversion import checked_variant, is_official, make_checkpoint, open_source, what_is_here
from .names import (
    BUILT_IN,
    CHECKPOINT,
    FILE,
    REPO,
    SOURCE,
    VARIANT,
    Model,
    demo_folder,
    find_variant,
    get_variant,
    models_folder,
    resolve,
    stored_checkpoints,
)

__all__ = [
    "BUILT_IN",
    "CHECKPOINT",
    "FILE",
    "REPO",
    "SOURCE",
    "VARIANT",
    "Announce",
    "FirstUse",
    "Model",
    "Progress",
    "checked_variant",
    "conversions",
    "converted_folders",
    "demo_folder",
    "find_checkpoint",
    "find_variant",
    "get_variant",
    "is_official",
    "make_checkpoint",
    "models_folder",
    "named_checkpoints",
    "open_source",
    "resolve",
    "stored_checkpoints",
    "what_is_here",
]
