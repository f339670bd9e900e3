"""The store of models: what a name means, and the converted checkpoint that it stands for. Only this room calls the Hub
and the converter, which are imported where something is fetched or converted, or an adapter is read."""

from importlib import import_module
from typing import TYPE_CHECKING

from .checkpoints import find_checkpoint
from .first_use import Announce, Calibrate, FirstUse, Progress
from .folder import demo_folder, is_official, models_folder
from .names import BUILT_IN, CHECKPOINT, FILE, REPO, SOURCE, VARIANT, Model, checked_variant, find_variant, resolve

if TYPE_CHECKING:
    from ..convert.lora import Inspection, Preset
    from ..decoders import Decoder
    from ..hub import Download
    from .adapter_sources import FoundAdapter, adapter_hashes, adapters_with, find_adapter
    from .adapters import (
        StoredAdapter,
        adapters_folder,
        convert_adapter,
        inspect_adapter,
        open_adapter,
        stored_adapters,
    )
    from .conversion import convert_model
    from .converted import (
        calibration,
        conversions,
        converted_folders,
        described,
        find_conversion,
        mixture,
        named_checkpoints,
        sizes,
        stored_quants,
        usual_quants,
    )
    from .decoders import DECODERS, FoundDecoder, decoder_with, find_decoder, look_up_decoder

__all__ = [
    "BUILT_IN",
    "CHECKPOINT",
    "DECODERS",
    "FILE",
    "REPO",
    "SOURCE",
    "VARIANT",
    "Announce",
    "Calibrate",
    "Decoder",
    "Download",
    "FirstUse",
    "FoundAdapter",
    "FoundDecoder",
    "Inspection",
    "Model",
    "Preset",
    "Progress",
    "StoredAdapter",
    "adapter_hashes",
    "adapters_folder",
    "adapters_with",
    "calibration",
    "checked_variant",
    "conversions",
    "convert_adapter",
    "convert_model",
    "converted_folders",
    "decoder_with",
    "demo_folder",
    "described",
    "find_adapter",
    "find_checkpoint",
    "find_conversion",
    "find_decoder",
    "find_variant",
    "inspect_adapter",
    "is_official",
    "look_up_decoder",
    "mixture",
    "models_folder",
    "named_checkpoints",
    "open_adapter",
    "resolve",
    "sizes",
    "stored_adapters",
    "stored_quants",
    "usual_quants",
]
_LAZY = {
    "DECODERS": ".decoders",
    "Decoder": "..decoders",
    "Download": "..hub",
    "FoundAdapter": ".adapter_sources",
    "FoundDecoder": ".decoders",
    "Inspection": "..convert.lora",
    "Preset": "..convert.lora",
    "StoredAdapter": ".adapters",
    "adapter_hashes": ".adapter_sources",
    "adapters_folder": ".adapters",
    "adapters_with": ".adapter_sources",
    "calibration": ".converted",
    "conversions": ".converted",
    "convert_adapter": ".adapters",
    "convert_model": ".conversion",
    "converted_folders": ".converted",
    "decoder_with": ".decoders",
    "described": ".converted",
    "find_adapter": ".adapter_sources",
    "find_conversion": ".converted",
    "find_decoder": ".decoders",
    "inspect_adapter": ".adapters",
    "look_up_decoder": ".decoders",
    "mixture": ".converted",
    "named_checkpoints": ".converted",
    "open_adapter": ".adapters",
    "sizes": ".converted",
    "stored_adapters": ".adapters",
    "stored_quants": ".converted",
    "usual_quants": ".converted",
}


def _found(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:  # a checker would take any name for one of ours
    __getattr__ = _found
