"""Adapters as trainers save them: which of our layers they change, and how."""

from .adapter_file import AdapterFile, read_adapter
from .folder import CONFIG_ASIDE, PEFT_CONFIG, USUAL_FILES, is_adapter, is_config_of, names_beside
from .folding import Fold, Folds, check_folds, folded_source
from .inspection import InspectedModule, Inspection, inspect
from .presets import Preset
from .saving import save_adapter, saving_notes

__all__ = [
    "CONFIG_ASIDE",
    "PEFT_CONFIG",
    "USUAL_FILES",
    "AdapterFile",
    "Fold",
    "Folds",
    "InspectedModule",
    "Inspection",
    "Preset",
    "check_folds",
    "folded_source",
    "inspect",
    "is_adapter",
    "is_config_of",
    "names_beside",
    "read_adapter",
    "save_adapter",
    "saving_notes",
]
