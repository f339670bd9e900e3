"""Joint training of the demonstration model's text encoder and transformer on cached latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from geometry import (
    TEXT_LAYERS,
    TEXT_LENGTH,
    TOKENS_PER_SIDE,
    build_text_encoder,
    build_transformer,
)
from PIL import Image
from prompts import sample_prompt
from scenes import Scene, draw, sample_training_scene
from tokenizer import END, PAD, chat_text, train_tokenizer
from torch import Tensor, nn
from training import MovingAverage, Muon, Progress, load_checkpoint, one_cycle, save_checkpoint
from transformers import Qwen2Tokenizer
from vae_stage import encode_patches, load_vae, to_tensor

BATCH = 32
ADAM_RATE = 1.5e-3
MUON_RATE = 1.5e-2
# What the pipeline's scheduler shifts its sigmas by at 64 tokens and 8 steps (diffusers' compute_empirical_mu).
SHIFT = math.exp(1.92)
UNIFORM_SHARE = 0.25
SHARD = 2000
# Where the pipelines put a first reference image on the time axis; the noisy tokens are at 0.
REFERENCE_TIME = 10.0
SAVE_EVERY, REPORT_EVERY = 100, 500


@torch.no_grad()
def make_latents(work: Path, count: int, seed: int = 7) -> None:
    """Draws `count` training scenes and caches their patches in shards (`work`/latents-*.pt, (2000, 64, 32) each).

    Scenes are drawn from the shard's own seed, so that training can draw the same ones again for their sentences.
    """
    vae = load_vae(work)
    for index in range(count // SHARD):
        path = work / f"latents-{index:03d}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng((seed, index))
        scenes = [sample_training_scene(rng) for _ in range(SHARD)]
        patches = encode_pictures(vae, [draw(scene, rng) for scene in scenes])
        if index == 0:
            torch.save((patches.mean((0, 2, 3)), patches.var((0, 2, 3))), work / "statistics.pt")
        write_shard(path, patches, (seed, index))


def encode_pictures(vae: AutoencoderKLFlux2, pictures: list[Image.Image]) -> Tensor:
    """Patches (N, 32, 8, 8) of 128 x 128 pictures, not normalised."""
    batches = (pictures[start : start + 20] for start in range(0, len(pictures), 20))
    return torch.cat([encode_patches(vae, to_tensor(np.stack([np.asarray(x) for x in batch]))) for batch in batches])


def write_shard(path: Path, patches: Tensor, seed: tuple[int, int]) -> None:
    """Caches patches (N, 32, 8, 8) as tokens (N, 64, 32), complete or not at all, with the seed of their pictures."""
    partial = path.with_suffix(".partial")
    torch.save({"patches": patches.flatten(2).transpose(1, 2).contiguous(), "seed": seed}, partial)
    partial.replace(path)
    print(f"latents {path.name} {len(patches)} pictures", flush=True)


class Examples:
    """Cached latents with their scenes; sentences are drawn anew at each batch."""

    def __init__(self, work: Path, tokenizer: Qwen2Tokenizer, seed: int) -> None:
        self.tokenizer, self.rng = tokenizer, np.random.default_rng(seed)
        mean, variance = torch.load(work / "statistics.pt", weights_only=True)
        self.mean, self.deviation = mean, torch.sqrt(variance + 1e-4)
        self.shards: list[Tensor] = []
        self.scenes: list[list[Scene]] = []
        for path in sorted(work.glob("latents-*.pt")):
            shard = torch.load(path, weights_only=True)
            rng = np.random.default_rng(shard["seed"])
            self.scenes.append([sample_training_scene(rng) for _ in range(len(shard["patches"]))])
            self.shards.append((shard["patches"] - self.mean) / self.deviation)

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised latents (count, 64, 32), token ids and attention mask (count, 48)."""
        latents, texts = [], []
        for _ in range(count):
            shard = int(self.rng.integers(len(self.shards)))
            index = int(self.rng.integers(len(self.shards[shard])))
            latents.append(self.shards[shard][index])
            texts.append(sample_prompt(self.scenes[shard][index], self.rng))
        return torch.stack(latents), *tokenize(self.tokenizer, texts)


