"""What is sampled, and the denoising loop."""

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from .config import Variant
from .errors import InputError
from .scheduler import euler_step
from .transformer import Flux2Transformer

MAX_PIXELS = 4096 * 4096
MAX_STEPS = 1000
MAX_IMAGES = 1000
MAX_PROMPT_CHARACTERS = 10_000
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Request:
    """The settings of one run, checked. Build it with `Request.checked`.

    There is one seed for each image; the images of a prompt are neighbours.
    """

    prompts: tuple[str, ...]
    height: int
    width: int
    steps: int
    guidance: float
    seeds: tuple[int, ...]
    max_sequence_length: int
    sigmas: tuple[float, ...] | None = None

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
        seed: int | None = None,
        images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> "Request":
        """Fill in the variant's defaults and check every setting; InputError says which one is wrong."""
        if sigmas is not None:
            sigmas = tuple(float(sigma) for sigma in sigmas)
            _require(steps in (None, len(sigmas)), f"{len(sigmas)} sigmas don't go with {steps} steps")
            steps = len(sigmas)
        count = len(prompts) * images_per_prompt
        _require(len(prompts) > 0, "there is no prompt")
        _require(0 < count <= MAX_IMAGES, f"the number of images must be 1 to {MAX_IMAGES}, got {count}")
        request = cls(
            tuple(prompts),
            variant.size if height is None else height,
            variant.size if width is None else width,
            variant.steps if steps is None else steps,
            variant.guidance if guidance is None else guidance,
            _seeds(seed, count),
            variant.max_sequence_length if max_sequence_length is None else max_sequence_length,
            sigmas,
        )
        request._check(variant, token_size)
        return request

    def _check(self, variant: Variant, token_size: int) -> None:
        for name, side in (("height", self.height), ("width", self.width)):
            _require(side > 0 and side % token_size == 0, f"{name} {side} must be a positive multiple of {token_size}")
        _require(
            self.height * self.width <= MAX_PIXELS,
            f"size {self.width}×{self.height} is too large; the limit is {MAX_PIXELS} pixels, such as 4096×4096",
        )
        _require(1 <= self.steps <= MAX_STEPS, f"steps must be 1 to {MAX_STEPS}, got {self.steps}")
        _require(
            math.isfinite(self.guidance) and self.guidance >= 0,
            f"guidance must be a number of 0 or more, got {self.guidance}",
        )
        for prompt in self.prompts:
            _require(
                len(prompt) <= MAX_PROMPT_CHARACTERS,
                f"a prompt of {len(prompt)} characters is too long; the limit is {MAX_PROMPT_CHARACTERS}, and the "
                f"model reads its first {self.max_sequence_length} tokens",
            )
            _require(_is_text(prompt), f"the prompt is not valid text: {prompt[:80]!a}")
        limit = variant.max_sequence_length
        _require(
            1 <= self.max_sequence_length <= limit,
            f"max_sequence_length must be 1 to {limit}, got {self.max_sequence_length}",
        )
        if self.sigmas is not None:
            descending = all(a > b for a, b in pairwise((*self.sigmas, 0.0)))
            _require(self.sigmas[0] <= 1 and descending, f"sigmas must fall from at most 1 to above 0: {self.sigmas}")

    @property
    def images_per_prompt(self) -> int:
        return len(self.seeds) // len(self.prompts)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _is_text(prompt: str) -> bool:
    """Whether `prompt` has no lone surrogates, which stand for undecodable bytes of a command line."""
    return not any("\ud800" <= character <= "\udfff" for character in prompt)


def _seeds(seed: int | None, count: int) -> tuple[int, ...]:
    first = secrets.randbelow(2**32) if seed is None else seed
    last = first + count - 1
    _require(first >= 0 and last <= MAX_SEED, f"seeds must be 0 to {MAX_SEED}, got {first if first < 0 else last}")
    return tuple(range(first, first + count))


@dataclass(frozen=True)
class Conditioning:
    """What stays the same at every step. `text` and `negative_text` went through `txt_in`."""

    text: mx.array
    rope: mx.array
    negative_text: mx.array | None = None
    guidance: float = 1.0
    embeds_guidance: bool = False


@dataclass(frozen=True)
class Step:
    """The state after a denoising step from noise level `from_sigma` to `sigma`: `tokens` `[B, L, C]`, float32, and
    `estimate`, the noise-free tokens that the last velocity points to."""

    number: int
    from_sigma: float
    sigma: float
    tokens: mx.array
    estimate: mx.array


def denoise(
    transformer: Flux2Transformer, tokens: mx.array, conditioning: Conditioning, sigmas: np.ndarray, dtype: mx.Dtype
) -> Iterator[Step]:
    """Integrate from noise to an image, yielding after every step.

    Args:
        transformer: predicts the velocity.
        tokens: noise, float32 `[B, L, C]`.
        conditioning: text, positions and guidance.
        sigmas: noise levels with the final 0, `[steps + 1]`.
        dtype: what the transformer computes in; the tokens stay in float32.

    A caller may `send` tokens to go on from instead of the ones that were yielded.
    """
    for number, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist()), 1):
        velocity = _velocity(transformer, tokens.astype(dtype), conditioning, sigma)
        estimate = euler_step(tokens, velocity, sigma, 0.0)
        tokens = euler_step(tokens, velocity, sigma, next_sigma)
        mx.eval(tokens)
        replaced = yield Step(number, sigma, next_sigma, tokens, estimate)
        tokens = tokens if replaced is None else replaced


def _velocity(transformer: Flux2Transformer, tokens: mx.array, conditioning: Conditioning, sigma: float) -> mx.array:
    timestep = mx.array([sigma])
    guidance = mx.array([conditioning.guidance]) if conditioning.embeds_guidance else None
    velocity = transformer(tokens, conditioning.text, timestep, conditioning.rope, guidance)
    if conditioning.negative_text is None:
        return velocity
    # Two passes and not one of twice the batch: matrix products fill the device either way, and this halves the peak.
    mx.eval(velocity)
    negative = transformer(tokens, conditioning.negative_text, timestep, conditioning.rope, guidance)
    return negative + conditioning.guidance * (velocity - negative)
