"""The store of models: what a name means, and the converted checkpoint that it stands for. Only this room calls the Hub
and the converter."""

from ..convert.lora import Inspection, Preset
from ..hub import Download
from .acquisition import Announce, FirstUse, Progress
from .adapter_sources import FoundAdapter, adapter_with, find_adapter
from .adapters import (
    StoredAdapter,
    adapters_folder,
    convert_adapter,
    inspect_adapter,
    open_adapter,
    stored_adapters,
)
from .checkpoints import find_checkpoint
from .conversion import convert_model, make_checkpoint
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
from .stock import (
    checked_variant,
    conversions,
    converted_folders,
    described,
    find_conversion,
    is_official,
    named_checkpoints,
    open_source,
    sizes,
    stored_quants,
    what_is_here,
)

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
    "adapter_with",
    "adapters_folder",
    "checked_variant",
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
    "get_variant",
    "inspect_adapter",
    "is_official",
    "make_checkpoint",
    "models_folder",
    "named_checkpoints",
    "open_adapter",
    "open_source",
    "resolve",
    "sizes",
    "stored_adapters",
    "stored_checkpoints",
    "stored_quants",
    "what_is_here",
]
