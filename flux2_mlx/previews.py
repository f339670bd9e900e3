"""Pictures of what is forming, without the decoder that finishes images."""

from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import numpy as np
from PIL import Image

from .config import VAEConfig
from .decoders import Decoder
from .device import failures
from .errors import InputError
from .images import to_pil
from .layers import check_finite
from .loading import InMemory, fill, in_memory
from .references import Edit
from .request import Preview
from .vae import TinyDecoder, VAECost, unpatched

LINEAR = "linear"
_STRIP_BYTES = 64 * 1024 * 1024  # a quarter of what finished images take, as a preview is there beside the transformer
# The mean colour, in 0..1, of the 8×8 pixels of a latent: what each normalised channel adds to it, and in the last row
# what it is without. Least squares: `scripts/fit_previews.py` says of what. By the number of channels.
_MAPS = {
    # The demo's, of its drawn scenes: it shows their forms rather than their colours. PSNR of one left out: 14 dB.
    8: (
        (0.0564, 0.0888, 0.0294),
        (0.0148, -0.0757, -0.1528),
        (-0.1571, -0.0075, 0.0555),
        (0.0702, -0.1530, -0.2395),
        (-0.1435, 0.1225, 0.1287),
        (0.1881, 0.0974, -0.1622),
        (0.1952, 0.0282, -0.1291),
        (0.1074, 0.0719, 0.0187),
        (0.5844, 0.4611, 0.3416),
    ),
    # FLUX.2's, by TAEF2's encoder, of 14 photos in all orders of their colours. PSNR of one that is left out: 16 dB.
    32: (
        (0.0172, 0.0029, 0.0082),
        (-0.0009, -0.0230, 0.0207),
        (-0.0228, -0.0084, 0.0317),
        (0.0978, 0.1350, 0.1909),
        (0.0185, -0.0193, -0.0091),
        (-0.0012, -0.0029, -0.0112),
        (-0.0359, 0.0568, -0.0293),
        (0.0079, 0.0097, 0.0079),
        (-0.1704, -0.1357, -0.0646),
        (-0.0015, -0.0075, 0.0004),
        (-0.0106, -0.0017, 0.0065),
        (0.0379, 0.0058, -0.0685),
        (-0.0068, -0.0056, -0.0045),
        (-0.0141, -0.0183, -0.0284),
        (-0.0009, 0.0032, -0.0087),
        (-0.0480, 0.0238, 0.0095),
        (0.0126, 0.0154, 0.0109),
        (0.0288, 0.0045, 0.0092),
        (0.0197, 0.0134, 0.0216),
        (0.0502, -0.0445, 0.0127),
        (-0.0010, -0.0004, 0.0057),
        (0.0078, -0.0267, -0.0025),
        (-0.0181, 0.0087, -0.0209),
        (0.0147, 0.0225, 0.0369),
        (-0.0100, 0.0088, -0.0030),
        (-0.0335, -0.0304, -0.0360),
        (0.0092, -0.0178, 0.0114),
        (0.0077, -0.0085, -0.0073),
        (0.0038, 0.0073, 0.0044),
        (-0.0214, -0.0055, 0.0096),
        (0.0151, 0.0278, 0.0108),
        (0.0082, -0.0083, -0.0163),
        (0.4866, 0.4877, 0.4506),
    ),
}


def has_sketches(config: VAEConfig) -> bool:
    """Whether there is a linear map for the latents of an autoencoder."""
    return config.latent_channels in _MAPS and config.scale_factor == 8


def sketches(tokens: mx.array, width: int, height: int) -> list[Image.Image]:
    """Rough images of an eighth of the size, by a linear map that takes neither a network nor time.

    Args:
        tokens: `[B, L, 4c]` of a step, such as its `estimate` or the `latents` of a callback; c is 32, the demo's 8.
        width, height: pixels of the images that are made.

    Raises:
        InputError: they are not the tokens of such images.
    """
    count = (height // 16) * (width // 16)
    if tokens.ndim != 3 or tokens.shape[1] != count or tokens.shape[2] // 4 not in _MAPS:
        raise InputError(f"tokens {tokens.shape} are not those of {width}×{height} pixels; give [B, {count}, 4c]")
    latents = np.array(unpatched(tokens.astype(mx.float32), height // 16, width // 16))
    table = np.array(_MAPS[latents.shape[-1]], np.float32)
    return to_pil(np.clip(latents @ table[:-1] + table[-1], 0, 1))


@dataclass
class Previews:
    """Makes the images between the steps of runs in place of the VAE.

    Args:
        decoder: TAEF2, which is read at the first image; None: the linear map, enlarged.
        dtype: what TAEF2 computes in.
    """

    decoder: Decoder | None = None
    dtype: mx.Dtype = mx.float32
    _network: TinyDecoder | None = field(default=None, init=False, repr=False)

    def nbytes(self, width: int, height: int) -> int:
        """Bytes of memory that an image takes: weights, and activations at their peak."""
        if self.decoder is None:
            return 0
        weights = in_memory(self.decoder.layers.infos, self.dtype).values()
        cost = VAECost(self.decoder.config, self.dtype, _STRIP_BYTES).decoding(height, width)
        return sum(tensor.nbytes for tensor in weights) + cost

    def images(self, tokens: mx.array, width: int, height: int) -> list[Image.Image]:
        """Images of the tokens `[B, L, 4c]` of a step."""
        if self.decoder is None:
            small = sketches(tokens, width, height)
            return [image.resize((width, height), Image.Resampling.BICUBIC) for image in small]
        with failures():
            return [self._decoded(self.decoder, image, width, height) for image in tokens]

    def _decoded(self, decoder: Decoder, tokens: mx.array, width: int, height: int) -> Image.Image:
        network = self._network = self._network or _loaded(decoder, self.dtype)
        latents = unpatched(tokens[None], height // 16, width // 16).astype(self.dtype)
        pixels = network.decode(latents, _STRIP_BYTES)
        check_finite(pixels, "preview decoder")
        return to_pil(np.array(mx.clip(pixels.astype(mx.float32), 0, 1)))[0]

    def release(self) -> None:
        """Give back the memory of TAEF2."""
        self._network = None


def _loaded(decoder: Decoder, dtype: mx.Dtype) -> TinyDecoder:
    network = TinyDecoder(decoder.config.latent_channels)
    fill(network, InMemory(decoder.layers, dtype))
    return network


Shown = tuple[Preview | None, Preview | None]  # the `preview` and the `sketch` of a step; see `Progress`


def by_vae(estimate: mx.array, preview: Preview | None) -> Shown:
    """What a step shows where there is nothing but the VAE's `preview`, if that is there."""
    return preview, None


@dataclass(frozen=True)
class Views:
    """Gives what each step of a run shows.

    Attributes:
        width, height: pixels of the images that the model makes.
        edit: what finishes them.
        has_sketches: whether the linear map knows the model's latents.
        previews: what makes previews in place of the VAE; None: nothing does.
    """

    width: int
    height: int
    edit: Edit
    has_sketches: bool
    previews: Previews | None = None

    def __call__(self, estimate: mx.array, preview: Preview | None) -> Shown:
        """Those of the noise-free tokens `[B, L, 4c]` that a step points to, and the VAE's `preview` of them."""
        own = None if self.previews is None else partial(self._finished, self.previews, estimate)
        sketch = partial(sketches, estimate, self.width, self.height) if self.has_sketches else None
        return own or preview, sketch

    def _finished(self, previews: Previews, estimate: mx.array) -> list[Image.Image]:
        return [self.edit.finished(image) for image in previews.images(estimate, self.width, self.height)]
