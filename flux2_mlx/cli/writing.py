"""The language model of a command line, as `upsample`, `describe` and rewritten prompts need it."""

from typing import TYPE_CHECKING, Any

from ..config import VARIANTS
from ..errors import InputError
from .progress import Bars

if TYPE_CHECKING:
    from ..store import Model
    from ..upsampling import Writer


def open_writer(model: "Model | str", bars: Bars, **settings: Any) -> "Writer":
    """The language model of `model`, fetched and converted first if need be; `settings` go to
    `Writer.from_pretrained`."""
    from ..upsampling import Writer

    return Writer.from_pretrained(model, announce=bars.announce, progress=bars, **settings)


def is_blind(model: "Model") -> bool:
    """Whether `model` is one of the table whose language model can't look at images."""
    return model.variant is not None and model.variant.vision is None


def check_sight(model: "Model") -> None:
    """Raise InputError if `model` is known to be blind."""
    if is_blind(model):
        seeing = ", ".join(name for name, variant in VARIANTS.items() if variant.vision)
        raise InputError(f"{model.name} has no language model that sees images; choose {seeing}")
