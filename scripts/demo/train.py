"""Trains the demonstration model, stage by stage: vae, refine (of the vae), latents, transformer, export."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def parse_arguments() -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("vae", "refine", "latents", "transformer", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and cached latents")
    parser.add_argument("--output", type=Path, help="folder that export writes (default: WORK/diffusers)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="at most so many optimiser steps")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most so much training time")
    parser.add_argument("--count", type=int, default=40_000, help="how many scenes the latents stage draws")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in WORK")
    return parser.parse_args()


def main() -> None:
    """Runs one stage."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.stage in ("vae", "refine"):
        from vae_stage import train_vae

        refine = arguments.stage == "refine"
        train_vae(arguments.work, arguments.steps, arguments.minutes, arguments.resume, refine)


if __name__ == "__main__":
    main()
