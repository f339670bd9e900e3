"""`flux2-mlx models`."""

from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from .options import json_option, models_dir_option, quiet_option
from .progress import Bars, notice, size_text
from .terminal import print_result, printable, to_json
from .wakefulness import caffeinate_option

if TYPE_CHECKING:
    from ..store.inventory import Item
    from ..verification import Report


@click.group(invoke_without_command=True)
@models_dir_option
@json_option
@click.pass_context
def models(ctx: click.Context, models_dir: Path | None, as_json: bool) -> None:
    """List the models on the disk, and look after them.

    The list has converted models, their downloads in the Hugging Face Hub's cache, encoded prompts, and what runs that
    were cut short have left, with sizes and the time of the last use.

    \b
    Examples:
      flux2-mlx models
      flux2-mlx models rm klein-4b --only source
      flux2-mlx models verify klein-4b
    """
    ctx.obj = models_dir
    if ctx.invoked_subcommand is not None:
        return
    folder, items = _inventory(models_dir)
    if as_json:
        rows = [_values(item) for item in items]
        print_result(to_json({"folder": str(folder), "bytes": sum(item.nbytes for item in items), "items": rows}))
    else:
        _list(folder, items)


def _inventory(models_dir: Path | None) -> "tuple[Path, list[Item]]":
    from ..store import models_folder
    from ..store.inventory import inventory

    folder = models_folder(models_dir)
    return folder, inventory(folder)


def _values(item: "Item") -> dict[str, Any]:
    return {
        "kind": item.kind,
        "name": item.name,
        "path": str(item.path),
        "bytes": item.nbytes,
        "last_used": None if item.used is None else _time(item.used).isoformat(timespec="seconds"),
        "note": item.note,
        "removable": item.removable,
    }


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _list(folder: Path, items: "list[Item]") -> None:
    width = max((len(item.name) for item in items), default=0)
    for item in items:
        used = "" if item.used is None else f"{_time(item.used):%Y-%m-%d}"
        row = f"{item.kind:12}{item.name:{width}}{size_text(item.nbytes):>11}  {used:12}{item.note}"
        print_result(printable(row.rstrip()))
    removable = sum(item.nbytes for item in items if item.removable)
    print_result(f"{size_text(removable)} can be removed with `flux2-mlx models rm`; converted models are in {folder}")


@models.command()
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option(
    "--only", type=click.Choice(["converted", "source"]), help="Only what is converted, or only its download."
)
@click.option("--prompts", is_flag=True, help="Also the encoded prompts.")
@click.option("--leftovers", is_flag=True, help="Also what conversions and runs that were cut short have left.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@models_dir_option
@quiet_option
@click.pass_context
def rm(
    ctx: click.Context,
    names: tuple[str, ...],
    only: str | None,
    prompts: bool,
    leftovers: bool,
    yes: bool,
    models_dir: Path | None,
    quiet: bool,
) -> None:
    """Remove models from the disk.

    NAME is one of the list of `flux2-mlx models`, or a model's name, which stands for all that was made of it and its
    download. Files that are not the program's own, and what links lead to, always stay, and so does what a download,
    conversion or run has in use.

    \b
    Examples:
      flux2-mlx models rm klein-4b-qint4
      flux2-mlx models rm klein-4b --only source
      flux2-mlx models rm --prompts --yes
    """
    _, items = _inventory(models_dir or ctx.obj)
    kinds = {"prompts"} if prompts else set()
    kinds |= {"leftover", "unfinished"} if leftovers else set()
    if not names and not kinds:
        raise click.UsageError("give the NAME of what is to be removed, --prompts or --leftovers")
    chosen = [item for item in items if item.kind in kinds]
    for name in names:
        chosen += [item for item in _named(name, items, only) if item not in chosen]
    for item in chosen:
        notice(f"{item.kind} {item.name}: {size_text(item.nbytes)}, {item.path}", quiet and yes)
    if chosen and not yes:
        _ask(f"Remove {size_text(sum(item.nbytes for item in chosen))}?")
    with ExitStack() as claims:
        for item in chosen:  # all of them first: nothing is removed if one is in use
            claims.enter_context(item.claim())
        for item in chosen:
            stayed = item.remove()
            print_result(item.path)
            if stayed:
                notice(f"{len(stayed)} files that are not ours stay, such as {stayed[0]}", quiet)


def _named(name: str, items: "list[Item]", only: str | None) -> "list[Item]":
    """What `name` stands for; InputError if that is nothing, or can't be removed."""
    kinds = {"converted": ["converted"], "source": ["source"], None: ["converted", "source", "other"]}[only]
    found = [item for item in items if item.kind in kinds and name.lower() in item.names]
    if not found:
        what = f"no {only} model" if only else "nothing"
        raise InputError(f"there is {what} called {name!r}; `flux2-mlx models` lists what there is")
    for item in found:
        if not item.removable:
            raise InputError(f"{item.path} is {item.note}, so it stays; remove it yourself")
    return found


def _ask(question: str) -> None:
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)
        agreed = False
    if not agreed:
        raise InputError("nothing was removed; answer y, or pass --yes")


@models.command()
@click.argument("model")
@models_dir_option
@json_option
@quiet_option
@caffeinate_option
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
    from ..store import demo_folder, named_checkpoints
    from ..verification import verify as verify_folder

    folders = []
    good = True
    for folder in named_checkpoints(model, models_dir or ctx.obj):
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
        "manifest_hash": report.sealed,
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
    elif not report.sealed:
        print_result(
            f"{report.folder}: flux2.json has no hash of its own, so changes in it can't be told; convert the model "
            "again to have one"
        )
    if not report.problems:
        note = "" if remembered else "; this can't be noted in the folder"
        verdict = "all good" if report.hashed else "nothing bad found"
        print_result(f"{report.folder}: {len(report.files)} files, {verdict}{note}")
