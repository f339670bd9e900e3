"""Settings that an adapter is made to be run with, such as those of few steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.json_files import read_json
from flux2_mlx.scheduler import check_sigmas

_NAMES = {"sigmas": "sigmas", "steps": "steps", "num_inference_steps": "steps"}
_NAMES |= {"guidance": "guidance", "guidance_scale": "guidance"}
_MOST = 1000  # steps, and guidance


@dataclass(frozen=True)
class Preset:
    """What is said of an adapter's runs; None: nothing.

    Attributes:
        source: who says it.
        sigmas: noise levels before the shift, one a step.
        steps: how many; those of `sigmas` if there are any.
        guidance: its scale.
    """

    source: str
    sigmas: tuple[float, ...] | None = None
    steps: int | None = None
    guidance: float | None = None

    def __str__(self) -> str:
        guidance = "" if self.guidance is None else f"a guidance of {self.guidance:g}"
        return " and ".join(filter(None, (f"{self.steps} steps" * (self.steps is not None), guidance)))


_TURBO = Preset(
    "the model card of fal/FLUX.2-dev-Turbo",
    sigmas=(1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031),
    steps=8,
    guidance=2.5,
)
# By the names of files in lower case, or what these call themselves: in the releaser's repo, in its folder for ComfyUI,
# and in others' copies of that.
_CARDS = dict.fromkeys(
    ("flux.2-turbo-lora.safetensors", "flux_2-turbo-lora_comfyui.safetensors", "flux2turbocomfyv2.safetensors"), _TURBO
)


def preset(path: Path, title: str | None = None) -> Preset | None:
    """What the JSON file of the same name beside an adapter's file says, or else its model card; None: neither does.
    The card is known by the file's name, or by the `title` that the file gives itself.

    The JSON file holds an object with `sigmas`, `steps` and `guidance`, or some of these, or with the names that these
    have in diffusers. All else in it is left alone.

    Raises:
        CheckpointError: the file can't be read, or what it says is no such setting.
    """
    beside = path.with_suffix(".json")
    said = read_json(beside, unique=True) if beside.is_file() else {}
    names = [key for key in said if key in _NAMES and said[key] is not None]
    if not names:
        return _CARDS.get(path.name.lower()) or _CARDS.get(f"{title}.safetensors".lower())
    try:
        for name, other in combinations(names, 2):
            if _NAMES[name] == _NAMES[other] and said[name] != said[other]:
                raise InputError(f"{name} {said[name]!r:.40} and {other} {said[other]!r:.40} disagree; leave out one")
        return _checked(beside.name, {_NAMES[name]: said[name] for name in names})
    except InputError as error:
        raise CheckpointError(f"{beside}: {error}") from error


def _checked(source: str, said: Mapping[str, Any]) -> Preset:
    """InputError says which setting is none."""
    sigmas, steps, guidance = (said.get(name) for name in ("sigmas", "steps", "guidance"))
    if sigmas is not None:
        if not isinstance(sigmas, list) or not sigmas or not all(type(x) in (int, float) for x in sigmas):
            raise InputError(f"sigmas must be a list of numbers, got {sigmas!r:.40}")
        check_sigmas(sigmas)
        if steps not in (None, len(sigmas)):
            raise InputError(f"there are {len(sigmas)} sigmas for {steps!r:.40} steps; give one for each step")
        steps = len(sigmas)
    if steps is not None and not (type(steps) is int and 1 <= steps <= _MOST):
        raise InputError(f"steps must be 1 to {_MOST}, got {steps!r:.40}")
    if guidance is not None and not (type(guidance) in (int, float) and 0 <= guidance <= _MOST):
        raise InputError(f"guidance must be a number from 0 to {_MOST}, got {guidance!r:.40}")
    return Preset(source, sigmas and tuple(map(float, sigmas)), steps, guidance)
