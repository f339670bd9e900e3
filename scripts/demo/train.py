"""Trains the demonstration model by stages: vae, refine, latents, transformer, decoder, edit-latents, edit, export.

Stages refine and decoder go on with the autoencoder; decoder, which leaves its encoder alone, can run at any time
after refine, also beside transformer. Stage restore puts the shipped weights where vae to decoder would leave theirs.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from edit_evaluation import report_edits
from edit_stage import make_edit_latents, train_edits
from evaluate import report_adherence
from export_stage import export
from flow_stage import make_latents, train_transformer
from restore_stage import restore
from training import Progress
from vae_stage import train_vae

STAGES = ("vae", "refine", "latents", "decoder", "transformer", "restore", "edit-latents", "edit", "export")


def parse_arguments() -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and cached latents")
    parser.add_argument("--output", type=Path, help="folder that export writes (default: WORK/diffusers)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="at most so many optimiser steps")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most so much training time")
    parser.add_argument("--count", type=int, default=40_000, help="how many scenes the latents stage draws")
    parser.add_argument("--families", type=int, default=4_500, help="how many pictures the edit-latents stage edits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the transformer's training step")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in WORK")
    return parser.parse_args()


def main() -> None:
    """Runs one stage."""
    arguments = parse_arguments()
    stage, work, steps, minutes = arguments.stage, arguments.work, arguments.steps, arguments.minutes
    flow = (work, Progress(steps, minutes), arguments.resume, arguments.compile)
    torch.set_num_threads(arguments.threads)
    work.mkdir(parents=True, exist_ok=True)
    if stage in ("vae", "refine", "decoder"):
        train_vae(work, steps, minutes, arguments.resume, stage)
    elif stage == "latents":
        make_latents(work, arguments.count)
    elif stage == "transformer":
        train_transformer(*flow, partial(report_adherence, work))
    elif stage == "restore":
        restore(work)
    elif stage == "edit-latents":
        make_edit_latents(work, arguments.families)
    elif stage == "edit":
        train_edits(*flow, partial(report_edits, work))
    else:
        export(work, arguments.output or work / "diffusers")


if __name__ == "__main__":
    main()
