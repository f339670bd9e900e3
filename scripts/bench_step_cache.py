"""What a step cache saves and what that costs: curves of work against error.

    python scripts/bench_step_cache.py --steps 50 --svg scripts/bench_step_cache.svg

Of the built-in model, of that guided as base models are, by a second pass with the empty prompt, and of a small model
with random weights that is guided so. For each threshold: the passes that were skipped, the blocks that were computed
in terms of a run without a cache, its speed in those terms (by the least time of alternating runs), and the error
against it: ‖a − b‖ / ‖b‖ of latents, and PSNR of the images. Beside them are runs without a cache of fewer steps, which
is the other way to save time. Blocks are drawn, not times, since they are the same on every machine; one block is as
many operations as another, and a model of few loses more by the first one of each pass: the demo's skipped passes take
a sixth, klein-base-4b's a 25th. `--blocks` counts what streaming reads in passes of the released models.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tiny_model import VARIANT, write_source

from flux2_mlx import Flux2Output, Flux2Pipeline
from flux2_mlx.advice import workload
from flux2_mlx.config import QUANTIZATIONS, VARIANTS
from flux2_mlx.networks import Networks
from flux2_mlx.output import Passes
from flux2_mlx.request import Request

PROMPTS = ("a red circle above a blue square", "a green star on a black background", "two yellow triangles")
THRESHOLDS = (0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3)
RANDOM_THRESHOLDS = (0.6, 0.8, 1.0, 1.5, 2.5)  # what random weights add changes by more than half from step to step
COLOURS = ("#06c", "#c60", "#0a7", "#a3a")  # of each model in turn: with a cache, with fewer steps
FEWER = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.16)  # of the steps


@dataclass(frozen=True)
class Row:
    """What came of a run in terms of the whole one: the share of passes that was skipped, of blocks that were computed,
    the speed, the error of latents, and the PSNR of images."""

    name: str
    skipped: float
    work: float
    speed: float
    error: float
    psnr: float

    @property
    def of_steps(self) -> bool:
        return self.name.endswith("steps")


@dataclass
class Run:
    """A way of making the images, and what came of it."""

    name: str
    steps: int
    threshold: float = 0.0
    seconds: list[float] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    passes: Passes = field(default_factory=Passes)

    def error(self, whole: "Run") -> float:
        pairs = zip(self.latents, whole.latents, strict=True)
        return statistics.mean(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)

    def psnr(self, whole: "Run") -> float:
        """In decibels, of all images together."""
        pairs = zip(self.pictures, whole.pictures, strict=True)
        square = statistics.mean(float(np.mean((a - b) ** 2)) for a, b in pairs)
        return -10 * math.log10(square) if square else math.inf


def opened(model: str, guidance: float) -> Flux2Pipeline:
    """A model of the demo's variant; with guidance as a model that is guided by a second pass."""
    pipe = Flux2Pipeline.from_pretrained(model, variant=VARIANT, dtype="float32", prompt_cache=False)
    pipe.set_progress_bar_config(disable=True)
    if guidance > 1:
        checkpoint = replace(pipe.checkpoint, variant=replace(pipe.variant, distilled=False))
        pipe.networks = replace(pipe.networks, checkpoint=checkpoint)
    return pipe


def make(pipe: Flux2Pipeline, run: Run, prompt: str, size: int, guidance: float) -> Flux2Output:
    return pipe(
        prompt,
        width=size,
        height=size,
        num_inference_steps=run.steps,
        guidance_scale=guidance,
        step_cache=run.threshold,
        seed=5,
        output_type="latent",
    )


def measure(pipe: Flux2Pipeline, runs: list[Run], size: int, guidance: float, times: int) -> None:
    """Fill in the runs, each prompt of one after those of the others, so that other programs slow all of them."""
    for attempt in range(times):
        for prompt in PROMPTS:
            for run in runs:
                output = make(pipe, run, prompt, size, guidance)
                run.seconds.append(next(phase.seconds for phase in output.timings if phase.name == "transformer"))
                if attempt == 0:
                    run.latents.append(output.images)
                    run.pictures.append(pipe.decode(output, "np"))
                    run.passes.all += output.passes.all
                    run.passes.skipped += output.passes.skipped


def took(run: Run) -> float:
    """Seconds of all prompts, each at its fastest."""
    return sum(min(run.seconds[place :: len(PROMPTS)]) for place in range(len(PROMPTS)))


def rows(runs: list[Run], blocks: int) -> list[Row]:
    """What came of each run of a transformer of so many blocks, in terms of the first one, which is whole."""
    whole = runs[0]
    return [
        Row(
            run.name,
            (share := run.passes.skipped / run.passes.all if run.passes.all else 0.0),
            run.steps / whole.steps * (1 - share * (blocks - 1) / blocks),
            took(whole) / took(run),
            run.error(whole),
            run.psnr(whole),
        )
        for run in runs
    ]


