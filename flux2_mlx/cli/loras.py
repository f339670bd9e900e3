"""Adapters that a command line names, or that an image remembers."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError
from . import replay
from .progress import Bars, notice, size_text

if TYPE_CHECKING:
    from ..pipeline import Flux2Pipeline
    from ..store import FoundAdapter, Preset

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_LIKE_A_NUMBER = re.compile(r"[+-]?[\d.,]*|[+-]?(?:nan|inf)", re.IGNORECASE)
_STEPS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)
_SUFFIX = ".safetensors"
_SOME = 5
_REMEMBERED = {"name": str, "source": str, "sha256": str, "scale": float, "steps": list | None, "origin": str | None}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lora:
    """An adapter, the scale of what it changes, the first and last step that it works in, and whether the command line
    has its scale."""

    source: str
    scale: float = 1.0
    steps: tuple[int, int] | None = None
    is_scaled: bool = field(default=False, compare=False)


def read(texts: Sequence[str], steps: str | None) -> tuple[Lora, ...]:
    """The adapters that `--lora` names, in the steps of `--lora-steps`; InputError if these can't be read."""
    from ..request import check_count

    if steps is not None and not texts:
        raise InputError(f"--lora-steps {steps} needs adapters; give them with --lora")
    if "" in texts:
        raise InputError("--lora is empty; give a file, a folder, a repo id or REPO:FILE")
    check_count(len(texts))
    own = None if steps is None else _steps(steps)
    return tuple(_lora(text, own) for text in texts)


def _lora(text: str, steps: tuple[int, int] | None) -> Lora:
    """What exists by the whole name is that, whatever it ends with."""
    source, colon, scale = text.rpartition(":")
    if not source or _exists(text):
        return Lora(text, steps=steps)
    if _NUMBER.fullmatch(scale):
        return Lora(source, float(scale), steps, is_scaled=True)
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


def remembered(adapters: Any, image: Path, models_dir: Path | None, given: Sequence[Lora] = ()) -> tuple[Lora, ...]:
    """The adapters that `image` was made with, from its settings, and those of `given` besides.

    One of `given` that is a file of theirs has the scale and the steps of theirs that it was not given itself. If none
    is, they take the place of theirs.

    Raises:
        InputError: some are not here, or have changed, or they are too many; or the settings are damaged.
    """
    from ..request import check_count

    told: list[Mapping[str, Any]] = list(adapters or ())
    check_count(len(told))
    for one in told:
        replay.check_kinds(one, _REMEMBERED, image)
    own, others = _matched(told, given)
    if given and not own:
        if told:
            names = ", ".join(Path(one["source"]).name for one in told)
            _log.warning("the adapters of %s are replaced by those of --lora: %s", image, names)
        return tuple(given)
    found = [own.get(number) or _found(one, image, models_dir) for number, one in enumerate(told)]
    if missing := [one for one, lora in zip(told, found, strict=True) if lora is None]:
        raise InputError(_missing(missing, image))
    return (*(lora for lora in found if lora is not None), *others)


def _matched(told: Sequence[Mapping[str, Any]], given: Sequence[Lora]) -> tuple[dict[int, Lora], list[Lora]]:
    """Those of `given` that an image tells of, completed with that, by their places there; and the others."""
    from ..store import adapter_hash

    own: dict[int, Lora] = {}
    others = []
    for lora in given if told else ():
        sha256 = adapter_hash(Path(os.path.expanduser(lora.source)))
        places = (number for number, one in enumerate(told) if number not in own and one["sha256"] == sha256)
        if (number := next(places, None)) is None:
            others.append(lora)
        else:
            own[number] = _completed(lora, told[number])
    return own, others


def _completed(lora: Lora, told: Mapping[str, Any]) -> Lora:
    scale = lora.scale if lora.is_scaled else told["scale"]
    return replace(lora, scale=scale, steps=lora.steps or _told_steps(told))


def _told_steps(told: Mapping[str, Any]) -> tuple[int, int] | None:
    return tuple(told["steps"]) if told.get("steps") else None


def _found(told: Mapping[str, Any], image: Path, models_dir: Path | None) -> Lora | None:
    """An adapter that an image tells of; None: it is not here."""
    from ..store import adapter_with

    path = adapter_with(told["sha256"], Path(told["source"]).name, [image.parent, Path()], models_dir)
    return None if path is None else Lora(str(path), told["scale"], _told_steps(told))


