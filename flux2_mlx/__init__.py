"""FLUX.2 image generation on Apple Silicon with MLX."""

from .errors import CheckpointError, DownloadError, Flux2Error, InputError, RangeError

TYPE_CHECKING = False  # what type checkers take as true; typing is slow to import, see below
if TYPE_CHECKING:
    from .pipeline import Flux2Output, Flux2Pipeline

__all__ = ["CheckpointError", "DownloadError", "Flux2Error", "Flux2Output", "Flux2Pipeline", "InputError", "RangeError"]


def __getattr__(name: str):
    # MLX takes a noticeable part of a second to import, which `flux2-mlx --help` need not wait for, and what reads the
    # version some of the time in which Ctrl-C is not handled yet.
    if name == "__version__":
        from importlib.metadata import version

        return version("flux2-mlx")
    if name in ("Flux2Output", "Flux2Pipeline"):
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
