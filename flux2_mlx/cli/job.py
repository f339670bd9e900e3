"""What a command line that makes images asks for, after defaults and --replay."""

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import image_names
from ..config import check_quant
from ..errors import InputError
from . import replay, schedule
from .loras import Lora
from .loras import read as read_loras
from .loras import remembered as remembered_loras
from .options import DEFAULT_MODEL
from .pictures import Pictures
from .prompts import Prompt, read_prompt, read_prompts
from .replay import remembered as read_image

if TYPE_CHECKING:
    from ..store import Model

_SETTINGS = ("width", "height", "steps", "guidance")
_MAX_IMAGES = 100_000  # of which a run of the pipeline makes some at a time


@dataclass(frozen=True)
class Frame:
    """An image that is asked for: that of a `seed`, and of the prompt with this `number`."""

    prompt: Prompt
    number: int
    seed: int


@dataclass(frozen=True)
class Job:
    """Settings of a run; None is the variant's default. Build it with `Job.of`.

    There is one seed, from which all images count up, or several, each an image of every prompt. `listed` is whether
    the prompts are those of a file. `resolved` is what `model` means, and `label` what images say of it. `rewritten`
    are the prompts and `fingerprint` the weights that a `replayed` image, which comes with its settings, was made from.
    `preset` says what an adapter's preset has set. `sigmas` are shifted as for `shift_steps`; None: for their number.
    """

    prompts: list[Prompt]
    listed: bool
    model: str
    resolved: "Model"
    label: str
    variant: str | None
    quant: str | None
    text_quant: str | None
    dtype: str | None
    width: int | None
    height: int | None
    steps: int | None
    guidance: float | None
    negative_prompt: str | None
    seed: tuple[int, ...]
    same_seed: bool
    num_images: int
    output: str | None
    metadata: bool
    checkpoint: int | None
    models_dir: Path | None
    keep_source: bool
    no_cache: bool
    memory_limit: str | None
    upsample_prompt: bool
    interpret: tuple[Path, ...]
    vision_model: str
    quiet: bool
    force: bool
    skip_existing: bool
    pictures: Pictures
    loras: tuple[Lora, ...] = ()
    preset: str | None = None
    sigmas: tuple[float, ...] | None = None
    shift_steps: int | None = None
    rewritten: list[str] | None = None
    fingerprint: str | None = None
    replayed: tuple[Path, dict[str, Any]] | None = None

    @cached_property
    def frames(self) -> list[Frame]:
        """The images, those of a prompt one after the other."""
        frames: list[Frame] = []
        for number, prompt in enumerate(self.prompts):
            frames += [Frame(prompt, number, seed) for seed in self._seeds(prompt, len(frames))]
        return frames

    def _seeds(self, prompt: Prompt, before: int) -> Sequence[int]:
        """The seeds of the images of a prompt that has so many images before it."""
        if prompt.seed is None and len(self.seed) > 1:
            return self.seed
        first = self.seed[0] + (0 if self.same_seed else before) if prompt.seed is None else prompt.seed
        return range(first, first + _count(prompt, self.num_images))

    def settings(self, prompt: Prompt) -> dict[str, Any]:
        """What a run for `prompt` is asked for besides prompts and seeds: the prompt's own settings, or else the job's.

        An image that is painted over has a size of its own.
        """
        own = {name: getattr(prompt, name) for name in _SETTINGS}
        settings = {name: getattr(self, name) if value is None else value for name, value in own.items()}
        if self.sigmas:
            settings |= {"sigmas": self.sigmas, "steps": self.shift_steps or len(self.sigmas)}
        return settings | {"strength": self.pictures.strength}

    @property
    def takes_several_runs(self) -> bool:
        """Whether settings differ from prompt to prompt."""
        return len({tuple(self.settings(prompt).values()) for prompt in self.prompts}) > 1

    def negative(self, prompt: Prompt) -> str | None:
        """What is not to be seen in the images of a prompt; None: nothing is said."""
        own = prompt.negative_prompt
        return (self.negative_prompt if own is None else own) or None

    def paths(self, values: Sequence[dict[str, Any]]) -> list[Path]:
        """The file of each image, given `width`, `height` and `steps` of each."""
        digits = len(str(len(self.frames)))
        known = [
            {name: str(value) for name, value in own.items()}
            | {"seed": str(frame.seed), "prompt": image_names.slug(frame.prompt.text), "index": f"{index:0{digits}}"}
            | {"model": image_names.model_name(self.model)}
            for index, (frame, own) in enumerate(zip(self.frames, values, strict=True), 1)
        ]
        templates = [self._template(frame.prompt) for frame in self.frames]
        return image_names.paths(templates, known, listed=self.listed, keep=self.force or self.skip_existing)

    def _template(self, prompt: Prompt) -> str | None:
        """The name for a prompt: its own, in the folder that -o may give, or else that of -o."""
        if prompt.output is None or self.output is None:
            return prompt.output or self.output
        is_folder = self.output.endswith("/") or os.path.isdir(self.output)
        return os.path.join(self.output if is_folder else os.path.dirname(self.output), prompt.output)

    def checkpoint_path(self, path: Path, step: int) -> Path:
        """The file of the image after `step` steps."""
        return path.with_name(f"{path.stem}-step-{step:03}{path.suffix}")

    @classmethod
    def of(cls, prompt: str | None, *, replay: Path | None, prompts_file: str | None, **given: Any) -> "Job":
        """The job of a command line; `given` are its options by name, and its `pictures`."""
        if prompts_file is not None and prompt is not None:
            raise click.UsageError("give either PROMPT or --prompts-file")
        if prompts_file is None and prompt is None and replay is None:
            raise click.UsageError("give a PROMPT, --prompts-file or --replay")
        if given["force"] and given["skip_existing"]:
            raise click.UsageError("--skip-existing leaves what --force would replace; give one of them")
        is_named = given["model"] is not None
        remembered = {} if replay is None else read_image(replay)
        given["loras"] = read_loras(given.pop("lora"), given.pop("lora_steps"))
        if replay is not None:
            told = remembered.get("adapters")
            given["loras"] = remembered_loras(told, replay, given["models_dir"], given["loras"])
        schedule.complete(given, given["loras"])
        given["shift_steps"] = None
        if replay is not None:
            _take_over(given, replay, remembered)
        given["model"] = DEFAULT_MODEL if given["model"] is None else given["model"]
        _check_weights(given)
        given |= _resolved(given, None if is_named else replay)
        if prompts_file is not None:
            prompts = read_prompts(prompts_file)
        else:
            words = remembered["prompt"] if prompt is None else read_prompt("-") if prompt == "-" else prompt
            prompts = [Prompt(words)]
        # A replayed prompt was rewritten already; rewriting it again need not give the same words.
        again = remembered.get("upsampled_prompt") if _texts(prompts) == [remembered.get("prompt")] else None
        asked = given["interpret"] or given["upsample_prompt"]
        given["rewritten"] = [again] if again is not None and not asked else None
        given["seed"] = given["seed"] or (secrets.randbelow(2**32),)
        given["num_images"] = _number(given["seed"], given["num_images"])
        _check_prompts(prompts, given["seed"], given["num_images"])
        schedule.check_steps(prompts, given["sigmas"])
        job = cls(prompts=prompts, listed=prompts_file is not None, **given)
        _check_seeds(job.frames)
        return job