class TextToVelocity(nn.Module):
    """The text encoder and the transformer as one module to train."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        super().__init__()
        end, pad = tokenizer.convert_tokens_to_ids(END), tokenizer.convert_tokens_to_ids(PAD)
        self.text_encoder = build_text_encoder(len(tokenizer), pad, end)
        self.transformer = build_transformer()
        text = torch.zeros(TEXT_LENGTH, 4)
        text[:, 3] = torch.arange(TEXT_LENGTH)
        side = torch.arange(TOKENS_PER_SIDE)
        zero = torch.zeros(1, dtype=torch.long)
        image = torch.cartesian_prod(zero, side, side, zero).float()
        self.register_buffer("text_ids", text, persistent=False)
        self.register_buffer("image_ids", image, persistent=False)
        self.register_buffer("reference_ids", image + torch.tensor([REFERENCE_TIME, 0, 0, 0]), persistent=False)
        self._start_as_identity()

    def _start_as_identity(self) -> None:
        # Closed gates and a silent output let every block come in gradually, as usual for such transformers.
        for modulation in self.transformer.modules():
            if type(modulation).__name__ == "Flux2Modulation":
                nn.init.zeros_(modulation.linear.weight)
        nn.init.zeros_(self.transformer.norm_out.linear.weight)
        nn.init.zeros_(self.transformer.proj_out.weight)

    def trained_text_layers(self) -> nn.ModuleList:
        """The text encoder's layers whose output is used."""
        return self.text_encoder.model.layers[: max(TEXT_LAYERS)]

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask (B, 48) to text states (B, 48, 384): the residual stream after layers 1, 2 and 3."""
        model = self.text_encoder.model
        hidden, outputs = model.embed_tokens(ids), []
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = causal[None, None] & (mask[:, None, None, :] > 0)
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        rotary = model.rotary_emb(hidden, torch.arange(length)[None])
        for layer in self.trained_text_layers():
            hidden = layer(hidden, attention_mask=bias, position_embeddings=rotary)
            outputs.append(hidden)
        return torch.cat(outputs, dim=-1)

    def forward(
        self, noisy: Tensor, sigmas: Tensor, ids: Tensor, mask: Tensor, reference: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, 64, 32) of noisy latents (B, 64, 32) at `sigmas` (B,) in [0, 1].

        `reference` (B, 64, 32) holds the clean latents of pictures to edit.
        """
        tokens, positions = noisy, self.image_ids
        if reference is not None:
            tokens = torch.cat([noisy, reference], dim=1)
            positions = torch.cat([self.image_ids, self.reference_ids])
        velocity = self.transformer(
            hidden_states=tokens,
            timestep=sigmas,
            encoder_hidden_states=self.encode(ids, mask),
            txt_ids=self.text_ids,
            img_ids=positions,
            return_dict=False,
        )[0]
        return velocity[:, : noisy.shape[1]]


def sample_sigmas(count: int, shift: float = SHIFT, uniform: float = UNIFORM_SHARE) -> Tensor:
    """Noise levels in (0, 1): spread as a schedule shifted by `shift` spreads them, a share `uniform` evenly."""
    # One draw per stratum keeps a batch's loss comparable to the next one's.
    even = (torch.randperm(count) + torch.rand(count)) / count
    even = even.clamp(1e-4, 1)
    shifted = shift / (shift + 1 / even - 1)
    return torch.where(torch.rand(count) < uniform, even, shifted)


def flow_loss(
    predict: Callable[..., Tensor],
    sigmas: Tensor,
    clean: Tensor,
    ids: Tensor,
    mask: Tensor,
    *reference: Tensor,
    weights: Tensor | float = 1.0,
) -> Tensor:
    """Squared error of the velocity that `predict` gives for clean latents (B, 64, 32) noised to `sigmas` (B,), with
    `weights` (B, 64) of the tokens."""
    noise, level = torch.randn_like(clean), sigmas[:, None, None]
    velocity = predict((1 - level) * clean + level * noise, sigmas, ids, mask, *reference)
    return (weights * (velocity - (noise - clean)).square().mean(-1)).mean()


