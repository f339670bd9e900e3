"""What a step cache saves and what that costs: the curve of speed against error, on the built-in model.

    python scripts/bench_step_cache.py --steps 50 --svg scripts/bench_step_cache.svg

For each threshold: the passes that were skipped, the time in terms of a run without a cache (the least of alternating
runs), and the error against that run: ‖a − b‖ / ‖b‖ of latents, and PSNR of the images. Beside them are runs without a
cache of fewer steps, which is the other way to save time. `--guidance` above 1 has the model guided as base models are,
by a second pass with the empty prompt. `--blocks` counts what streaming reads in passes of the released models.
"""

import argparse
import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from flux2_mlx import Flux2Output, Flux2Pipeline
from flux2_mlx.advice import workload
from flux2_mlx.config import QUANTIZATIONS, VARIANTS
from flux2_mlx.networks import Networks
from flux2_mlx.output import Passes
from flux2_mlx.request import Request

PROMPTS = ("a red circle above a blue square", "a green star on a black background", "two yellow triangles")
THRESHOLDS = (0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3)
FEWER = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.16)  # of the steps


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


def opened(guidance: float) -> Flux2Pipeline:
    """The built-in model; with guidance as a model that is guided by a second pass."""
    pipe = Flux2Pipeline.from_pretrained("demo", prompt_cache=False)
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


def rows(runs: list[Run]) -> list[tuple[str, float, float, float, float]]:
    """Of each run: its name, the share of passes that was skipped, its speed, its error and its PSNR."""
    whole = runs[0]
    shares = [run.passes.skipped / run.passes.all if run.passes.all else 1 - run.steps / whole.steps for run in runs]
    return [
        (run.name, share, took(whole) / took(run), run.error(whole), run.psnr(whole))
        for run, share in zip(runs, shares, strict=True)
    ]


def svg(rows: list[tuple[str, float, float, float, float]]) -> str:
    """The curve: the share of passes or steps that is saved to the right, PSNR upwards, in both ways to save."""
    width, height, margin = 640, 400, 50
    points: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    found = [psnr for *_, psnr in rows if math.isfinite(psnr)]
    low, high = 5 * math.floor(min(found) / 5), 5 * math.ceil(max(found) / 5)

    def place(share: float, psnr: float) -> tuple[float, float]:
        up = (psnr - low) / (high - low)
        return margin + share * (width - 2 * margin), height - margin - up * (height - 2 * margin)

    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x, y = place(share, low)
        parts.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{share:.0%}</text>')
        parts.append(f'<path d="M{x:.0f},{y:.0f} V{margin}" stroke="#ddd"/>')
    for psnr in range(low, high + 1, 5):
        x, y = place(0, psnr)
        parts.append(f'<text x="{x - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{psnr}</text>')
        parts.append(f'<path d="M{x:.0f},{y:.0f} H{width - margin}" stroke="#ddd"/>')
    for name, share, _, _, psnr in (row for row in rows if math.isfinite(row[-1])):
        cached = not name.endswith("steps")
        points[cached].append(place(share, psnr))
        x, y = points[cached][-1]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{"#06c" if cached else "#c60"}"/>')
        parts.append(f'<text x="{x + 6:.1f}" y="{y - 6:.1f}">{name}</text>')
    for cached, colour in ((True, "#06c"), (False, "#c60")):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points[cached])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
    parts.append(
        f'<text x="{margin}" y="20">PSNR in dB by the share of passes (blue) or steps (orange) left out</text>'
    )
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
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--times", type=int, default=3, help="that each run is made; the shortest counts")
    parser.add_argument("--svg", type=Path, help="where the curve is drawn")
    parser.add_argument("--blocks", action="store_true", help="also print what streaming reads")
    given = parser.parse_args()
    runs = [Run("whole", given.steps)]
    runs += [Run(f"{threshold:g}", given.steps, threshold) for threshold in given.thresholds]
    runs += [Run(f"{max(1, round(share * given.steps))} steps", max(1, round(share * given.steps))) for share in FEWER]
    measure(opened(given.guidance), runs, given.size, given.guidance, given.times)
    print(f"{'threshold':>10}{'left out':>10}{'speed':>8}{'error':>9}{'PSNR':>8}")
    curve = rows(runs)
    for name, share, speed, error, psnr in curve:
        print(f"{name:>10}{share:10.0%}{speed:8.2f}{error:9.4f}{psnr:8.1f}")
    if given.svg:
        given.svg.write_text(svg(curve), encoding="utf-8")
    if given.blocks:
        streamed()


if __name__ == "__main__":
    main()
