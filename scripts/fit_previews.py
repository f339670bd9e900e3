"""Fit the linear maps of `flux2_mlx/previews.py`, from normalised latents to the mean colour of their 8×8 pixels.

    python scripts/fit_previews.py taef2_encoder.safetensors PHOTO...    that of FLUX.2 (with PyTorch)
    python scripts/fit_previews.py demo                                  that of the demo, of its drawn scenes

Each photo is taken in all orders of its colours, as it is and as its negative, so that no map learns that skies are
blue. It prints a row a channel, then the value of black latents, and how near photos come that are left out (PSNR).
"""

import sys
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path

import mlx.core as mx
import numpy as np
from demo.scenes import draw, sample_scene
from PIL import Image

from flux2_mlx import Flux2Pipeline
from flux2_mlx.vae import unpatched

SIDE = 384
SCENES = 64
RIDGE = 0.01  # of the variance of a channel
Encode = Callable[[np.ndarray], np.ndarray]


def tiny_encoder(path: str) -> Encode:
    """TAEF2's encoder: pixels `[H, W, 3]` in 0..1 to normalised latents `[H/8, W/8, 32]`."""
    import torch
    from safetensors.torch import load_file
    from torch import nn

    class Block(nn.Module):
        def __init__(self, pooled: bool):
            super().__init__()
            convs = [layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
            self.conv = nn.Sequential(*convs[:-1])
            widen, narrow = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
            self.pool = nn.Sequential(widen, nn.GroupNorm(4, 256), nn.ReLU(), narrow) if pooled else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x if self.pool is None else x + self.pool(x)
            return torch.relu(self.conv(x) + x)

    levels = [nn.Conv2d(3, 64, 3, padding=1), Block(False)]
    for level in range(3):
        levels.append(nn.Conv2d(64, 64, 3, 2, padding=1, bias=False))
        levels += [Block(level == 2) for _ in range(3)]
    encoder = nn.Sequential(*levels, nn.Conv2d(64, 32, 3, padding=1))
    encoder.load_state_dict({name: x.float() for name, x in load_file(path).items()})

    def encode(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            images = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()).float()
            return encoder(images)[0].permute(1, 2, 0).numpy()

    return encode


def model_encoder(name: str) -> Encode:
    """The encoder of a model's own autoencoder, as `tiny_encoder`."""
    vae = Flux2Pipeline.from_pretrained(name, dtype="float32", progress=False).networks.load("vae")

    def encode(pixels: np.ndarray) -> np.ndarray:
        latents = vae.encode(mx.array(2 * pixels[None] - 1))
        return np.array(unpatched(vae.to_tokens(latents), latents.shape[1] // 2, latents.shape[2] // 2))[0]

    return encode


def photo(path: str) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    width, height = (side // 16 * 16 for side in image.size)
    return np.asarray(image.crop((0, 0, width, height)), np.float32) / 255


def scene(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    return np.asarray(draw(sample_scene(rng), rng), np.float32) / 255


def pairs(pixels: np.ndarray, encode: Encode) -> np.ndarray:
    """Rows of latents, a 1, and colours."""
    latents = encode(pixels)
    height, width, channels = latents.shape
    colours = pixels.reshape(height, 8, width, 8, 3).mean((1, 3)).reshape(-1, 3)
    return np.concatenate([latents.reshape(-1, channels), np.ones((height * width, 1)), colours], 1)


def variations(pixels: np.ndarray) -> Iterator[np.ndarray]:
    for order in permutations(range(3)):
        yield from (pixels[..., order], 1 - pixels[..., order])


def fitted(rows: np.ndarray) -> np.ndarray:
    known, wanted = rows[:, :-3], rows[:, -3:]
    ridge = RIDGE * len(rows) * np.eye(known.shape[1])
    ridge[-1, -1] = 0
    return np.linalg.solve(known.T @ known + ridge, known.T @ wanted)


def psnr(table: np.ndarray, rows: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(np.clip(rows[:, :-3] @ table, 0, 1) - rows[:, -3:]).mean()))


def main() -> None:
    model, *photos = sys.argv[1:]
    if Path(model).is_file():
        encode, pictures = tiny_encoder(model), [list(variations(photo(path))) for path in photos]
    else:
        encode, pictures = model_encoder(model), [[scene(number)] for number in range(SCENES)]
    rows = [np.concatenate([pairs(pixels, encode) for pixels in ways]) for ways in pictures]
    for row in fitted(np.concatenate(rows)):
        print("    ({}),".format(", ".join(f"{value:.4f}" for value in row)))
    left_out = [fitted(np.concatenate(rows[:k] + rows[k + 1 :])) for k in range(len(rows))]
    print("PSNR", [round(psnr(table, own[: len(own) // 12]), 1) for table, own in zip(left_out, rows, strict=True)])


if __name__ == "__main__":
    main()