class Optimisers:
    """Muon for the blocks' matrices and AdamW for everything else, stepped as one, at `scale` times their rates."""

    def __init__(self, model: TextToVelocity, scale: float = 1.0) -> None:
        blocks = [model.transformer.transformer_blocks, model.transformer.single_transformer_blocks]
        blocks.append(model.trained_text_layers())
        matrices = {id(value) for block in blocks for value in block.parameters() if value.ndim == 2}
        frozen = {id(value) for value in model.text_encoder.model.layers[max(TEXT_LAYERS) :].parameters()}
        everything = list(model.parameters())
        muon = [value for value in everything if id(value) in matrices]
        adam = [value for value in everything if id(value) not in matrices | frozen]
        self.parts = [
            (Muon(muon), scale * MUON_RATE),
            (torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=1e-3), scale * ADAM_RATE),
        ]

    def step(self, factor: float) -> None:
        """One update at `factor` times the highest learning rates."""
        for part, rate in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad()

    def state_dict(self) -> list[dict]:
        """Both optimisers' states."""
        return [part.state_dict() for part, _ in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Restores `state_dict`."""
        for (part, _), state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def load_tokenizer(work: Path) -> Qwen2Tokenizer:
    """The tokenizer of `work`, trained on first use."""
    folder = work / "tokenizer"
    if not folder.exists():
        train_tokenizer().save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def tokenize(tokenizer: Qwen2Tokenizer, sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, 48) of prompts or instructions in the chat template."""
    options = {"padding": "max_length", "truncation": True, "max_length": TEXT_LENGTH, "return_tensors": "pt"}
    tokens = tokenizer([chat_text(sentence) for sentence in sentences], **options)
    return tokens["input_ids"], tokens["attention_mask"]


@dataclass(frozen=True)
class Course:
    """How a stage trains: its checkpoint, its bounds, and the factor of the full learning rates and the averaging."""

    checkpoint: Path
    progress: Progress
    resume: bool
    scale: float = 1.0
    decay: float = 0.998


def fit(
    model: TextToVelocity,
    course: Course,
    losses: Callable[[int], Iterator[Tensor]],
    report: Callable[[TextToVelocity], str],
) -> None:
    """Trains `model` on the losses drawn from a seed; `report` looks at the averaged model now and then."""
    average, optimisers = MovingAverage(model, course.decay), Optimisers(model, course.scale)
    progress, checkpoint, name = course.progress, course.checkpoint, course.checkpoint.stem
    if course.resume and checkpoint.exists():
        load_checkpoint(checkpoint, model, average, optimisers, progress)
    torch.manual_seed(1 + progress.done)
    drawn, recent = losses(progress.done), []
    while (fraction := progress.fraction()) < 1:
        loss = next(drawn)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimisers.step(one_cycle(fraction))
        average.update()
        progress.done += 1
        recent.append(loss.item())
        if progress.done % 50 == 0:
            print(f"{name} {progress.done} {progress.spent:.0f}s loss {np.mean(recent):.4f}", flush=True)
            recent.clear()
        if progress.done % SAVE_EVERY == 0:
            save_checkpoint(checkpoint, model, average, optimisers, progress)
        if progress.done % REPORT_EVERY == 0:
            average.swap()
            print(f"{name} {progress.done} {report(model)}", flush=True)
            average.swap()
    save_checkpoint(checkpoint, model, average, optimisers, progress)


def train_transformer(
    work: Path, progress: Progress, resume: bool, compiled: bool, report: Callable[[TextToVelocity], str]
) -> None:
    """Trains text encoder and transformer into `work`/flow.pt."""
    torch.manual_seed(1)
    tokenizer = load_tokenizer(work)
    model = TextToVelocity(tokenizer)
    predict = torch.compile(model) if compiled else model

    def losses(seed: int) -> Iterator[Tensor]:
        examples = Examples(work, tokenizer, seed)
        while True:
            yield flow_loss(predict, sample_sigmas(BATCH), *examples.batch(BATCH))

    fit(model, Course(work / "flow.pt", progress, resume), losses, report)
