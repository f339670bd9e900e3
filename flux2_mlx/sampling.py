"""The denoising loop."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from .layers import check_finite
from .request import Step
from .scheduler import euler_step
from .transformer import Flux2Transformer, KeysValues


@dataclass(frozen=True)
class Text:
    """Text states `[B, Lt, D]` that went through `txt_in`, and the `rope` of the text, the image and then references
    that go along."""

    states: mx.array
    rope: mx.array


@dataclass(frozen=True)
class Conditioning:
    """What stays the same at every step.

    References are either `references`, tokens `[1, Lr, C]` that go along with the image's, or `past`, their keys and
    values (see `Flux2Transformer.read`). `guidance` is the scale of classifier-free guidance against `negative_text`,
    `embedded_guidance` `[1]` what models get that were trained with one.
    """

    text: Text
    negative_text: Text | None = None
    guidance: float = 1.0
    embedded_guidance: mx.array | None = None
    references: mx.array | None = None
    past: list[KeysValues] | None = None


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


def denoise(
    transformer: Flux2Transformer,
    tokens: mx.array,
    conditioning: Conditioning,
    sigmas: np.ndarray,
    dtype: mx.Dtype,
    painting: Painting | None = None,
) -> Iterator[Step]:
    """Integrate from noise to an image, yielding after every step.

    Args:
        transformer: predicts the velocity.
        tokens: noise, or a noisy picture, at the first noise level: float32 `[B, L, C]`.
        conditioning: text, positions, references and guidance.
        sigmas: noise levels with the final 0, `[steps + 1]`.
        dtype: what the transformer computes in; the tokens stay in float32.
        painting: a picture that is kept outside its mask.

    A caller may `send` tokens to go on from instead of the ones that were yielded.

    Raises:
        RangeError: the tokens are no longer finite, so no step can make an image of them.
    """
    for number, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist()), 1):
        velocity = _velocity(transformer, tokens.astype(dtype), conditioning, sigma)
        estimate = euler_step(tokens, velocity, sigma, 0.0)
        tokens = euler_step(tokens, velocity, sigma, next_sigma)
        if painting is not None:
            estimate, tokens = painting.kept(estimate, 0.0), painting.kept(tokens, next_sigma)
        mx.eval(tokens)
        check_finite(velocity, "transformer")
        replaced = yield Step(number, sigma, next_sigma, tokens, estimate)
        tokens = tokens if replaced is None else replaced


def _velocity(transformer: Flux2Transformer, tokens: mx.array, conditioning: Conditioning, sigma: float) -> mx.array:
    velocity = _pass(transformer, tokens, conditioning.text, conditioning, sigma)
    if conditioning.negative_text is None:
        return velocity
    # Two passes and not one of twice the batch: matrix products fill the device either way, and this halves the peak.
    mx.eval(velocity)
    negative = _pass(transformer, tokens, conditioning.negative_text, conditioning, sigma)
    return negative + conditioning.guidance * (velocity - negative)


def _pass(
    transformer: Flux2Transformer, tokens: mx.array, text: Text, conditioning: Conditioning, sigma: float
) -> mx.array:
    B, L, _ = tokens.shape
    if conditioning.references is not None:
        references = mx.repeat(conditioning.references.astype(tokens.dtype), B, axis=0)
        tokens = mx.concatenate([tokens, references], axis=1)
    timestep, guidance = mx.array([sigma]), conditioning.embedded_guidance
    return transformer(tokens, text.states, timestep, text.rope, guidance, conditioning.past)[:, :L]