def _missing(told: Sequence[Mapping[str, Any]], image: Path) -> str:
    names = ", ".join(f"{Path(one['source']).name} of SHA-256 {one['sha256']:.64}" for one in told)
    origins = ", ".join(one["origin"] for one in told if one.get("origin"))
    adapters, are, have, them = (
        ("adapter", "is", "has", "it") if len(told) == 1 else ("adapters", "are", "have", "them")
    )
    way = f"fetch {origins}, or name {them} with --lora" if origins else f"name {them} with --lora"
    return (
        f"the {adapters} {names}, which {image} was made with, {are} neither beside it nor here, nor in the folder "
        f"loras of the models folder or in the Hub's cache, or {have} changed; {way}"
    )


class Adapters:
    """The adapters of a job. Their headers are looked up once, when they are first needed, or as a context manager is
    entered that lets go of what that has taken."""

    def __init__(self, loras: Sequence[Lora]):
        self._loras = loras
        self._noted: set[str] = set()
        self._held = ExitStack()

    def __enter__(self) -> "Adapters":
        _ = self._found
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._held.close()

    @property
    def names(self) -> str:
        """As the command line has them; empty if there are none."""
        return ", ".join(lora.source for lora in self._loras)

    @cached_property
    def _found(self) -> "list[FoundAdapter]":
        """InputError, DownloadError or CheckpointError: one is not there, or none for FLUX.2."""
        if not self._loras:
            return []
        from ..store import find_adapter  # with the Hub and the converter

        return [self._held.enter_context(find_adapter(lora.source)) for lora in self._loras]

    @property
    def _uses(self) -> "list[tuple[FoundAdapter, float, tuple[int, int] | None]]":
        return [(found, lora.scale, lora.steps) for found, lora in zip(self._found, self._loras, strict=True)]

    def presets(self) -> "list[Preset]":
        """What they are made to be run with, each once; CheckpointError if a file beside one can't be read."""
        return list(dict.fromkeys(preset for found in self._found if (preset := found.file.preset)))

    def expected(self, pipe: "Flux2Pipeline") -> "Flux2Pipeline":
        """A pipeline to check and plan runs with them, before anything but their headers is here.

        Raises:
            CheckpointError: one is for another model. InputError: a scale or steps are wrong.
        """
        for found in self._found:
            self._note(found, found.check(pipe.checkpoint))
        return pipe.expecting(self._uses)

    def fetch(self, bars: Bars, quiet: bool) -> None:
        """Bring them here, and unless `quiet` say what is fetched; DownloadError if that can't be done."""
        for found in self._found:
            if found.download:
                notice(_announcement(found), quiet)
            found.fetch(bars)

    def read(self, pipe: "Flux2Pipeline") -> None:
        """Raise CheckpointError if the values of one are damaged. Nothing stays in memory."""
        for found in self._found:
            found.load(pipe.checkpoint, found.source)

    def load(self, pipe: "Flux2Pipeline") -> None:
        """Have them at work."""
        pipe.use_adapters(self._uses)

    def hints(self, prompts: Sequence[str], *, is_preset: bool) -> list[str]:
        """What may be missing for them: their words in `prompts`, and the settings that they are made for unless others
        are given, or theirs (`is_preset`)."""
        found = {one.source: one for one in self._found}
        who = "the prompt has" if len(prompts) == 1 else "some prompts have"
        lacking = [one for one in found.values() if _lacks(prompts, one.file.said.trigger_words)]
        hints = [
            f"{one.source}: {who} none of its trigger words, {', '.join(one.file.said.trigger_words[:_SOME])}"
            for one in lacking
        ]
        return hints if is_preset else [*hints, *filter(None, map(_preset_hint, found.values()))]

    def _note(self, found: "FoundAdapter", notes: Sequence[str]) -> None:
        """Say what a user should know, once of each adapter."""
        for text in (f"{found.source}: {note}" for note in notes):
            if text not in self._noted:
                self._noted.add(text)
                _log.warning("%s", text)


def _lacks(prompts: Sequence[str], words: Sequence[str]) -> bool:
    """Whether a prompt has none of the words, of which commas separate several."""
    single = [word for text in words for part in text.casefold().split(",") if (word := part.strip())]
    return bool(single) and not all(any(word in text.casefold() for word in single) for text in prompts)


def _preset_hint(found: "FoundAdapter") -> str | None:
    try:
        preset = found.file.preset
    except CheckpointError:  # the file beside it may be about something else
        return None
    if preset is None:
        return None
    return f"{found.source} is made for {preset}, as {preset.source} says; --preset turbo sets that"


def _announcement(found: "FoundAdapter") -> str:
    """What is fetched, how large it is and what its licence is."""
    download = found.download
    assert download is not None
    there = f", {size_text(download.present)} of it already there" if download.present else ""
    gated = "; gated, and this account has access" if download.is_gated else ""
    licence = f"licence {download.licence}" if download.licence else f"licence: see {download.page}"
    return f"{found.origin} is fetched: {size_text(download.size)}{there}; {licence}{gated}"
