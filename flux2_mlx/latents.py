"""Pictures as tokens, and tokens as pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .errors import RangeError
from .layers import check_finite
from .sampling import References
from .transformer import image_ids
from .vae import VAE

# References lie this far apart on the T axis, as in training; the image that is made is at 0.
_T_STEP = 10
# No image is a thousand times as bright as white; what a decoder gives beyond that is damage, though it is finite.
_MOST_INTENSITY = 1000


@dataclass(frozen=True)
class EncodedEdit:
    """The pictures of a run as tokens, float32: the `references`, the first of which is the canvas if there is one, and
    the canvas as `source` `[1, L, C]` with its `mask` `[1, L, 1]`."""

    references: References
    source: mx.array | None = None
    mask: mx.array | None = None

    @classmethod
    def of(cls, pictures: Sequence[References], on_canvas: bool, mask: np.ndarray | None) -> "EncodedEdit":
        """Of pictures one by one. `mask` `[h, w]` says which tokens of the first are painted over if it is the canvas;
        None: all."""
        tokens = mx.concatenate([one.tokens for one in pictures], axis=1)
        references = References(tokens, np.concatenate([one.ids for one in pictures]))
        if not on_canvas:
            return cls(references)
        return cls(references, pictures[0].tokens, None if mask is None else mx.array(mask.reshape(1, -1, 1)))


def encode_picture(vae: VAE, pixels: np.ndarray, number: int, dtype: mx.Dtype, strip_bytes: int) -> References:
    """A picture `[1, H, W, 3]` in −1..1 as tokens, where it is the reference of that `number`, counted from 1."""
    latents = vae.encode(mx.array(pixels).astype(dtype), strip_bytes).astype(mx.float32)
    tokens = vae.to_tokens(latents)
    check_finite(tokens, "VAE")
    return References(tokens, image_ids(latents.shape[1] // 2, latents.shape[2] // 2, t=_T_STEP * number))


def latents_of(vae: VAE, tokens: mx.array, grid: tuple[int, int]) -> np.ndarray:
    """Un-normalised latents `[1, H/8, W/8, c]` of an image's tokens `[L, C]`, float32."""
    latents = vae.from_tokens(tokens[None], *grid).astype(mx.float32)
    check_finite(latents, "VAE")
    return np.array(latents)


def decode_tokens(vae: VAE, tokens: mx.array, grid: tuple[int, int], dtype: mx.Dtype, strip_bytes: int) -> np.ndarray:
    """Decoder output of an image's tokens `[L, C]`, as `decode_latents` gives it."""
    return decode_latents(vae, vae.from_tokens(tokens[None], *grid).astype(dtype), strip_bytes)


def decode_latents(vae: VAE, latents: mx.array, strip_bytes: int) -> np.ndarray:
    """Decoder output `[1, H, W, 3]`, about −1..1, of un-normalised latents `[1, H/8, W/8, c]`; float32.

    Raises:
        RangeError: it is no image, as some weights of the VAE or the latents are far from what they should be.
    """
    decoded = vae.decode(latents, strip_bytes)
    check_finite(decoded, "VAE")
    pixels = np.array(decoded.astype(mx.float32))
    if np.abs(pixels).max() > _MOST_INTENSITY:
        raise RangeError(
            f"the VAE gave pixels of {np.abs(pixels).max():.3g} where −1 to 1 is black to white; "
            "`flux2_mlx.verification.verify` tells whether the weights are damaged"
        )
    return pixels
