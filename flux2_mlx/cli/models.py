"""`flux2-mlx models`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import json_option, models_dir_option, quiet_option
from .progress import Bars
from .terminal import print_result, printable, to_json

if TYPE_CHECKING:
    from ..verification import Report


@click.group()
def models() -> None:
    """Look after converted models.

    \b
    Example:
      flux2-mlx models verify klein-4b
    """


@models.command()
@click.argument("model")
@models_dir_option
@json_option
@quiet_option
@click.pass_context
def verify(ctx: click.Context, model: str, models_dir: Path | None, as_json: bool, quiet: bool) -> None:
    """Read all of MODEL and say what of it is damaged.

    MODEL is a name, whose converted folders are all verified, or one converted folder. Every file is compared with the
    hash that was recorded when it was written, and every value is looked at. What was found good is remembered, and
    `info` tells. Ends with 1 if anything is wrong.

    \b
    Examples:
      flux2-mlx models verify klein-4b
      flux2-mlx models verify ./my-model --json
    """
    from ..names import demo_folder
    from ..store import named_checkpoints
    from ..verification import verify as verify_folder

    folders, good = [], True
    for folder in named_checkpoints(model, models_dir):
        with Bars(quiet) as bars:
            report = verify_folder(folder, partial(bars.show, "verify"))
        built_in = folder.resolve() == demo_folder().resolve()
        remembered = not built_in and report.remember()
        folders.append(_row(report, remembered))
        good = good and not report.problems
        if not as_json:
            _print(report, remembered or built_in)
    if as_json:
        print_result(to_json({"good": good, "folders": folders}))
    if not good:
        ctx.exit(1)


def _row(report: "Report", remembered: bool) -> dict[str, Any]:
    return {
        "folder": str(report.folder),
        "good": not report.problems,
        "hashes": report.hashed,
        "remembered": remembered and not report.problems,
        "problems": [{"file": x.file, "tensor": x.tensor, "problem": x.what} for x in report.problems],
    }


def _print(report: "Report", remembered: bool) -> None:
    for problem in report.problems:
        print_result(printable(f"{report.folder}: {problem}"))
    if not report.hashed:
        print_result(
            f"{report.folder}: no hashes were recorded, so other values can't be told; convert the model again to have "
            "them"
        )
    if not report.problems:
        note = "" if remembered else "; this can't be noted in the folder"
        verdict = "all good" if report.hashed else "nothing bad found"
        print_result(f"{report.folder}: {len(report.files)} files, {verdict}{note}")
