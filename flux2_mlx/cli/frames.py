"""The images that a command line asks for, one by one, from its prompts and options."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import image_names
from ..errors import InputError
from .prompts import Prompt, named

# The options that are about each image.
OPTIONS = (
    "seed", "same_seed", "num_images", "negative_prompt", "output", "width", "height", "steps", "guidance", "sigmas",
    "shift_steps", "strength", "step_cache",
)  # fmt: skip
_OF_A_PROMPT = ("width", "height", "steps", "guidance", "step_cache")
_MAX_IMAGES = 100_000  # of which a run of the pipeline makes some at a time


@dataclass(frozen=True)
class Frame:
    """An image that is asked for, at its `place` among all of them.

    `number` is that of its `prompt`, and `line` says where this is in which file. `negative_prompt` is what is not to
    be seen; None: nothing is said. `settings` are what `Flux2Pipeline.request` takes besides prompts and seeds; None is
    a default of the model or the edit. `template` is the name for the file; None: there is none.
    """

    place: int
    number: int
    prompt: str
    line: str | None
    negative_prompt: str | None
    seed: int
    settings: Mapping[str, Any]
    template: str | None


def frames_of(prompts: Sequence[Prompt], given: Mapping[str, Any]) -> list[Frame]:
    """The images, those of a prompt one after the other; `given` are the `OPTIONS` by name, with seeds in any case.

    There is one seed, from which all images count up, or several, each an image of every prompt.

    Raises:
        InputError: a prompt can't be used, or what it or the command line gives does not go together.
    """
    given = {**given, "num_images": _number(given["seed"], given["num_images"])}
    _check_prompts(prompts, given)
    _check_steps(prompts, given["sigmas"])
    frames: list[Frame] = []
    for number, prompt in enumerate(prompts):
        frames += _of_prompt(prompt, number, len(frames), given)
    _check_seeds(frames)
    return frames


def _number(seeds: tuple[int, ...], given: int | None) -> int:
    """How many images there are of each prompt."""
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise InputError(f"--seed {twice} is given twice, which would be the same image; leave one out")
    if len(seeds) > 1 and given not in (None, len(seeds)):
        raise InputError(f"{len(seeds)} seeds are so many images of a prompt; leave out -n {given}, or give one seed")
    return len(seeds) if given is None else given


def _count(prompt: Prompt, given: Mapping[str, Any]) -> int:
    """How many images there are of a prompt."""
    return given["num_images"] if prompt.images is None else prompt.images


def _check_prompts(prompts: Sequence[Prompt], given: Mapping[str, Any]) -> None:
    """Raise InputError if a prompt can't be used, or there are too many images."""
    from ..request import check_prompt, check_words

    seeds = given["seed"]
    count = sum(_count(prompt, given) for prompt in prompts)
    if not 1 <= count <= _MAX_IMAGES:
        raise InputError(f"the number of images must be 1 to {_MAX_IMAGES:,}, got {count:,}")
    for prompt in prompts:
        with named(prompt.line):
            check_words(prompt.text)
            if prompt.line:  # the limit of the model is told of others
                check_prompt(prompt.text)
                check_prompt(prompt.negative_prompt or "")
            if prompt.output:
                image_names.check(prompt.output)
            if len(seeds) > 1 and prompt.seed is None and prompt.images not in (None, len(seeds)):
                raise InputError(f"{prompt.images} images don't go with {len(seeds)} seeds; give a seed here, or one")


def _check_steps(prompts: Sequence[Prompt], sigmas: Sequence[float] | None) -> None:
    """Raise InputError if a prompt has other steps of its own than there are sigmas."""
    for prompt in prompts:
        with named(prompt.line):
            if sigmas and prompt.steps not in (None, len(sigmas)):
                raise InputError(f"{prompt.steps} steps don't go with {len(sigmas)} sigmas; leave out one of them")


def _of_prompt(prompt: Prompt, number: int, before: int, given: Mapping[str, Any]) -> list[Frame]:
    """The images of a prompt that has so many images before it."""
    negative = given["negative_prompt"] if prompt.negative_prompt is None else prompt.negative_prompt
    settings = _settings(prompt, given)
    template = _template(prompt.output, given["output"])
    return [
        Frame(place, number, prompt.text, prompt.line, negative or None, seed, settings, template)
        for place, seed in enumerate(_seeds(prompt, before, given), before)
    ]


def _seeds(prompt: Prompt, before: int, given: Mapping[str, Any]) -> Sequence[int]:
    """The seeds of the images of a prompt that has so many images before it."""
    seeds = given["seed"]
    if prompt.seed is None and len(seeds) > 1:
        return seeds
    first = seeds[0] + (0 if given["same_seed"] else before) if prompt.seed is None else prompt.seed
    return range(first, first + _count(prompt, given))


def _settings(prompt: Prompt, given: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt's own settings, or else those that are given.

    `sigmas` are shifted as for `shift_steps`; None: for their number.
    """
    own = {name: getattr(prompt, name) for name in _OF_A_PROMPT}
    settings = {name: given[name] if value is None else value for name, value in own.items()}
    if given["sigmas"]:
        settings |= {"sigmas": given["sigmas"], "steps": given["shift_steps"] or len(given["sigmas"])}
    return settings | {"strength": given["strength"]}


def _template(own: str | None, output: str | None) -> str | None:
    """The name for a prompt's images: its own, in the folder that -o may give, or else that of -o."""
    if own is None or output is None:
        return own or output
    is_folder = output.endswith("/") or os.path.isdir(output)
    return os.path.join(output if is_folder else os.path.dirname(output), own)


def _check_seeds(frames: Sequence[Frame]) -> None:
    from ..request import MAX_SEED

    for frame in frames:
        with named(frame.line):
            if not 0 <= frame.seed <= MAX_SEED:
                raise InputError(f"seeds must be 0 to {MAX_SEED}, got {frame.seed}")
