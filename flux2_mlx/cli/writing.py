"""The language model of a command line, as `upsample`, `describe` and rewritten prompts need it."""

from typing import TYPE_CHECKING, Any

from .progress import Bars, conversion

if TYPE_CHECKING:
    from ..upsampling import Writer


def open_writer(model: str, bars: Bars, quiet: bool, **settings: Any) -> "Writer":
    """The language model of `model`, fetched and converted first if need be; `settings` go to
    `Writer.from_pretrained`."""
    from ..upsampling import Writer

    return Writer.from_pretrained(model, quiet=quiet, progress=conversion(bars), **settings)
