"""FLUX.2 image generation on Apple Silicon with MLX."""

from .errors import (
    CheckpointError,
    DeviceError,
    DownloadError,
    Flux2Error,
    InputError,
    RangeError,
    RequirementError,
)

TYPE_CHECKING = False  # what type checkers take as true; typing is slow to import, see below
if TYPE_CHECKING:
    from .pipeline import Flux2Output, Flux2Pipeline
    from .upsampling import Writer

__all__ = [
    "CheckpointError",
    "DeviceError",
    "DownloadError",
    "Flux2Error",
    "Flux2Output",
    "Flux2Pipeline",
    "InputError",
    "RangeError",
    "RequirementError",
    "Writer",
]
# MLX takes a noticeable part of a second to import, which `flux2-mlx --help` need not wait for.
_LAZY = {"Flux2Output": "pipeline", "Flux2Pipeline": "pipeline", "Writer": "upsampling"}


def __getattr__(name: str):
    if name == "__version__":  # what reads it takes some of the time in which Ctrl-C is not handled yet
        from importlib.metadata import version

        return version("flux2-mlx")
    if name in _LAZY:
        from importlib import import_module

        from .requirements import check, mlx_needed

        check()
        with mlx_needed():
            return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list:  # which Python 3.6 can read, see requirements.py
    return [*__all__, "__version__"]
