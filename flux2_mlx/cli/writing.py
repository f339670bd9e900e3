"""The language model of a command line, as `upsample`, `describe` and rewritten prompts need it."""

from typing import TYPE_CHECKING, Any

from ..config import VARIANTS
from ..errors import InputError
from .progress import Bars, conversion

if TYPE_CHECKING:
    from ..upsampling import Writer


def open_writer(model: str, bars: Bars, quiet: bool, **settings: Any) -> "Writer":
    """The language model of `model`, fetched and converted first if need be; `settings` go to
    `Writer.from_pretrained`."""
    from ..upsampling import Writer

    return Writer.from_pretrained(model, quiet=quiet, progress=conversion(bars), **settings)


def is_blind(model: str) -> bool:
    """Whether `model` is one of the table whose language model can't look at images."""
    return model in VARIANTS and VARIANTS[model].vision is None


def check_sight(model: str) -> None:
    """Raise InputError if `model` is known to be blind."""
    if is_blind(model):
        seeing = ", ".join(name for name, variant in VARIANTS.items() if variant.vision)
        raise InputError(f"{model} has no language model that sees images; choose {seeing}")
