"""The store of models: what a name means, and the converted checkpoint that it stands for. Only this room calls the Hub
and the converter."""

from ..convert.lora import Inspection, Preset
from ..hub import Download
from .adapter_sources import FoundAdapter, adapter_hash, adapters_with, config_hash, find_adapter, local_file
from .adapters import (
    StoredAdapter,
    adapters_folder,
    convert_adapter,
    inspect_adapter,
    open_adapter,
    stored_adapters,
)
from .checkpoints import find_checkpoint
from .conversion import convert_model
from .converted import (
    conversions,
    converted_folders,
    described,
    find_conversion,
    named_checkpoints,
    sizes,
    stored_quants,
)
from .first_use import Announce, FirstUse, Progress
from .folder import demo_folder, is_official, models_folder
from .names import BUILT_IN, CHECKPOINT, FILE, REPO, SOURCE, VARIANT, Model, checked_variant, find_variant, resolve

__all__ = [
    "BUILT_IN",
    "CHECKPOINT",
    "FILE",
    "REPO",
    "SOURCE",
    "VARIANT",
    "Announce",
    "Download",
    "FirstUse",
    "FoundAdapter",
    "Inspection",
    "Model",
    "Preset",
    "Progress",
    "StoredAdapter",
    "adapter_hash",
    "adapters_folder",
    "adapters_with",
    "checked_variant",
    "config_hash",
    "conversions",
    "convert_adapter",
    "convert_model",
    "converted_folders",
    "demo_folder",
    "described",
    "find_adapter",
    "find_checkpoint",
    "find_conversion",
    "find_variant",
    "inspect_adapter",
    "is_official",
    "local_file",
    "models_folder",
    "named_checkpoints",
    "open_adapter",
    "resolve",
    "sizes",
    "stored_adapters",
    "stored_quants",
]
