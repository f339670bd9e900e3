"""Measures how often the demonstration model shows what a prompt says, on prompts that training never saw."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw
from prompts import sample_prompt
from scenes import Scene, sample_held_out_scene
from scorer import Verdict, judge

if TYPE_CHECKING:
    from flow_stage import TextToVelocity

ATTRIBUTES = ("background", "count", "colours", "shapes", "size", "relation")
SEED = 2024
TILE = 128
CAPTION = 44
Generate = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]


def held_out_prompts(count: int, seed: int = SEED, plain: float = 0.5) -> list[tuple[Scene, str]]:
    """`count` scenes of held-out combinations with a sentence each, a share `plain` of them in the canonical form."""
    rng = np.random.default_rng(seed)
    scenes = [sample_held_out_scene(rng) for _ in range(count)]
    return [(scene, sample_prompt(scene, rng, plain)) for scene in scenes]


def rates(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of right pictures, overall and for each attribute among the scenes that have it, in [0, 1]."""
    shares = {"all": float(np.mean([verdict.all_right for verdict in verdicts]))}
    for attribute in ATTRIBUTES:
        values = [value for verdict in verdicts if (value := getattr(verdict, attribute)) is not None]
        if values:
            shares[attribute] = float(np.mean(values))
    return shares


def describe(shares: dict[str, float]) -> str:
    """The rates in percent on one line."""
    return ", ".join(f"{name} {100 * share:.1f}" for name, share in shares.items())


def evaluate(
    generate: Generate, examples: Sequence[tuple[Scene, str]], batch: int
) -> tuple[list[Image.Image], list[Verdict]]:
    """Pictures of the examples' prompts, the k-th with seed k, and what the scorer says of them."""
    images: list[Image.Image] = []
    for start in range(0, len(examples), batch):
        prompts = [prompt for _, prompt in examples[start : start + batch]]
        images += generate(prompts, range(start, start + len(prompts)))
    return images, [judge(image, scene) for image, (scene, _) in zip(images, examples, strict=True)]


def report_adherence(work: Path, model: TextToVelocity, count: int = 32) -> str:
    """The rates of a model in training on a few held-out prompts."""
    from export_stage import assemble, generate

    pipeline = assemble(work, model)
    examples = held_out_prompts(count, seed=SEED + 1)
    _, verdicts = evaluate(lambda prompts, seeds: generate(pipeline, prompts, seeds), examples, batch=16)
    return describe(rates(verdicts))


def grid(
    images: Sequence[Image.Image], captions: Sequence[str], marks: Sequence[bool], columns: int = 8
) -> Image.Image:
    """The images as tiles of 128 pixels with captions below, those whose mark is False in red."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (TILE + 8), rows * (TILE + CAPTION)), "white")
    canvas = ImageDraw.Draw(sheet)
    for index, (image, caption, right) in enumerate(zip(images, captions, marks, strict=True)):
        left, top = index % columns * (TILE + 8) + 4, index // columns * (TILE + CAPTION)
        sheet.paste(image.resize((TILE, TILE)), (left, top))
        canvas.multiline_text((left, top + TILE + 1), _wrap(caption), fill="black" if right else "red", spacing=1)
    return sheet


def _wrap(text: str, width: int = 22) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def own_generator(source: str, quant: str | None, steps: int) -> Generate:
    """Pictures by this project's pipeline."""
    from flux2_mlx import Flux2Pipeline

    pipeline = Flux2Pipeline.from_pretrained(source, quant=quant) if quant else Flux2Pipeline.from_pretrained(source)

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return pipeline(prompts, seed=seeds[0], num_inference_steps=steps).images

    return generate


def diffusers_generator(folder: Path, steps: int) -> Generate:
    """Pictures by the reference pipeline."""
    from diffusers import Flux2KleinPipeline
    from export_stage import generate

    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return lambda prompts, seeds: generate(pipeline, list(prompts), list(seeds), steps)


def parse_arguments() -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="what Flux2Pipeline.from_pretrained takes")
    parser.add_argument("--quant", help="quantisation to load the model with")
    parser.add_argument("--diffusers", type=Path, metavar="FOLDER", help="use the diffusers pipeline of FOLDER instead")
    parser.add_argument("--count", type=int, default=200, help="how many held-out prompts")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    parser.add_argument("--seed", type=int, default=SEED, help="of the choice of prompts")
    parser.add_argument("--threads", type=int, default=1, help="of the diffusers pipeline")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="write the pictures to a PNG, the wrong ones in red")
    return parser.parse_args()


def main() -> None:
    """Prints the rates and the prompts that went wrong."""
    arguments = parse_arguments()
    if arguments.diffusers:
        import torch

        torch.set_num_threads(arguments.threads)
        generate = diffusers_generator(arguments.diffusers, arguments.steps)
    else:
        generate = own_generator(arguments.model, arguments.quant, arguments.steps)
    examples = held_out_prompts(arguments.count, arguments.seed)
    images, verdicts = evaluate(generate, examples, batch=16 if arguments.diffusers else len(examples))
    for (_, prompt), verdict in zip(examples, verdicts, strict=True):
        if not verdict.all_right:
            wrong = [name for name in ATTRIBUTES if getattr(verdict, name) is False]
            print(f"wrong {', '.join(wrong)}: {prompt}")
    print(f"{len(examples)} held-out prompts, % right: {describe(rates(verdicts))}")
    if arguments.grid:
        captions = [prompt for _, prompt in examples]
        grid(images, captions, [verdict.all_right for verdict in verdicts]).save(arguments.grid)


if __name__ == "__main__":
    main()