def svg(curves: dict[str, list[Row]]) -> str:
    """The curves by what is drawn: how many times fewer blocks are computed to the right, PSNR upwards."""
    found = [row for rows in curves.values() for row in rows if math.isfinite(row.psnr)]
    low, high = (5 * edge(pick(row.psnr for row in found) / 5) for edge, pick in ((math.floor, min), (math.ceil, max)))
    most = math.ceil(max(1 / row.work for row in found))
    width, height, margin = 720, 440, 50

    def place(fewer: float, psnr: float) -> tuple[float, float]:
        right, up = (fewer - 1) / (most - 1), (psnr - low) / (high - low)
        return margin + right * (width - 2 * margin), height - margin - up * (height - 2 * margin)

    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for fewer in range(1, most + 1):
        x, y = place(fewer, low)
        parts.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{fewer}</text>')
        parts.append(f'<path d="M{x:.0f},{y:.0f} V{margin}" stroke="#ddd"/>')
    for psnr in range(low, high + 1, 5):
        x, y = place(1, psnr)
        parts.append(f'<text x="{x - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{psnr}</text>')
        parts.append(f'<path d="M{x:.0f},{y:.0f} H{width - margin}" stroke="#ddd"/>')
    ways = [(name, rows, of_steps) for name, rows in curves.items() for of_steps in (False, True)]
    for number, ((name, rows, of_steps), colour) in enumerate(zip(ways, COLOURS, strict=True)):
        drawn = [row for row in rows if row.of_steps == of_steps and math.isfinite(row.psnr)]
        points = [place(1 / row.work, row.psnr) for row in drawn]
        for row, (x, y) in zip(drawn, points, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            parts.append(f'<text x="{x + 5:.1f}" y="{y - 5:.1f}" fill="{colour}">{row.name}</text>')
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        way = "fewer steps" if of_steps else "step cache"
        parts.append(f'<text x="{width - 200}" y="{16 + 14 * number}" fill="{colour}">{name}: {way}</text>')
    parts.append(f'<text x="{margin}" y="20">PSNR in dB against the whole run</text>')
    axis = "whole run's blocks / blocks computed, counted: of a pass that is skipped, the first one"
    parts.append(f'<text x="{width - margin}" y="{height - 12}" text-anchor="end">{axis}</text>')
    size = f'width="{width}" height="{height}" font-family="sans-serif" font-size="11"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *parts, "</svg>\n"])


def streamed() -> None:
    """Print what a pass reads where all blocks are streamed, and a skipped one, in full geometry."""
    print("\nGB that a pass reads of a model of which no block stays in memory, and one that is skipped")
    for name in (name for name, variant in VARIANTS.items() if variant.repo and variant.steps >= 8):
        for quant in QUANTIZATIONS:
            networks = Networks.open(VARIANTS[name], quant=quant)
            request = Request.checked(VARIANTS[name], 16, [""])
            blocks = networks.needs(workload(request)).networks["transformer"].blocks
            print(f"{name:15}{quant:8}{sum(blocks) / 1e9:8.2f}{blocks[0] / 1e9:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--guidance", type=float, default=4.0, help="of the guided runs, above 1")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--times", type=int, default=3, help="that each run is made; the shortest counts")
    parser.add_argument("--svg", type=Path, help="where the curve is drawn")
    parser.add_argument("--blocks", action="store_true", help="also print what streaming reads")
    given = parser.parse_args()
    curves = {
        "demo": curve("demo", 1.0, given.thresholds, given),
        "demo, guided": curve("demo", given.guidance, given.thresholds, given),
    }
    with TemporaryDirectory() as made:
        curve(str(write_source(Path(made, "random"))), given.guidance, RANDOM_THRESHOLDS, given)
    if given.svg:
        given.svg.write_text(svg(curves), encoding="utf-8")
    if given.blocks:
        streamed()


def curve(model: str, guidance: float, thresholds: Sequence[float], given: argparse.Namespace) -> list[Row]:
    """Measure a model, and print what came of it."""
    runs = [Run("whole", given.steps)]
    runs += [Run(f"{threshold:g}", given.steps, threshold) for threshold in thresholds]
    fewer = dict.fromkeys(max(1, round(share * given.steps)) for share in FEWER)
    runs += [Run(f"{steps} steps", steps) for steps in fewer]
    pipe = opened(model, guidance)
    config = pipe.checkpoint.components["transformer"].config
    blocks = config.num_layers + config.num_single_layers
    measure(pipe, runs, given.size, guidance, given.times)
    print(f"\n{Path(model).name}, {blocks} blocks, guidance {guidance:g}")
    print(f"{'threshold':>10}{'skipped':>9}{'blocks':>8}{'speed':>8}{'error':>9}{'PSNR':>8}")
    found = rows(runs, blocks)
    for row in found:
        print(f"{row.name:>10}{row.skipped:9.0%}{row.work:8.0%}{row.speed:8.2f}{row.error:9.4f}{row.psnr:8.1f}")
    return found


if __name__ == "__main__":
    main()
