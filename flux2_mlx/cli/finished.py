"""Images that are there already: they stay, and it is said where they were made otherwise."""

import logging
from typing import Any

from ..errors import InputError
from .draft import Target
from .replay import without_folders
from .report import Record

# What must be the same for an image to be the one that is asked for.
_COMPARED = (
    "prompt", "seed", "variant", "fingerprint", "quant", "text_quant", "width", "height", "steps", "guidance",
)  # fmt: skip
_EFFECT = "sha256", "config", "scale", "steps"  # what that of an adapter depends on
_WORDS = {"variant": "model", "fingerprint": "weights", "text_quant": "quant of the text encoder"}
_log = logging.getLogger(__name__)


def compare(record: Record) -> None:
    """Warn of images that are there and stay but differ from what is asked for, and of empty files."""
    for target in record.targets:
        if target.is_kept:
            _compare(record, target)
        elif record.job.saving.is_empty(target.path):
            _log.warning("%s is empty and is made again", target.path)


def _compare(record: Record, target: Target) -> None:
    from ..images import read_settings

    try:
        changed = _differences(read_settings(target.path), record.settings(target))
    except InputError:
        if record.job.metadata:
            _log.warning("%s is left as it is, but does not say what it was made from", target.path)
        return
    if changed:
        _log.warning("%s is left as it is, but was made with another %s", target.path, ", ".join(changed))


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The settings in which an image differs from what is wanted, in words. What either does not tell is no
    difference."""
    changed = [
        name for name in _COMPARED if None not in (found.get(name), wanted[name]) and found[name] != wanted[name]
    ]
    if found.get("negative_prompt") != wanted.get("negative_prompt"):
        changed.append("negative prompt")
    if found.get("step_cache") != wanted.get("step_cache"):
        changed.append("step cache")
    if _decoder(found) != _decoder(wanted):
        changed.append("decoder")
    if found.get("sigmas") != wanted.get("sigmas"):
        changed.append("set of noise levels")
    if _at_work(found) != _at_work(wanted):
        changed.append("set of adapters")
    if without_folders(found.get("edit")) != wanted.get("edit"):
        changed.append("pictures")
    return [_WORDS.get(name, name) for name in changed]


def _decoder(settings: dict[str, Any]) -> Any:
    """The content of the decoder of an image, whatever that is called; None: the model's own."""
    told = settings.get("decoder")
    return told.get("sha256") if isinstance(told, dict) else told


def _at_work(settings: dict[str, Any]) -> Any:
    """What the adapters of an image do, whatever they are called and wherever they come from."""
    told = settings.get("adapters") or []
    if not isinstance(told, list):
        return told
    return [[one.get(key) for key in _EFFECT] if isinstance(one, dict) else one for one in told]
