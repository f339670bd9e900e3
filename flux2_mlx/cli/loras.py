"""Adapters that a command line names, or that an image remembers."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import replay
from .progress import Bars, notice, size_text

if TYPE_CHECKING:
    from ..pipeline import Flux2Pipeline
    from ..store import FoundAdapter

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_LIKE_A_NUMBER = re.compile(r"[+-]?[\d.,]*|[+-]?(?:nan|inf)", re.IGNORECASE)
_STEPS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")
_SUFFIX = ".safetensors"
_REMEMBERED = {"name": str, "source": str, "sha256": str, "scale": float, "steps": list | None, "origin": str | None}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lora:
    """An adapter, the scale of what it changes, and the first and last step that it works in."""

    source: str
    scale: float = 1.0
    steps: tuple[int, int] | None = None


def read(texts: Sequence[str], steps: str | None) -> tuple[Lora, ...]:
    """The adapters that `--lora` names, in the steps of `--lora-steps`; InputError if these can't be read."""
    if steps is not None and not texts:
        raise InputError(f"--lora-steps {steps} needs adapters; give them with --lora")
    own = None if steps is None else _steps(steps)
    return tuple(_lora(text, own) for text in texts)


def _lora(text: str, steps: tuple[int, int] | None) -> Lora:
    """What exists by the whole name is that, whatever it ends with."""
    source, colon, scale = text.rpartition(":")
    if not source or _exists(text):
        return Lora(text, steps=steps)
    if _NUMBER.fullmatch(scale):
        return Lora(source, float(scale), steps)
    if colon and (_LIKE_A_NUMBER.fullmatch(scale) or source.lower().endswith(_SUFFIX) or _exists(source)):
        raise InputError(f"--lora {text!r}: the scale {scale!r} is no number; write {source}:0.8, say")
    return Lora(text, steps=steps)


def _exists(text: str) -> bool:
    try:
        return os.path.lexists(os.path.expanduser(text))
    except ValueError:  # a name that no file can have
        return False


def _steps(text: str) -> tuple[int, int]:
    match = _STEPS.fullmatch(text)
    if match is None:
        raise InputError(f"--lora-steps {text:.40} is no range of steps; write 1-4, say, or the number of one")
    return int(match[1]), int(match[2] or match[1])


def remembered(adapters: Any, image: Path, models_dir: Path | None) -> tuple[Lora, ...]:
    """The adapters that `image` was made with, from its settings; none if they tell of none.

    Raises:
        InputError: one is not here, or has changed; or the settings are damaged.
    """
    return tuple(_found(one, image, models_dir) for one in adapters or ())


def _found(told: Mapping[str, Any], image: Path, models_dir: Path | None) -> Lora:
    from ..store import adapter_with

    replay.check_kinds(told, _REMEMBERED, image)
    name = Path(told["source"]).name
    sha256 = told["sha256"]
    origin = told.get("origin")
    path = adapter_with(sha256, name, [image.parent, Path()], models_dir)
    if path is None:
        way = f"fetch {origin}, or name it with --lora" if origin else "name it with --lora"
        raise InputError(
            f"the adapter {name} of SHA-256 {sha256:.64}, which {image} was made with, is neither beside it nor here, "
            f"nor in the folder loras of the models folder or in the Hub's cache, or has changed; {way}"
        )
    return Lora(str(path), told["scale"], tuple(told["steps"]) if told.get("steps") else None)


class Adapters:
    """The adapters of a job, from their headers on. Use it as a context manager.

    Args:
        loras: which, and how they are used.
        bars: hears of downloads.
        quiet: say nothing of these.

    Raises:
        InputError, DownloadError, CheckpointError: one is not there, or none for FLUX.2.
    """

    def __init__(self, loras: Sequence[Lora], bars: Bars, quiet: bool):
        self._loras = loras
        self._bars = bars
        self._quiet = quiet
        self._noted: set[str] = set()
        self._held = ExitStack()

    def __enter__(self) -> "Adapters":
        from ..store import find_adapter

        with ExitStack() as held:
            self._found = [held.enter_context(find_adapter(lora.source)) for lora in self._loras]
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def expected(self, pipe: "Flux2Pipeline") -> "Flux2Pipeline":
        """A pipeline to check and plan runs with them, before anything but their headers is here.

        Raises:
            CheckpointError: one is for another model. InputError: a scale or steps are wrong.
        """
        for found in self._found:
            self._note(found, found.check(pipe.checkpoint))
        return pipe.expecting([(x, lora.scale, lora.steps) for x, lora in zip(self._found, self._loras, strict=True)])

    def fetch(self) -> None:
        """Bring them here; DownloadError if that can't be done."""
        for found in self._found:
            if found.download:
                notice(_announcement(found), self._quiet)
            found.fetch(self._bars)

    def read(self, pipe: "Flux2Pipeline") -> None:
        """Raise CheckpointError if the values of one are damaged. Nothing stays in memory."""
        for found in self._found:
            found.load(pipe.checkpoint, found.source)

    def load(self, pipe: "Flux2Pipeline") -> None:
        """Have them at work."""
        for found, lora in zip(self._found, self._loras, strict=True):
            pipe.use_adapter(found, scale=lora.scale, steps=lora.steps)

    def _note(self, found: "FoundAdapter", notes: Sequence[str]) -> None:
        """Say what a user should know, once of each adapter."""
        for text in (f"{found.source}: {note}" for note in notes):
            if text not in self._noted:
                self._noted.add(text)
                _log.warning("%s", text)


def _announcement(found: "FoundAdapter") -> str:
    """What is fetched, how large it is and what its licence is."""
    download = found.download
    assert download is not None
    there = f", {size_text(download.present)} of it already there" if download.present else ""
    gated = "; gated, and this account has access" if download.is_gated else ""
    licence = f"licence {download.licence}" if download.licence else f"licence: see {download.page}"
    return f"{found.origin} is fetched: {size_text(download.size)}{there}; {licence}{gated}"
