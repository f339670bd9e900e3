"""`flux2-mlx doctor`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import json_option, models_dir_option
from .terminal import line, print_result, to_json
from .wakefulness import caffeinate_option

if TYPE_CHECKING:
    from ..doctor import Finding


@click.command()
@models_dir_option
@json_option
@caffeinate_option
@click.pass_context
def doctor(ctx: click.Context, models_dir: Path | None, as_json: bool) -> None:
    """Check this machine: right results, memory as planned, and speed.

    Takes some minutes, and up to 4 GB of memory and 1 GB of disk for that time. Each line says what was measured and
    what it should be; `fail` is a wrong result, `warn` a slow one. Ends with how long a step of each model takes here
    and which models fit, and with 1 if anything failed. Add the output of --json to a bug report.

    \b
    Examples:
      flux2-mlx doctor
      flux2-mlx doctor --json
    """
    from ..doctor import CheckUp, describe, fits, predictions
    from ..names import models_folder

    models = models_folder(models_dir)
    machine, findings = describe(models), []
    if not as_json:
        _print_machine(machine)
    check_up = CheckUp(models)
    for finding in check_up:
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    seconds, fitting = predictions(check_up.rates) if check_up.rates else {}, fits()
    failed = [finding.name for finding in findings if finding.verdict == "fail"]
    if as_json:
        report = {"machine": machine, "findings": list(map(asdict, findings)), "step_seconds": seconds, "fits": fitting}
        print_result(to_json(report | {"good": not failed}))
    else:
        _print_models(seconds, fitting)
    if failed:
        ctx.exit(1)


def _print_machine(machine: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    click.echo(line(f"{machine['chip']}, {machine['computes_on']}, {machine['system']}, Python {machine['python']}"))
    click.echo(line(versions))
    memory = f"{machine['memory'] / 2**30:.3g} GiB of memory"
    if machine["gpu_memory"]:
        memory += f", {machine['gpu_memory'] / 2**30:.3g} GiB for the GPU"
    click.echo(f"{memory}; limit of a run {machine['memory_limit'] / 2**30:.3g} GiB; computes in {machine['dtype']}")
    print_result(f"{machine['models_folder']}: {machine['free_disk'] / 1e9:.0f} GB free")
    click.echo()


def _print_finding(finding: "Finding") -> None:
    bound = f" ({finding.bound})" if finding.bound else ""
    advice = f": {finding.advice}" if finding.advice else ""
    click.echo(f"{finding.verdict:5} {finding.name:30}" + line(f"{finding.figure}{bound}{advice}"))


def _print_models(seconds: dict[str, float], fitting: dict[str, dict[str, Any]]) -> None:
    click.echo()
    click.echo("an image of 1024×1024; in memory, or read from disk at every step:")
    for name, quants in fitting.items():
        step = f"{seconds[name]:.3g} s a step" if name in seconds else "no speed measured"
        states = ", ".join(f"{quant} {_state(streamed)}" for quant, streamed in quants.items())
        click.echo(f"{name:10}{step:20}{states}")


def _state(streamed: int | None) -> str:
    if streamed is None:
        return "does not fit"
    return f"reads {streamed / 2**30:.3g} GiB" if streamed else "fits"
