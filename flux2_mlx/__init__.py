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
    from .memory import Plan
    from .output import Flux2Output
    from .pipeline import Flux2Pipeline
    from .references import Edit
    from .request import Progress, Request
    from .upsampling import Writer

    __version__: str

__all__ = [
    "CheckpointError",
    "DeviceError",
    "DownloadError",
    "Edit",
    "Flux2Error",
    "Flux2Output",
    "Flux2Pipeline",
    "InputError",
    "Plan",
    "Progress",
    "RangeError",
    "Request",
    "RequirementError",
    "Writer",
]
# MLX takes a noticeable part of a second to import, which `flux2-mlx --help` need not wait for.
_LAZY = {
    "Edit": "references",
    "Flux2Output": "output",
    "Flux2Pipeline": "pipeline",
    "Plan": "memory",
    "Progress": "request",
    "Request": "request",
    "Writer": "upsampling",
}


def _found(name: str) -> object:
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


if not TYPE_CHECKING:  # a checker would take any name for one of ours
    __getattr__ = _found


def __dir__() -> "list[str]":  # which Python 3.6 can read, see requirements.py
    return [*__all__, "__version__"]
