"""FLUX.2 image generation on Apple Silicon with MLX."""

from importlib.metadata import version
from typing import TYPE_CHECKING

from .errors import CheckpointError, DownloadError, Flux2Error, InputError, RangeError

if TYPE_CHECKING:
    from .pipeline import Flux2Output, Flux2Pipeline

__all__ = ["CheckpointError", "DownloadError", "Flux2Error", "Flux2Output", "Flux2Pipeline", "InputError", "RangeError"]
__version__ = version("flux2-mlx")


def __getattr__(name: str):
    # MLX takes a noticeable part of a second to import, which `flux2-mlx --help` need not wait for.
    if name in ("Flux2Output", "Flux2Pipeline"):
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
