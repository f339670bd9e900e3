"""Conversion of PyTorch checkpoints: the only place that knows foreign weight names."""

from . import formats
from .assembly import MissingPartsError, assembled, loose_tensors
from .configs import hints, is_whole, stated
from .decoders import read_decoder
from .folder import check_target, check_writable, is_own
from .identity import Conversion, Identity, conversion, foreign, identify, identify_whole
from .mflux import said_of
from .parts import MODEL_PARTS, TOKENIZER_PART
from .requantize import requantize, requantized
from .sources import Source, chosen_quants
from .strangers import adapter
from .text import settings
from .tokenizer import tokenizer_in
from .weight_files import LOOSE, is_loose, loose_files
from .write import KEPT, check_folds, check_source, write_checkpoint

__all__ = [
    "KEPT",
    "LOOSE",
    "MODEL_PARTS",
    "TOKENIZER_PART",
    "Conversion",
    "Identity",
    "MissingPartsError",
    "Source",
    "adapter",
    "assembled",
    "check_folds",
    "check_source",
    "check_target",
    "check_writable",
    "chosen_quants",
    "conversion",
    "foreign",
    "formats",
    "hints",
    "identify",
    "identify_whole",
    "is_loose",
    "is_own",
    "is_whole",
    "loose_files",
    "loose_tensors",
    "read_decoder",
    "requantize",
    "requantized",
    "said_of",
    "settings",
    "stated",
    "tokenizer_in",
    "write_checkpoint",
]
