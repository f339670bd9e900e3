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
from ..layout import SAFETENSORS
from . import replay
from .progress import Bars, notice, size_text

if TYPE_CHECKING:
    from ..pipeline import Flux2Pipeline
    from ..store import FoundAdapter, Preset

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_LIKE_A_NUMBER = re.compile(r"[+-]?[\d.,]*|[+-]?(?:nan|inf)", re.IGNORECASE)
_STEPS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)
_CONFIG = "adapter_config.json"
_SOME = 5
_LONG = 80  # characters of what others wrote
_REMEMBERED = {"name": str, "source": str, "sha256": str, "scale": float, "steps": list | None}
_REMEMBERED |= {"origin": str | None, "config": str | None}
Hashes = tuple[str | None, str | None]  # of an adapter's file and config
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
        raise InputError(f"--lora-steps {steps:.40} needs adapters; give them with --lora")
    if "" in texts:
        raise InputError("--lora is empty; give a file, a folder, a repo id or REPO:FILE")
    check_count(len(texts))
    own = given_steps(steps)
    return tuple(_lora(text, own) for text in texts)


def _lora(text: str, steps: tuple[int, int] | None) -> Lora:
    """What exists by the whole name is that, whatever it ends with."""
    source, colon, scale = text.rpartition(":")
    if not source or _exists(text):
        return Lora(text, steps=steps)
    if _NUMBER.fullmatch(scale):
        return Lora(source, float(scale), steps, is_scaled=True)
    if colon and (_LIKE_A_NUMBER.fullmatch(scale) or source.lower().endswith(SAFETENSORS) or _exists(source)):
        raise InputError(f"--lora {text!r}: the scale {scale!r} is no number; write {source}:0.8, say")
    return Lora(text, steps=steps)


def _exists(text: str) -> bool:
    try:
        return os.path.lexists(os.path.expanduser(text))
    except ValueError:  # a name that no file can have
        return False


def given_steps(text: str | None) -> tuple[int, int] | None:
    """The first and the last step that `--lora-steps` gives, if it is given; InputError if it is no range."""
    if text is None:
        return None
    match = _STEPS.fullmatch(text)
    if match is None:
        raise InputError(f"--lora-steps {text:.40} is no range of steps; write 1-4, say, or the number of one")
    return int(match[1]), int(match[2] or match[1])


def remembered(
    adapters: Any,
    image: Path,
    models_dir: Path | None,
    given: Sequence[Lora] = (),
    steps: str | None = None,
) -> tuple[Lora, ...]:
    """The adapters that `image` was made with, from its settings, and those of `given` besides.

    One of `given` that is a file of theirs has the scale and the steps of theirs that it was not given itself. If none
    is, they take the place of theirs. `steps` are those of `--lora-steps` for all that are not `given`; None: theirs.

    Raises:
        InputError: some are not here, or have changed, or they are too many; or the settings are damaged.
    """
    from ..request import check_count

    told: list[Mapping[str, Any]] = list(adapters or ())
    check_count(len(told))
    for one in told:
        replay.check_kinds(one, _REMEMBERED, image)
        if one.get("steps") == []:
            raise InputError(f"the settings in {image} are damaged: steps of {_name(one)} is []")
    if steps is not None and not told:
        raise InputError(f"--lora-steps {steps:.40} needs adapters, and {image} has none; give them with --lora")
    own, others = _matched(told, given, image)
    if given and not own:
        if told:
            names = ", ".join(map(_name, told))
            _log.warning("the adapters of %s are replaced by those of --lora: %s", image, names)
        return tuple(given)
    found = [own.get(number) or _found(one, image, models_dir) for number, one in enumerate(told)]
    if missing := [one for one, lora in zip(told, found, strict=True) if lora is None]:
        raise InputError(_missing(missing, image))
    chosen = given_steps(steps)
    again = (lora if chosen is None else replace(lora, steps=chosen) for lora in found if lora is not None)
    return (*again, *others)


def _name(told: Mapping[str, Any]) -> str:
    return f"{Path(told['source']).name:.{_LONG}}"


def _matched(
    told: Sequence[Mapping[str, Any]], given: Sequence[Lora], image: Path
) -> tuple[dict[int, Lora], list[Lora]]:
    """Those of `given` that an image tells of, completed with that, by their places there; and the others.

    The same weights with the same config are paired before those with another one.
    """
    from ..store import adapter_hashes

    own: dict[int, Lora] = {}
    left = {number: (lora, adapter_hashes(lora.source)) for number, lora in enumerate(given if told else ())}
    for is_same in (_is_the_same, _is_of_same_weights):
        for number, (lora, found) in [*left.items()]:
            places = (place for place, one in enumerate(told) if place not in own and is_same(one, found))
            if (place := next(places, None)) is not None:
                own[place] = _completed(lora, told[place])
                del left[number]
                if not _is_the_same(told[place], found):
                    text = "%s has another %s, or none, than when %s was made, so the new one will differ"
                    _log.warning(text, lora.source, _CONFIG, image)
    return own, [lora for lora, _ in left.values()]


def _is_the_same(told: Mapping[str, Any], found: Hashes) -> bool:
    return (told["sha256"], told.get("config")) == found


def _is_of_same_weights(told: Mapping[str, Any], found: Hashes) -> bool:
    return told["sha256"] == found[0]


def _completed(lora: Lora, told: Mapping[str, Any]) -> Lora:
    scale = lora.scale if lora.is_scaled else told["scale"]
    return replace(lora, scale=scale, steps=lora.steps or _told_steps(told))


def _told_steps(told: Mapping[str, Any]) -> tuple[int, int] | None:
    return None if told.get("steps") is None else tuple(told["steps"])


def _found(told: Mapping[str, Any], image: Path, models_dir: Path | None) -> Lora | None:
    """An adapter that an image tells of; None: it is not here.

    InputError: its weights are here, but not the settings that it had beside them.
    """
    from ..store import adapter_hashes, adapters_with

    other = None
    for path in adapters_with(told["sha256"], Path(told["source"]).name, [image.parent, Path()], models_dir):
        if adapter_hashes(path)[1] == told.get("config"):
            return Lora(str(path), told["scale"], _told_steps(told))
        other = other or path
    if other is not None:
        raise InputError(_other_config(told, image, other))
    return None


def _other_config(told: Mapping[str, Any], image: Path, found: Path) -> str:
    was = f"no {_CONFIG} of effect" if told.get("config") is None else f"another {_CONFIG}"
    return (
        f"the weights of {_name(told)}, which {image} was made with, are in {found}, but {image} was made with {was} "
        "beside them; put things back as they were, or name it with --lora"
    )


def _missing(told: Sequence[Mapping[str, Any]], image: Path) -> str:
    names = ", ".join(f"{_name(one)} of SHA-256 {one['sha256']:.64}" for one in told)
    origins = ", ".join(f"{one['origin']:.{2 * _LONG}}" for one in told if one.get("origin"))
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
            f"{one.source}: {who} none of its trigger words, {_words(one.file.said.trigger_words)}" for one in lacking
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


def _words(words: Sequence[str]) -> str:
    """Some of them, each as short as a line takes."""
    return ", ".join(word if len(word) <= _LONG else f"{word[:_LONG]}…" for word in words[:_SOME])


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
