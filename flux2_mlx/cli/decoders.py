"""Decoders that take the place of the model's own, for finished images and for previews."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from .progress import Bars, notice, size_text

if TYPE_CHECKING:
    from .. import Flux2Pipeline
    from ..store import Decoder, Download, FoundDecoder

OWN = "full"  # the model's


class Decoders:
    """What makes finished images and what makes previews, as `--decoder` and `--preview-decoder` name it. Each is
    looked up when it is first asked for, within the context that this is, and raises what `find_decoder` does."""

    def __init__(self, finished: str | None, previews: str | None):
        self._finished = None if finished == OWN else finished
        self._previews = previews
        self._found: dict[str, FoundDecoder] = {}
        self._held = ExitStack()

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def finished(self) -> "Decoder | None":
        """What makes finished images; None: the model's own decoder."""
        return None if self._finished is None else self._look_up(self._finished)

    def preview(self, pipe: "Flux2Pipeline") -> None:
        """Have the previews of a pipeline made as is asked for."""
        taef2 = self._previews == "taef2"
        pipe.preview_with(self._look_up("taef2") if taef2 else None if self._previews == OWN else self._previews)

    def fetch(self, bars: Bars, quiet: bool) -> None:
        """Bring those here that were looked up, and unless `quiet` say what is fetched."""
        for name, found in self._found.items():

            def announce(download: "Download", name: str = name) -> None:
                notice(_announcement(name, download), quiet)

            found.fetch(announce, bars)

    def _look_up(self, name: str) -> "Decoder":
        from ..store import look_up_decoder  # with the Hub and the converter

        if name not in self._found:
            self._found[name] = self._held.enter_context(look_up_decoder(name))
        return self._found[name].decoder


def _announcement(name: str, download: "Download") -> str:
    licence = download.licence or f"licence: see {download.page}"
    return f"decoder {name}: {size_text(download.size)} are fetched from {download.page} ({licence})"
