"""Training on edits: the transformer sees the picture to change as reference tokens beside the noisy ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from edits import Edit, sample_training_family
from flow_stage import (
    Course,
    TextToVelocity,
    encode_pictures,
    fit,
    flow_loss,
    load_tokenizer,
    sample_sigmas,
    tokenize,
    write_shard,
)
from instructions import sample_instruction
from prompts import sample_prompt
from scenes import Scene
from torch import Tensor
from training import Progress, load_average
from transformers import Qwen2Tokenizer
from vae_stage import load_vae

FAMILIES = 100
EDITS, PROMPTS = 12, 12
SCALE = 0.6
DECAY = 0.998
PLAIN = 0.6
# How often each kind of edit is trained: a new shape is the hardest to draw, a new background the easiest.
SHARES = {"shape": 0.36, "colour": 0.24, "swap": 0.12, "remove": 0.12, "add": 0.08, "background": 0.08}
# Most edits change a third of the tokens or fewer: those whose latents differ by more than this in the mean square.
CHANGED, CHANGED_WEIGHT = 0.1, 8.0
# A share of the prompts asks for a star alone, whose points are the hardest to draw.
STARS = 0.3
# What an instruction changes is decided at high noise; further down the noisy picture itself shows it.
EDIT_SHIFT, EDIT_UNIFORM = 12.0, 0.1


def shard_families(seed: tuple[int, int]) -> list[list[Edit]]:
    """The edits of a shard's pictures: `FAMILIES` lists, each of one picture's edits."""
    rng = np.random.default_rng(seed)
    return [sample_training_family(rng) for _ in range(FAMILIES)]


@torch.no_grad()
def make_edit_latents(work: Path, count: int, seed: int = 11) -> None:
    """Draws `count` pictures with what their edits make of them and caches the patches in shards (`work`/edits-*.pt).

    A shard holds (N, 64, 32): of each family the picture itself, then the outcome of each edit. Training can draw the
    same families again from the shard's seed.
    """
    vae = load_vae(work)
    for index in range(count // FAMILIES):
        path = work / f"edits-{index:03d}.pt"
        if path.exists():
            continue
        families = shard_families((seed, index))
        pictures = [picture for edits in families for picture in (edits[0].before, *(edit.after for edit in edits))]
        write_shard(path, encode_pictures(vae, [picture.draw() for picture in pictures]), (seed, index))


class EditExamples:
    """Cached latents of pictures before and after edits; sentences are drawn anew at each batch."""

    def __init__(self, work: Path, tokenizer: Qwen2Tokenizer, seed: int) -> None:
        self.tokenizer, self.rng = tokenizer, np.random.default_rng(seed)
        mean, variance = torch.load(work / "statistics.pt", weights_only=True)
        shards = [torch.load(path, weights_only=True) for path in sorted(work.glob("edits-*.pt"))]
        self.latents = (torch.cat([shard["patches"] for shard in shards]) - mean) / torch.sqrt(variance + 1e-4)
        # Rows of the latents before and after each edit, and the pictures that a prompt describes with their rows.
        self.edits: dict[str, list[tuple[Edit, int, int]]] = {kind: [] for kind in SHARES}
        self.scenes: list[tuple[Scene, int]] = []
        row = 0
        for family in (family for shard in shards for family in shard_families(shard["seed"])):
            self._add(family, row)
            row += 1 + len(family)
        self.stars = [(scene, row) for scene, row in self.scenes if scene.size and scene.first.name == "star"]

    def _add(self, family: list[Edit], row: int) -> None:
        pictures = [family[0].before, *(edit.after for edit in family)]
        self.scenes += [(scene, row + k) for k, picture in enumerate(pictures) if (scene := picture.scene)]
        for k, edit in enumerate(family, start=row + 1):
            for change, old, new in ((edit, row, k), (edit.backward(), k, row)):
                self.edits[change.kind].append((change, old, new))

    def prompts(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (count, 64, 32), token ids and attention mask (count, 48) of prompts without a reference."""
        pools = [self.stars if star else self.scenes for star in self.rng.random(count) < STARS]
        chosen = [pool[self.rng.integers(len(pool))] for pool in pools]
        sentences = [sample_prompt(scene, self.rng) for scene, _ in chosen]
        return self.latents[[row for _, row in chosen]], *tokenize(self.tokenizer, sentences)

    def instructions(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of instructions, the latents those of the outcome, and the references' latents (count, 64, 32)."""
        kinds = self.rng.choice(list(SHARES), p=list(SHARES.values()), size=count)
        chosen = [self.edits[kind][self.rng.integers(len(self.edits[kind]))] for kind in kinds]
        texts = tokenize(self.tokenizer, [sample_instruction(edit, self.rng, PLAIN) for edit, _, _ in chosen])
        before, after = [row for _, row, _ in chosen], [row for _, _, row in chosen]
        return self.latents[after], *texts, self.latents[before]


def change_weights(clean: Tensor, reference: Tensor) -> Tensor:
    """Weights (B, 64), 1 on average, by which tokens count that an edit changes more than those that it copies."""
    changed = (clean - reference).square().mean(-1) > CHANGED
    weights = 1 + (CHANGED_WEIGHT - 1) * changed
    return weights / weights.mean(1, keepdim=True)


def train_edits(
    work: Path, progress: Progress, resume: bool, compiled: bool, report: Callable[[TextToVelocity], str]
) -> None:
    """Goes on from `work`/flow.pt with edits and prompts, into `work`/edit.pt."""
    tokenizer = load_tokenizer(work)
    model = TextToVelocity(tokenizer)
    load_average(work / "flow.pt", model)
    predict = torch.compile(model) if compiled else model

    def losses(seed: int) -> Iterator[Tensor]:
        examples = EditExamples(work, tokenizer, seed)
        while True:
            clean, *conditions, reference = examples.instructions(EDITS)
            sigmas, weights = sample_sigmas(EDITS, EDIT_SHIFT, EDIT_UNIFORM), change_weights(clean, reference)
            of_edits = flow_loss(predict, sigmas, clean, *conditions, reference, weights=weights)
            of_prompts = flow_loss(predict, sample_sigmas(PROMPTS), *examples.prompts(PROMPTS))
            yield (EDITS * of_edits + PROMPTS * of_prompts) / (EDITS + PROMPTS)

    fit(model, Course(work / "edit.pt", progress, resume, SCALE, DECAY), losses, report)
