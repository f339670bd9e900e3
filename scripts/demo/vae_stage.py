"""Training of the demonstration model's autoencoder, and the latents it makes of scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from geometry import IMAGE_SIDE, build_vae
from scenes import Placed, draw_placed, place, sample_training_scene
from torch import Tensor, nn
from training import MovingAverage, Progress, load_average, load_checkpoint, one_cycle, save_checkpoint

CROP = 48
CROPS = 12
WHOLE = 2
LEARNING_RATE = 2e-3
LATENT_NOISE = 0.1
SHAPE_WEIGHT = 2.0
ABSOLUTE_SHARE = 0.15
CHECKPOINTS = {"vae": "vae.pt", "refine": "refine.pt", "decoder": "decoder.pt"}
# Sampling the posterior should give nearly its mean, for no loss shapes the variance.
LOG_VARIANCE = -12.0


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) bytes to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class ScenePool:
    """Drawn training scenes to cut crops from; a few are replaced at each batch."""

    def __init__(self, count: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.pictures: list[np.ndarray] = []
        self.shapes: list[tuple[Placed, ...]] = []
        for _ in range(count):
            picture, shapes = self._draw()
            self.pictures.append(picture)
            self.shapes.append(shapes)

    def _draw(self) -> tuple[np.ndarray, tuple[Placed, ...]]:
        scene = sample_training_scene(self.rng)
        shapes = place(scene, self.rng)
        return np.asarray(draw_placed(scene.background, shapes, IMAGE_SIDE)), shapes

    def crops(self, count: int) -> Tensor:
        """(count, 3, 48, 48) in [-1, 1], each near a shape's outline."""
        cut = []
        for _ in range(count):
            index = int(self.rng.integers(len(self.pictures)))
            self.pictures[index], self.shapes[index] = self._draw()
            shape = self.shapes[index][int(self.rng.integers(len(self.shapes[index])))]
            angle, reach = self.rng.uniform(0, 2 * np.pi), shape.radius * self.rng.uniform(0.2, 1.2)
            centre = np.array([shape.y + reach * np.sin(angle), shape.x + reach * np.cos(angle)]) * IMAGE_SIDE
            top, left = np.clip(centre - CROP / 2, 0, IMAGE_SIDE - CROP).astype(int)
            cut.append(self.pictures[index][top : top + CROP, left : left + CROP])
        return to_tensor(np.stack(cut))

    def whole(self, count: int) -> Tensor:
        """(count, 3, 128, 128) in [-1, 1]."""
        chosen = self.rng.integers(len(self.pictures), size=count)
        for index in chosen:
            self.pictures[index], self.shapes[index] = self._draw()
        return to_tensor(np.stack([self.pictures[index] for index in chosen]))


def reconstruction_loss(vae: AutoencoderKLFlux2, images: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss and the plain squared error of decoding slightly disturbed latents."""
    latents = vae.encode(images).latent_dist.mode()
    spread = latents.detach().std(dim=(0, 2, 3), keepdim=True)
    decoded = vae.decode(latents + LATENT_NOISE * spread * torch.randn_like(latents)).sample
    error = decoded - images
    # A small shape is few pixels, and its colour would count little against the background's evenness.
    weight = 1 + SHAPE_WEIGHT * (images != images[:, :, :1, :1]).any(1, keepdim=True)
    loss = (weight * (error.square() + ABSOLUTE_SHARE * error.abs())).mean() / weight.mean()
    return loss, error.detach().square().mean()


def _fresh_vae() -> AutoencoderKLFlux2:
    vae = build_vae()
    half = vae.quant_conv.out_channels // 2
    with torch.no_grad():
        vae.quant_conv.weight[half:] = 0
        vae.quant_conv.bias[half:] = LOG_VARIANCE
    return vae


def train_vae(work: Path, steps: int, minutes: float, resume: bool, phase: str = "vae") -> None:
    """Trains the autoencoder, or goes on with a trained one.

    `phase` "vae" starts afresh. Whole pictures come between its crops because the norms' statistics depend on the
    size of the flat background. "refine" goes on with mostly whole pictures. "decoder" does so with the encoder held
    still, so that latents made before stay valid. Each writes its checkpoint into `work`.
    """
    torch.manual_seed(0)
    vae = (_fresh_vae() if phase == "vae" else load_vae(work)).train().requires_grad_(True)
    if phase == "decoder":
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [value for value in vae.parameters() if value.requires_grad]
    average = MovingAverage(vae, 0.995)
    highest = LEARNING_RATE if phase == "vae" else LEARNING_RATE / 2
    optimiser = torch.optim.AdamW(trained, lr=highest, weight_decay=1e-3, betas=(0.9, 0.98))
    progress, checkpoint = Progress(steps, minutes), work / CHECKPOINTS[phase]
    if resume and checkpoint.exists():
        load_checkpoint(checkpoint, vae, average, optimiser, progress)
    pool, recent = ScenePool(512, seed=1000 + progress.done), []
    while (fraction := progress.fraction()) < 1:
        for group in optimiser.param_groups:
            group["lr"] = highest * one_cycle(fraction)
        crops = progress.done % 3 != 2 if phase == "vae" else progress.done % 6 == 0
        loss, squared = reconstruction_loss(vae, pool.crops(CROPS) if crops else pool.whole(WHOLE))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        average.update()
        progress.done += 1
        recent.append(squared.item())
        if progress.done % 50 == 0:
            print(f"{phase} {progress.done} {progress.spent:.0f}s squared {np.mean(recent):.5f}", flush=True)
            recent.clear()
        if progress.done % 500 == 0:
            save_checkpoint(checkpoint, vae, average, optimiser, progress)
    save_checkpoint(checkpoint, vae, average, optimiser, progress)


def load_vae(work: Path) -> AutoencoderKLFlux2:
    """The averaged autoencoder of `work`, its norm as yet unset if no latents were made."""
    vae = build_vae()
    written = [work / name for name in CHECKPOINTS.values() if (work / name).exists()]
    load_average(written[-1], vae)
    statistics = work / "statistics.pt"
    if statistics.exists():
        mean, variance = torch.load(statistics, weights_only=True)
        vae.bn.running_mean.copy_(mean)
        vae.bn.running_var.copy_(variance)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_patches(vae: AutoencoderKLFlux2, images: Tensor) -> Tensor:
    """(B, 3, 128, 128) in [-1, 1] to patches (B, 32, 8, 8), not normalised."""
    return Flux2KleinPipeline._patchify_latents(vae.encode(images).latent_dist.mode())
