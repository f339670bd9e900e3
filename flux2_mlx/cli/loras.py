"""Adapters that a command line names, or that an image remembers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import replay

if TYPE_CHECKING:
    from ..pipeline import Flux2Pipeline

_SCALED = re.compile(r"(?P<source>.+):(?P<scale>[+-]?(?:\d+\.?\d*|\.\d+))", re.DOTALL)
_STEPS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")
_REMEMBERED = {"name": str, "source": str, "sha256": str, "scale": float, "steps": list | None}


@dataclass(frozen=True)
class Lora:
    """An adapter, the scale of what it changes, and the first and last step that it works in."""

    source: str
    scale: float = 1.0
    steps: tuple[int, int] | None = None


def read(texts: Sequence[str], steps: str | None) -> tuple[Lora, ...]:
    """Those of `--lora` `SOURCE[:SCALE]` and `--lora-steps` `A-B`; InputError if these are nothing of the kind."""
    if steps is not None and not texts:
        raise InputError(f"--lora-steps {steps} needs adapters; give them with --lora")
    own = None if steps is None else _steps(steps)
    return tuple(_lora(text, own) for text in texts)


def _lora(text: str, steps: tuple[int, int] | None) -> Lora:
    match = _SCALED.fullmatch(text)
    return Lora(match["source"], float(match["scale"]), steps) if match else Lora(text, steps=steps)


def _steps(text: str) -> tuple[int, int]:
    match = _STEPS.fullmatch(text)
    if match is None:
        raise InputError(f"--lora-steps {text:.40} is no range of steps; write 1-4, say, or the number of one")
    return int(match[1]), int(match[2] or match[1])


def remembered(adapters: Any, image: Path) -> tuple[Lora, ...]:
    """Those that `image` was made with, where it says so in its settings.

    Raises:
        InputError: one is neither beside the image nor here, or has changed; or the settings are damaged.
    """
    return tuple(_found(one, image) for one in adapters or ())


def _found(told: Mapping[str, Any], image: Path) -> Lora:
    replay.check_kinds(told, _REMEMBERED, image)
    path = replay.find({"path": told["source"], "sha256": told["sha256"]}, image, "name it with --lora")
    return Lora(str(path), told["scale"], tuple(told["steps"]) if told.get("steps") else None)


def load(pipe: "Flux2Pipeline", loras: Sequence[Lora]) -> None:
    """Have the adapters at work in a pipeline."""
    for lora in loras:
        pipe.load_lora_weights(lora.source, scale=lora.scale, steps=lora.steps)