def _take_over(given: dict[str, Any], image: Path, remembered: dict[str, Any]) -> None:
    """Complete what is `given` with what `image` remembers."""
    own = dict(remembered)
    if given["model"] is not None:
        own |= {"variant": None, "fingerprint": None}  # those of the other model
    if remembered.get("edit") is not None:
        given["pictures"] = given["pictures"].completed(remembered["edit"], image)
    if given["pictures"].keep_size:
        own |= {"width": None, "height": None}
    if given["sigmas"] or given["steps"] not in (None, own["steps"]):
        own |= {"steps": None, "sigmas": None, "shift_steps": None}
    own["seed"] = (own["seed"],)
    given |= {key: own.get(key) for key in replay.SETTINGS if given[key] in (None, ())}
    given["sigmas"] = given["sigmas"] and tuple(given["sigmas"])
    given["fingerprint"] = own.get("fingerprint")
    given["replayed"] = image, remembered


def _texts(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def _count(prompt: Prompt, num_images: int) -> int:
    return num_images if prompt.images is None else prompt.images


def _number(seeds: tuple[int, ...], given: int | None) -> int:
    """How many images there are of each prompt."""
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise InputError(f"--seed {twice} is given twice, which would be the same image; leave one out")
    if len(seeds) > 1 and given not in (None, len(seeds)):
        raise InputError(f"{len(seeds)} seeds are so many images of a prompt; leave out -n {given}, or give one seed")
    return len(seeds) if given is None else given


def _check_prompts(prompts: Sequence[Prompt], seeds: tuple[int, ...], num_images: int) -> None:
    """Raise InputError if a prompt can't be used, or there are too many images."""
    from ..request import check_prompt, check_words

    count = sum(_count(prompt, num_images) for prompt in prompts)
    if not 1 <= count <= _MAX_IMAGES:
        raise InputError(f"the number of images must be 1 to {_MAX_IMAGES:,}, got {count:,}")
    for prompt in prompts:
        with prompt.named():
            check_words(prompt.text)
            if prompt.line:  # the limit of the model is told of others
                check_prompt(prompt.text)
                check_prompt(prompt.negative_prompt or "")
            if prompt.output:
                image_names.check(prompt.output)
            if len(seeds) > 1 and prompt.seed is None and prompt.images not in (None, len(seeds)):
                raise InputError(f"{prompt.images} images don't go with {len(seeds)} seeds; give a seed here, or one")


def _check_seeds(frames: Sequence[Frame]) -> None:
    from ..request import MAX_SEED

    for frame in frames:
        with frame.prompt.named():
            if not 0 <= frame.seed <= MAX_SEED:
                raise InputError(f"seeds must be 0 to {MAX_SEED}, got {frame.seed}")


def _check_weights(given: dict[str, Any]) -> None:
    """Raise InputError if the weights can't be used."""
    from ..store import checked_variant

    for name, check in (("variant", checked_variant), ("quant", check_quant), ("text_quant", check_quant)):
        if given[name] is not None:
            check(given[name])


def _resolved(given: dict[str, Any], source: Path | None) -> dict[str, Any]:
    """What the model's name means, and what images say of it; `source` is the image that names it, if one does."""
    from ..store import resolve

    if source is None:
        model = resolve(given["model"], given["models_dir"])
        return {"resolved": model, "label": replay.label(model)}
    weights = {name: given[name] for name in ("variant", "quant", "text_quant", "models_dir")}
    found = replay.find_model(given["model"], given["fingerprint"], source, **weights)
    return {"resolved": found, "label": replay.without_folder(given["model"])}
