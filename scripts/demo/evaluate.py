"""Measures how often the demonstration model shows what a prompt says, on prompts that training never saw.

With --edits it measures instructions: the scene asked for must appear, and what was not named must stay in its place.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image, ImageDraw
from prompts import sample_prompt
from scenes import Scene, sample_held_out_scene
from scorer import Verdict, judge

if TYPE_CHECKING:
    from flow_stage import TextToVelocity

SEED = 2024
TILE = 128
CAPTION = 44


class Generate(Protocol):
    """Makes one picture for each prompt and seed; all of them edit `image` if it is given."""

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], image: Image.Image | None = None
    ) -> list[Image.Image]: ...


def held_out_prompts(count: int, seed: int = SEED, plain: float = 0.5) -> list[tuple[Scene, str]]:
    """`count` scenes of held-out combinations with a sentence each, a share `plain` of them in the canonical form."""
    rng = np.random.default_rng(seed)
    scenes = [sample_held_out_scene(rng) for _ in range(count)]
    return [(scene, sample_prompt(scene, rng, plain)) for scene in scenes]


def rates(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of right pictures, overall and for each attribute among the scenes that have it, in [0, 1]."""
    shares = {"all": float(np.mean([verdict.all_right for verdict in verdicts]))}
    for attribute in vars(verdicts[0]):
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
    _, verdicts = evaluate(partial(generate, pipeline), examples, batch=16)
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

    def generate(prompts: Sequence[str], seeds: Sequence[int], image: Image.Image | None = None) -> list[Image.Image]:
        reference = {} if image is None else {"image": [image]}
        return pipeline(list(prompts), seed=seeds[0], num_inference_steps=steps, **reference).images

    return generate


def diffusers_generator(folder: Path, steps: int) -> Generate:
    """Pictures by the reference pipeline."""
    from diffusers import Flux2KleinPipeline
    from export_stage import generate

    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return partial(generate, pipeline, steps=steps)


def parse_arguments() -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="what Flux2Pipeline.from_pretrained takes")
    parser.add_argument("--quant", help="quantisation to load the model with")
    parser.add_argument("--diffusers", type=Path, metavar="FOLDER", help="use the diffusers pipeline of FOLDER instead")
    parser.add_argument("--edits", action="store_true", help="measure edits of pictures instead of prompts")
    parser.add_argument("--count", type=int, default=200, help="how many held-out prompts or edits")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    parser.add_argument("--seed", type=int, default=SEED, help="of the choice of prompts or edits")
    parser.add_argument("--threads", type=int, default=1, help="of the diffusers pipeline")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="write the pictures to a PNG, the wrong ones in red")
    return parser.parse_args()


def measure_prompts(generate: Generate, arguments: argparse.Namespace) -> None:
    """Prints the rates and the prompts that went wrong."""
    examples = held_out_prompts(arguments.count, arguments.seed)
    images, verdicts = evaluate(generate, examples, batch=16 if arguments.diffusers else len(examples))
    prompts = [prompt for _, prompt in examples]
    print_wrong(prompts, verdicts)
    print(f"{len(examples)} held-out prompts, % right: {describe(rates(verdicts))}")
    if arguments.grid:
        grid(images, prompts, [verdict.all_right for verdict in verdicts]).save(arguments.grid)


def measure_edits(generate: Generate, arguments: argparse.Namespace) -> None:
    """Prints the rates and the instructions that went wrong."""
    from edit_evaluation import describe_kinds, evaluate_edits, held_out_edits

    examples = held_out_edits(arguments.count, arguments.seed)
    images, verdicts = evaluate_edits(generate, examples)
    instructions = [instruction for _, instruction in examples]
    print_wrong(instructions, verdicts)
    print(f"{len(examples)} held-out edits, % right: {describe_kinds(examples, verdicts)}")
    if arguments.grid:
        tiles = [
            tile for image, (edit, _) in zip(images, examples, strict=True) for tile in (edit.before.draw(), image)
        ]
        captions = [caption for instruction in instructions for caption in (instruction, "")]
        marks = [verdict.all_right for verdict in verdicts for _ in range(2)]
        grid(tiles, captions, marks).save(arguments.grid)


def print_wrong(sentences: Sequence[str], verdicts: Sequence[Verdict]) -> None:
    """Prints the sentences whose pictures are not all right, and in what."""
    for sentence, verdict in zip(sentences, verdicts, strict=True):
        if not verdict.all_right:
            print(f"wrong {', '.join(verdict.wrong)}: {sentence}")


def main() -> None:
    """Measures one model."""
    arguments = parse_arguments()
    if arguments.diffusers:
        import torch

        torch.set_num_threads(arguments.threads)
        generate = diffusers_generator(arguments.diffusers, arguments.steps)
    else:
        generate = own_generator(arguments.model, arguments.quant, arguments.steps)
    measure = measure_edits if arguments.edits else measure_prompts
    measure(generate, arguments)


if __name__ == "__main__":
    main()
