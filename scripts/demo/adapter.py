"""Teaches the demonstration model the colour azure, which is its blue, as a LoRA of PEFT; writes tests/golden/azure.

    pip install peft
    python scripts/demo/adapter.py --work /tmp/work

The model with the word azure learns to move as the model without an adapter does with the word blue. PEFT 0.21.2 made
the file that is there.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from flow_stage import BATCH, SHARD, TextToVelocity, load_tokenizer, make_latents, sample_sigmas, tokenize
from peft import LoraConfig, PeftModel, get_peft_model
from prompts import sample_prompt
from restore_stage import restore
from scenes import Scene, sample_training_scene
from torch import Tensor, nn
from training import load_average, one_cycle

WORD, MEANING = "azure", "blue"
RANK, RATE = 4, 1e-2
USUAL_SHARE = 0.3  # of pictures that the word is not said of, which are to stay as they are
LAYERS = ("context_embedder", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.linear_in")
GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "azure"


class Pairs:
    """Noised latents of pictures, with a sentence of the model without an adapter and one of the model with it."""

    def __init__(self, work: Path, seed: int) -> None:
        make_latents(work, SHARD)
        shard = torch.load(work / "latents-000.pt", weights_only=True)
        mean, variance = torch.load(work / "statistics.pt", weights_only=True)
        self.latents = (shard["patches"] - mean) / torch.sqrt(variance + 1e-4)
        drawn = np.random.default_rng(shard["seed"])
        self.scenes = [sample_training_scene(drawn) for _ in self.latents]
        self.named = [number for number, scene in enumerate(self.scenes) if has_meaning(scene)]
        self.rng = np.random.default_rng(seed)

    def batch(self, count: int) -> tuple[Tensor, list[str], list[str]]:
        """Latents (count, 64, 32), what says the known word of them, and what says the new one."""
        numbers = [self._number() for _ in range(count)]
        known = [sample_prompt(self.scenes[number], self.rng) for number in numbers]
        return self.latents[numbers], known, [retold(sentence) for sentence in known]

    def _number(self) -> int:
        usual = self.rng.random() < USUAL_SHARE
        return int(self.rng.integers(len(self.scenes))) if usual else int(self.rng.choice(self.named))


def has_meaning(scene: Scene) -> bool:
    """Whether a shape, not only the background, has the colour that gets another name."""
    return MEANING in (scene.first.colour, scene.second.colour if scene.second else None)


def retold(sentence: str) -> str:
    """The sentence with the new word for the known one."""
    sentence = re.sub(rf"\ba {MEANING}\b", f"an {MEANING}", sentence)
    sentence = re.sub(rf"\bA {MEANING}\b", f"An {MEANING}", sentence)
    return sentence.replace(MEANING, WORD).replace(MEANING.capitalize(), WORD.capitalize())


def train(work: Path, steps: int) -> PeftModel:
    """The transformer with an adapter that knows the word."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(work)
    model = TextToVelocity(tokenizer).requires_grad_(False)
    load_average(work / "flow.pt", model)
    model.transformer = get_peft_model(model.transformer, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    trained = [value for value in model.parameters() if value.requires_grad]
    optimiser, pairs = torch.optim.AdamW(trained, weight_decay=0), Pairs(work, seed=1)
    for step in range(steps):
        clean, known, new = pairs.batch(BATCH)
        sigmas = sample_sigmas(BATCH)
        noisy = torch.lerp(clean, torch.randn_like(clean), sigmas[:, None, None])
        with torch.no_grad(), model.transformer.disable_adapter():
            wanted = model(noisy, sigmas, *tokenize(tokenizer, known))
        loss = (model(noisy, sigmas, *tokenize(tokenizer, new)) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = RATE * one_cycle(step / steps)
        optimiser.step()
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.5f}", flush=True)
    return model.transformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of restored weights and cached latents")
    parser.add_argument("--output", type=Path, default=GOLDEN)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    if not (given.work / "flow.pt").exists():
        restore(given.work)
    transformer = train(given.work, given.steps).half()
    transformer.save_pretrained(given.output)
    (given.output / "README.md").unlink()


if __name__ == "__main__":
    main()
