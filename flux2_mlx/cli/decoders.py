"""Decoders that take the place of the model's own, for finished images and for previews."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .progress import Bars, notice, size_text

if TYPE_CHECKING:
    from .. import Flux2Pipeline
    from ..store import Decoder, Download


@dataclass(frozen=True)
class Decoders:
    """What makes finished images and what makes previews; None: the model's own decoder. Build it with `Decoders.find`,
    which has them here."""

    finished: "Decoder | None"
    previews: "Decoder | str | None"

    @classmethod
    def find(cls, finished: str | None, previews: str | None, bars: Bars, quiet: bool) -> "Decoders":
        """Those that `--decoder` and `--preview-decoder` name, fetched if need be.

        Raises:
            InputError, DownloadError, CheckpointError: as `find_decoder` has it.
        """

        def found(name: str) -> "Decoder":
            from ..store import find_decoder  # with the Hub and the converter

            return find_decoder(
                name, announce=lambda download: notice(_announcement(name, download), quiet), progress=bars
            )

        decoder = None if finished is None else found(finished)
        if previews == "taef2":
            return cls(decoder, found(previews))
        return cls(decoder, None if previews == "full" else previews)

    def preview(self, pipe: "Flux2Pipeline") -> "Flux2Pipeline":
        """The pipeline, whose previews are made so from now on."""
        pipe.preview_with(self.previews)
        return pipe


def _announcement(name: str, download: "Download") -> str:
    licence = download.licence or f"licence: see {download.page}"
    return f"decoder {name}: {size_text(download.size)} are fetched from {download.page} ({licence})"
