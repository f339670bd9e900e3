"""Count what a denoising step makes a GPU do, before and after, in the full geometry of every variant.

Nothing is computed and no weights are needed: a stand-in for a Mac's GPU counts what it is asked for. Before is a wait
after each part of a sequence and a kernel for each operation, after is what a plan takes where there is memory.

    python scripts/count_step.py                     # half a minute
    python scripts/count_step.py klein-4b --sides 1024
"""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.fake_gpu import count_step, pretend

from flux2_mlx import device
from flux2_mlx.config import VARIANTS, TransformerConfig
from flux2_mlx.transformer.execution import PLAIN, Execution, executions

HEAD = "| model | size | waits | kernels | GB through elementwise kernels |\n|---|--:|--:|--:|--:|"


def fastest(config: TransformerConfig, chip: str) -> Execution:
    """How a step is computed where there is memory for it."""
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        patch.setattr(device, "chip", lambda: f"Apple {chip}")
        return next(executions(config))


def row(name: str, side: int, chip: str) -> str:
    config = VARIANTS[name].transformer
    with pytest.MonkeyPatch.context() as patch:
        before, after = (count_step(patch, config, side, way) for way in (PLAIN, fastest(config, chip)))
    figures = [(str(x.waits), f"{x.kernels:,}", f"{x.nbytes / 1e9:.3g}") for x in (before, after)]
    return " | ".join([f"| {name} | {side}²", *map(" → ".join, zip(*figures, strict=True))]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[name for name, variant in VARIANTS.items() if variant.repo])
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--chip", default="M3 Max", help="faster ones take longer parts of a sequence at one time")
    arguments = parser.parse_args()
    print(HEAD)
    for name in arguments.models:
        for side in arguments.sides:
            print(row(name, side, arguments.chip), flush=True)


if __name__ == "__main__":
    main()
