"""`--sigmas` and `--preset`: the noise levels of a command line."""

from typing import Any

from ..errors import InputError
from .loras import Adapters


def complete(given: dict[str, Any], adapters: Adapters) -> None:
    """Read the `sigmas` that are `given`, and complete them, `steps` and `guidance` with the `preset`, if there is one.

    What that sets is then in `preset`, in words for the user.

    Raises:
        InputError: they are no noise levels, or not one for each step, or no adapter has a preset.
        CheckpointError: an adapter, or the settings beside it, can't be read.
    """
    given["sigmas"] = None if given["sigmas"] is None else _sigmas(given["sigmas"])
    if given["preset"] is not None:
        given["preset"] = _preset(given, adapters)
    steps, sigmas = given["steps"], given["sigmas"]
    if sigmas and steps not in (None, len(sigmas)):
        raise InputError(f"{steps} steps don't go with {len(sigmas)} sigmas; leave out --steps, or give one for each")


def _sigmas(text: str) -> tuple[float, ...]:
    try:
        if not text.isascii() or "_" in text:  # which Python would read
            raise ValueError
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        message = f"--sigmas {text:.80} is no list of noise levels; write 1,0.75,0.5,0.25, say"
        raise InputError(message) from error


def _preset(given: dict[str, Any], adapters: Adapters) -> str:
    """Complete what is `given` with the preset of one of the adapters."""
    option = f"--preset {given['preset']}"
    if not adapters.names:
        raise InputError(f"{option} is of an adapter; give that with --lora")
    found = adapters.presets()
    if not found:
        way = "write sigmas, steps and guidance into a .json file of the same name beside it, or give --sigmas"
        raise InputError(f"nothing is known for {option} of {adapters.names}; {way}")
    if len(found) > 1:
        sources = ", ".join(preset.source for preset in found)
        raise InputError(f"{option} could be that of {sources}; give --steps, --sigmas and --guidance")
    (preset,) = found
    own: dict[str, Any] = {"guidance": preset.guidance}
    if given["sigmas"] is None and given["steps"] in (None, preset.steps):
        own |= {"sigmas": preset.sigmas} if preset.sigmas else {"steps": preset.steps}
    taken = {name: value for name, value in own.items() if given[name] is None and value is not None}
    given |= taken
    words = [f"{name} {','.join(map(str, x)) if isinstance(x, tuple) else x}" for name, x in taken.items()]
    return f"{option}: {' and '.join(words) or 'nothing that is not given'}, from {preset.source}"
