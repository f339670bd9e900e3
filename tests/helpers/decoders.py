"""Files of decoders with random weights, as others save them."""

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from flux2_mlx.config import VARIANTS, VAEConfig
from flux2_mlx.vae import VAE

DEMO_VAE = VARIANTS["demo"].vae
NARROW = VAEConfig(**DEMO_VAE.to_dict() | {"decoder_block_out_channels": (8, 16, 32, 32)})


def tiny_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """The tensors of TAEF2's decoder of so many latent channels, as `taesd.py` names them."""
    shapes = {"1.weight": (64, channels, 3, 3), "1.bias": (64,), "19.weight": (3, 64, 3, 3), "19.bias": (3,)}
    shapes |= {f"{number}.weight": (64, 64, 3, 3) for number in (7, 12, 17)}
    for block in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        for conv in (0, 2, 4):
            shapes |= {f"{block}.conv.{conv}.weight": (64, 64, 3, 3), f"{block}.conv.{conv}.bias": (64,)}
        if block < 8:
            shapes |= {f"{block}.pool.0.weight": (256, 64, 1, 1), f"{block}.pool.3.weight": (64, 256, 1, 1)}
            shapes |= {f"{block}.pool.1.weight": (256,), f"{block}.pool.1.bias": (256,)}
    return shapes


def save_tiny(path: Path, channels: int = DEMO_VAE.latent_channels, whole: bool = False) -> Path:
    """TAEF2 with random weights; as a `whole` model the decoder beside an encoder, named as diffusers does."""
    rng = np.random.default_rng(channels)
    tensors = {name: _random(rng, shape) for name, shape in tiny_shapes(channels).items()}
    if whole:
        parts = {name: name.partition(".") for name in tensors}
        tensors = {f"decoder.layers.{int(parts[name][0]) - 1}.{parts[name][2]}": x for name, x in tensors.items()}
        tensors["encoder.layers.0.weight"] = mx.zeros((64, 3, 3, 3), mx.float16)
    mx.save_safetensors(str(path), tensors)
    return path


def save_narrow(path: Path) -> Path:
    """The demo's autoencoder with a narrower decoder and random weights all over, in the naming of diffusers."""
    rng = np.random.default_rng(1)
    shapes = {name: x.shape for name, x in tree_flatten(VAE(NARROW).parameters())}
    theirs = {name: (s[0], s[3], s[1], s[2]) if len(s) == 4 else s for name, s in shapes.items()}
    tensors = {name: _random(rng, shape).astype(mx.bfloat16) for name, shape in theirs.items()}
    mx.save_safetensors(str(path), tensors | {"bn.num_batches_tracked": mx.array(7)})
    return path


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> mx.array:
    bound = (3 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.2
    return mx.array(rng.uniform(-bound, bound, shape) + (len(shape) == 1) * 0.5).astype(mx.float16)
