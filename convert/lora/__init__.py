"""Adapters as trainers save them: which of our layers they change, and how."""

from .adapter_file import USUAL_FILES, AdapterFile, read_adapter
from .folding import Fold, Folds, check_folds, folded_source
from .inspection import InspectedModule, Inspection, inspect
from .presets import Preset
from .saving import save_adapter, saving_notes
from .settings import CONFIG_ASIDE, PEFT_CONFIG, is_config_of

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
    "is_config_of",
    "read_adapter",
    "save_adapter",
    "saving_notes",
]
