"""Denoisers, and the denoising loop, which knows nothing else of what it integrates."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import InputError
from .layers import check_finite
from .request import Step
from .scheduler import euler_step
from .step_cache import Pass
from .transformer import PLAIN, Execution, Flux2Transformer, KeysValues, rope_table, text_ids

# Gives the velocity `[B, L, C]` of float32 tokens `[B, L, C]` at a noise level σ in 0..1.
Denoiser = Callable[[mx.array, float], mx.array]
# Gives what float32 tokens `[B, L, C]` of a noise level become after a step.
Correction = Callable[[mx.array, float], mx.array]


@dataclass(frozen=True)
class References:
    """Pictures that the model sees: their `tokens`, float32 `[1, Lr, C]`, at positions `ids` `[Lr, 4]`."""

    tokens: mx.array
    ids: np.ndarray


class Conditions:
    """What no step of a run changes, worked out once: projected texts and rotations.

    Args:
        transformer: the network.
        dtype: what it computes in.
        ids: positions `[L, 4]` of the tokens of an image.
        texts: states `[Lt, F]` of all prompts of the run, negative ones included; the same array may come repeatedly.
        guidance: the embedded scale `[1]`; only for models that were trained with one.
        past: keys and values that all tokens see besides (see `read`).
        along: positions of tokens that go along with them (see `beside`), which get no velocity.
        execution: how it is computed.
        cached: gives each denoiser the transformer with a step cache of its own.
    """

    def __init__(
        self,
        transformer: Flux2Transformer,
        dtype: mx.Dtype,
        ids: np.ndarray,
        texts: Sequence[mx.array],
        *,
        guidance: mx.array | None = None,
        past: list[KeysValues] | None = None,
        along: np.ndarray | None = None,
        execution: Execution = PLAIN,
        cached: Callable[[Flux2Transformer], Pass] = lambda transformer: transformer,
    ):
        self._dtype = dtype
        self._guidance = guidance
        self._past = past
        self._cached = partial(cached, transformer)
        self._image = len(ids)
        self._execution = execution
        seen = ids if along is None else np.concatenate([ids, along])
        distinct = {id(states): states for states in texts}
        self._projected = {key: transformer.txt_in(states) for key, states in distinct.items()}
        lengths = {len(states) for states in texts}
        self._ropes = {n: rope_table(np.concatenate([text_ids(n), seen]), transformer.config) for n in lengths}

    def denoiser(self, texts: Sequence[mx.array]) -> Denoiser:
        """The denoiser of images with these `texts`, which have one length."""
        states = mx.stack([self._projected[id(text)] for text in texts])
        rope = self._ropes[len(texts[0])]
        step = partial(self._cached(), image=self._image, execution=self._execution)

        def velocity(tokens: mx.array, sigma: float) -> mx.array:
            tokens = tokens.astype(self._dtype)
            timestep = mx.array([sigma])
            return step(tokens, states, timestep, rope, self._guidance, self._past)

        return velocity


def read(
    transformer: Flux2Transformer,
    references: References,
    dtype: mx.Dtype,
    guidance: mx.array | None,
    execution: Execution = PLAIN,
) -> list[KeysValues]:
    """Keys and values of `references`, for a model that was trained to see them through these only."""
    rope = rope_table(references.ids, transformer.config)
    return transformer.read(references.tokens.astype(dtype), rope, guidance, execution)


def beside(denoiser: Denoiser, references: mx.array) -> Denoiser:
    """Have the tokens of `references` `[1, Lr, C]` go along with those of the image."""

    def velocity(tokens: mx.array, sigma: float) -> mx.array:
        B, L, _ = tokens.shape
        together = mx.concatenate([tokens, mx.repeat(references, B, axis=0)], axis=1)
        return denoiser(together, sigma)[:, :L]

    return velocity


def guided(denoiser: Denoiser, negative: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance of a `scale` away from what is `negative`."""

    def velocity(tokens: mx.array, sigma: float) -> mx.array:
        towards = denoiser(tokens, sigma)
        # Two passes and not one of twice the batch: matrix products fill the device either way, and this halves the
        # peak.
        mx.eval(towards)
        away = negative(tokens, sigma)
        return away + scale * (towards - away)

    return velocity


def by_step(make: Callable[[], Denoiser], at: Callable[[int], bool]) -> Denoiser:
    """A denoiser for adapters that work in some steps only.

    Args:
        make: gives a denoiser with the adapters that are at work now.
        at: is called before each step with its number, from 1. It puts those of this step to work, and says whether
            they are others than before, so that the denoiser has to be made again.
    """
    numbers = count(1)
    made = list[Denoiser]()

    def velocity(tokens: mx.array, sigma: float) -> mx.array:
        if at(next(numbers)) or not made:
            made.clear()  # first, so that the conditions of two are never in memory at one time
            made.append(make())
        return made[0](tokens, sigma)

    return velocity


@dataclass(frozen=True)
class Painting:
    """A picture that is painted over: its tokens `source` `[1, L, C]`, the run's `noise` `[B, L, C]`, and `mask`
    `[1, L, 1]`, 1 where it is painted over (None: everywhere). All float32."""

    source: mx.array
    noise: mx.array
    mask: mx.array | None = None

    def at(self, sigma: float) -> mx.array:
        """The picture at a noise level."""
        return sigma * self.noise + (1 - sigma) * self.source

    def kept(self, tokens: mx.array, sigma: float) -> mx.array:
        """`tokens` of that noise level with the picture where the mask keeps it."""
        return tokens if self.mask is None else (1 - self.mask) * self.at(sigma) + self.mask * tokens


def unchanged(tokens: mx.array, sigma: float) -> mx.array:
    """The correction that corrects nothing."""
    return tokens


def denoise(
    denoiser: Denoiser, tokens: mx.array, sigmas: np.ndarray, correction: Correction = unchanged
) -> Generator[Step, Any, mx.array]:
    """Integrate from noise to an image, yielding after every step, and return the last tokens.

    Args:
        denoiser: gives the velocity.
        tokens: noise, or a noisy picture, at the first noise level: float32 `[B, L, C]`, as they stay.
        sigmas: noise levels with the final 0, `[steps + 1]`.
        correction: what becomes of the tokens after every step, and of its estimate at noise level 0.

    A caller may `send` tokens to go on from in place of those that were yielded.

    Raises:
        RangeError: the tokens are no longer finite, so no step can make an image of them.
        InputError: what was sent can't be tokens of these images.
    """
    for number, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist()), 1):
        velocity = denoiser(tokens, sigma)
        estimate = correction(euler_step(tokens, velocity, sigma, 0.0), 0.0)
        tokens = correction(euler_step(tokens, velocity, sigma, next_sigma), next_sigma)
        mx.eval(tokens)
        check_finite(velocity, "transformer")
        replaced = yield Step(number, sigma, next_sigma, tokens, estimate)
        tokens = tokens if replaced is None else _replacement(replaced, tokens.shape)
    return tokens


def _replacement(tokens: Any, shape: tuple[int, ...]) -> mx.array:
    """Tokens to go on from that a callback has returned; InputError if they can't be those of this pass."""
    try:
        tokens = mx.array(tokens).astype(mx.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"a callback returned {type(tokens).__name__} for latents; give an array {shape}") from error
    if tokens.shape != shape or not mx.isfinite(tokens).all().item():
        raise InputError(f"a callback returned latents {tokens.shape}; give finite numbers of the shape {shape}")
    return tokens
