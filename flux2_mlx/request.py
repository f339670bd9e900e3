"""What is asked of a run, checked, and what is heard of it meanwhile."""

import math
import operator
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from PIL import Image

from .components import label
from .config import VARIANTS, Variant
from .errors import InputError, SettingError
from .scheduler import check_sigmas

# Limits that no sensible run meets, so that a slip of the pen is told at once: 16 times the pixels and 20 times the
# steps that models are made for, a thousand images, and 5 times the characters of the 512 tokens that a model reads.
MAX_PIXELS = 4096 * 4096
MAX_STEPS = 1000
MAX_IMAGES = 1000
MAX_ADAPTERS = 100  # at work at one time
MAX_CHARACTERS = 10_000
MAX_SEED = 2**64 - 1
# Steps of models that are made for fewer are too far apart to be alike: TeaCache skips none of klein's 4 to 8, as those
# who have ported it to MLX measured (mlx-teacache on PyPI).
_CACHED_STEPS = 8
_SHIFT_STEPS = 50  # the default of diffusers' pipelines, whose shift of given sigmas follows from it


@dataclass(frozen=True)
class Request:
    """The settings of one run. Build it with `Request.checked`; one that is built by hand is checked when it is run.

    There is one seed for each image; the images of a prompt are neighbours. `negative_prompts` has one for each prompt
    where classifier-free guidance steers away from them, and is empty elsewhere. `shift_steps` is the number of steps
    that the shift of given `sigmas` is worked out for. A pass of the transformer skips all blocks but the first, if
    what this adds has changed by at most the share `step_cache`; 0: none does.
    """

    prompts: tuple[str, ...]
    height: int
    width: int
    steps: int
    guidance: float
    seeds: tuple[int, ...]
    max_sequence_length: int
    sigmas: tuple[float, ...] | None = None
    strength: float = 1.0
    shift_steps: int | None = None
    negative_prompts: tuple[str, ...] = ()
    step_cache: float = 0.0

    @classmethod
    def checked(
        cls,
        variant: Variant,
        token_size: int,
        prompts: Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | Sequence[int] | None = None,
        images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        sigmas: Sequence[float] | None = None,
        strength: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        step_cache: float | None = None,
    ) -> "Request":
        """Fill in the variant's defaults and check every setting; InputError says which one is wrong.

        With `sigmas`, `steps` is only what the shift is worked out for, by default 50, as in diffusers.
        `seed` is that of the first image, image k has seed + k; or there is a list with the seed of each image.
        `negative_prompt` is one for all prompts or one for each; None: empty ones. Like all of guidance it has no
        effect up to a guidance of 1.
        """
        height = _integer("height", height, variant.size)
        width = _integer("width", width, variant.size)
        steps = None if steps is None else _integer("steps", steps)
        images_per_prompt = _integer("images_per_prompt", images_per_prompt)
        max_sequence_length = _integer("max_sequence_length", max_sequence_length, variant.max_sequence_length)
        guidance = _number("guidance", guidance, variant.guidance)
        strength = _number("strength", strength, 1.0)
        levels = None
        shift_steps = None
        if sigmas is not None:
            levels = _sigmas(sigmas)
            _require(strength == 1, f"sigmas don't go with a strength of {strength}; leave out one of them")
            shift_steps = _SHIFT_STEPS if steps is None else steps
            _check_steps(shift_steps)
            steps = len(levels)
        request = cls(
            tuple(prompts),
            height,
            width,
            variant.steps if steps is None else steps,
            guidance,
            _seeds(seed, _count(prompts, images_per_prompt)),
            max_sequence_length,
            levels,
            strength,
            shift_steps,
            _negative_prompts(variant, negative_prompt, len(prompts)),
            _number("step_cache", step_cache, 0.0),
        )
        if not request.guidance > 1:
            request = replace(request, negative_prompts=())
        request.check(variant, token_size)
        return request

    def check(self, variant: Variant, token_size: int) -> None:
        """Raise InputError if these can't be the settings of a run of `variant`, with tokens of so many pixels."""
        for name in ("height", "width", "steps", "max_sequence_length"):
            _integer(name, getattr(self, name))
        for name in ("guidance", "strength", "step_cache"):
            _number(name, getattr(self, name))
        self._check_size(token_size)
        self._check_schedule()
        self._check_step_cache(variant)
        limit = variant.max_sequence_length
        length = self.max_sequence_length
        _require_of("max_sequence_length", 1 <= length <= limit, f"must be 1 to {limit}, got {length}")
        self._check_texts(variant)
        _require(
            len(self.seeds) > 0 and len(self.seeds) % len(self.prompts) == 0,
            f"{len(self.seeds)} seeds don't go with {len(self.prompts)} prompts; give one for each image",
        )
        _check_images(len(self.seeds))
        _check_seeds(self.seeds)

    def _check_size(self, token_size: int) -> None:
        for name, side in (("height", self.height), ("width", self.width)):
            _require(
                side > 0 and side % token_size == 0,
                f"{name} {side} must be a positive multiple of {token_size}; {_nearest(side, token_size)}",
            )
        _require(
            self.height * self.width <= MAX_PIXELS,
            f"size {self.width}×{self.height} is too large; the limit is {MAX_PIXELS} pixels, such as 4096×4096",
        )

    def _check_schedule(self) -> None:
        guidance, strength = self.guidance, self.strength
        _check_steps(self.steps)
        is_scale = math.isfinite(guidance) and guidance >= 0
        _require_of("guidance", is_scale, f"must be a number of 0 or more, got {guidance}")
        _require_of("strength", 0 < strength <= 1, f"must be above 0 and at most 1, got {strength}")
        _require(
            self.schedule_steps <= MAX_STEPS,
            f"{self.steps} steps at strength {self.strength} are the end of a schedule of more than {MAX_STEPS}; "
            "raise the strength or take fewer steps",
        )
        if self.sigmas is not None:
            check_sigmas(_sigmas(self.sigmas))
            count = len(self.sigmas)
            _require(count == self.steps, f"{count} sigmas don't go with {self.steps} steps; give one for each step")
            _check_steps(_integer("shift_steps", self.shift_steps))

    def _check_step_cache(self, variant: Variant) -> None:
        threshold = self.step_cache
        is_change = math.isfinite(threshold) and threshold >= 0
        _require_of("step_cache", is_change, f"must be a number of 0 or more, got {threshold}")
        if threshold and variant.steps < _CACHED_STEPS:
            others = ", ".join(name for name, row in VARIANTS.items() if row.steps >= _CACHED_STEPS)
            raise InputError(
                f"{variant.name} is distilled to {variant.steps} steps, which differ too much for a step cache to skip "
                f"any; leave it out, or choose one of {others}"
            )

    def _check_texts(self, variant: Variant) -> None:
        _require(len(self.prompts) > 0, "there is no prompt")
        for prompt in (*self.prompts, *self.negative_prompts):
            _require(isinstance(prompt, str), f"a prompt must be text, got {type(prompt).__name__}")
            check_prompt(prompt, self.max_sequence_length)
        needed = len(self.prompts) if variant.uses_cfg and self.guidance > 1 else 0
        given = len(self.negative_prompts)
        _require(given == needed, f"{given} negative prompts don't go with {len(self.prompts)} prompts; give {needed}")

    @property
    def passes_a_step(self) -> int:
        """Passes through the transformer that an image takes at every step."""
        return 2 if self.negative_prompts else 1

    @property
    def images_per_prompt(self) -> int:
        return len(self.seeds) // len(self.prompts)

    def only(self, images: Sequence[int]) -> "Request":
        """The settings of a run that makes some of the images, in this order."""
        numbers = [image // self.images_per_prompt for image in images]
        prompts = tuple(self.prompts[number] for number in numbers)
        negatives = tuple(self.negative_prompts[number] for number in numbers if self.negative_prompts)
        seeds = tuple(self.seeds[image] for image in images)
        return replace(self, prompts=prompts, negative_prompts=negatives, seeds=seeds)

    def rewritten(self, prompts: Sequence[str]) -> "Request":
        """The settings of a run that differs in its prompts, as many as there are."""
        for prompt in prompts:
            check_prompt(prompt, self.max_sequence_length)
        return replace(self, prompts=tuple(prompts))

    @property
    def schedule_steps(self) -> int:
        """Steps of the whole schedule, of which the last `steps` are taken: those that `strength` leaves."""
        # The longest of which diffusers, too, takes `steps`: of N it leaves out int(N − N·strength).
        length = self.steps
        while length <= MAX_STEPS and length + 1 - int(length + 1 - (length + 1) * self.strength) <= self.steps:
            length += 1
        return length


def _nearest(side: int, token_size: int) -> str:
    """What to say of the multiples of a token that are next to `side`."""
    below = side // token_size * token_size
    return f"nearest are {below} and {below + token_size}" if below > 0 else f"the smallest is {token_size}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _require_of(setting: str, condition: bool, reason: str) -> None:
    if not condition:
        raise SettingError(f"{setting} {reason}")


def _count(prompts: Sequence[str], images_per_prompt: int) -> int:
    """How many images there are; InputError if those are none or too many."""
    _require(len(prompts) > 0, "there is no prompt")
    _require_of("images_per_prompt", images_per_prompt > 0, f"must be 1 or more, got {images_per_prompt}")
    count = len(prompts) * images_per_prompt
    _check_images(count)
    return count


def _check_images(images: int) -> None:
    _require(images <= MAX_IMAGES, f"{images} images are too many; make at most {MAX_IMAGES} at a time")


def _check_steps(steps: int) -> None:
    _require_of("steps", 1 <= steps <= MAX_STEPS, f"must be 1 to {MAX_STEPS}, got {steps}")


def _sigmas(given: Any) -> tuple[float, ...]:
    """Noise levels of any type, at least one."""
    is_list = isinstance(given, Iterable) and getattr(given, "ndim", 1) == 1
    _require_of("sigmas", is_list, f"must be a list of numbers, got {given!r:.40}")
    levels = tuple(math.nan if sigma is None else _number("sigmas", sigma) for sigma in given)
    _require(len(levels) > 0, "there are no sigmas; give one for each step")
    return levels


def _integer(name: str, value: Any, default: int | None = None) -> int:
    """A whole number of any type; None is the default if there is one."""
    if value is None and default is not None:
        return default
    given: Any = None if isinstance(value, bool) else value
    try:
        return operator.index(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"{name} must be a whole number, got {value!r:.40}") from error


def _number(name: str, value: Any, default: float | None = None) -> float:
    """A number of any type; None is the default if there is one."""
    if value is None and default is not None:
        return default
    given: Any = None if isinstance(value, str | bytes | bool) else value
    try:
        return float(given)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise SettingError(f"{name} must be a number, got {value!r:.40}") from error


def check_guided(variant: Variant, setting: str) -> None:
    """Raise InputError if `variant` has no classifier-free guidance, without which a negative prompt has no effect."""
    if not variant.uses_cfg:
        guided = ", ".join(name for name, row in VARIANTS.items() if row.uses_cfg)
        raise InputError(f"{variant.name} has no use for a {setting}; leave it out, or choose one of {guided}")


def _negative_prompts(variant: Variant, given: str | Sequence[str] | None, count: int) -> tuple[str, ...]:
    """One for each of `count` prompts; none for a variant that has no use for them."""
    if given is not None and not isinstance(given, str | Sequence):
        raise InputError(f"negative_prompt must be text or a list of texts, got {type(given).__name__}")
    negatives = (given or "",) * count if given is None or isinstance(given, str) else tuple(given)
    for prompt in negatives:
        _require(isinstance(prompt, str), f"a negative prompt must be text, got {type(prompt).__name__}")
    if any(negatives):  # scripts give an empty one to any model
        check_guided(variant, "negative prompt")
    _require(len(negatives) == count, f"{len(negatives)} negative prompts don't go with {count} prompts; give one each")
    return negatives if variant.uses_cfg else ()


def _seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    if isinstance(seed, list | tuple | range):
        seeds = tuple(-1 if one is None else _integer("seed", one) for one in seed)
        _require(len(seeds) == count, f"{len(seeds)} seeds don't go with {count} images; give one for each image")
    else:
        first = secrets.randbelow(2**32) if seed is None else _integer("seed", seed)
        seeds = tuple(range(first, first + count))
    return seeds


def _check_seeds(seeds: Iterable[Any]) -> None:
    wrong = next((one for one in seeds if not 0 <= _integer("seed", one) <= MAX_SEED), None)
    _require(wrong is None, f"seeds must be 0 to {MAX_SEED}, got {wrong}")


def check_count(adapters: int) -> None:
    """Raise InputError if so many adapters are too many to be at work at one time."""
    _require(
        adapters <= MAX_ADAPTERS, f"{adapters} adapters are too many; at most {MAX_ADAPTERS} can be at work at once"
    )


def check_prompt(prompt: str, tokens: int | None = None) -> None:
    """Raise InputError if `prompt` can't be read: too long, or no text. A model reads its first `tokens`; None: all."""
    if len(prompt) > MAX_CHARACTERS:
        read = "" if tokens is None else f", and the model reads its first {tokens} tokens"
        raise InputError(f"a prompt of {len(prompt)} characters is too long; the limit is {MAX_CHARACTERS}{read}")
    # Lone surrogates stand for undecodable bytes of a command line.
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InputError(f"the prompt is not valid text: {prompt[:80]!a}")


def check_words(prompt: str) -> None:
    """Raise InputError if there is nothing to read in `prompt`."""
    if not prompt.strip():
        raise InputError("the prompt is empty; describe the image in words")


@dataclass(frozen=True)
class Step:
    """The state after a denoising step from noise level `from_sigma` to `sigma`: `tokens` `[B, L, C]`, float32, and
    `estimate`, the noise-free tokens that the last velocity points to."""

    number: int
    from_sigma: float
    sigma: float
    tokens: mx.array
    estimate: mx.array


Preview = Callable[[], list[Image.Image]]  # makes an image for each one of a pass


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of a phase.

    After a denoising step `step` is set, and `preview` makes an image of its estimate for each one of the pass where
    that was planned for; `sketch` makes rough ones of an eighth of the size, which take neither memory nor time, where
    the model's latents are known. When an image is finished, `image` is set. `images` are the places that it is about
    among the images of the run.
    """

    phase: str
    done: int
    total: int
    step: Step | None = None
    images: Sequence[int] = ()
    image: Image.Image | None = None
    preview: Preview | None = None
    sketch: Preview | None = None

    @property
    def label(self) -> str:
        """What a user is told of the phase."""
        return label(self.phase)


OnProgress = Callable[[Progress], mx.array | None]
