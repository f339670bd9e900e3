"""`flux2-mlx doctor`."""

from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import json_option, models_dir_option, quiet_option
from .progress import notice
from .terminal import in_flags, line, print_result, to_json
from .wakefulness import caffeinate_option

if TYPE_CHECKING:
    from ..doctor import Finding


@dataclass
class _Report:
    """What is known so far; `complete` when that is all."""

    complete: bool = False
    machine: dict[str, Any] | None = None
    findings: "list[Finding]" = field(default_factory=list)
    step_seconds: dict[str, float] = field(default_factory=dict)
    fits: dict[str, dict[str, int | None]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return self.complete and all(finding.verdict != "fail" for finding in self.findings)


@click.command()
@models_dir_option
@json_option
@quiet_option
@caffeinate_option
@click.pass_context
def doctor(ctx: click.Context, models_dir: Path | None, as_json: bool, quiet: bool) -> None:
    """Check this machine: right results, memory as planned, and speed.

    Takes some minutes, and up to 4 GB of memory and 1 GB of disk for that time. Each line says what was measured and
    what it should be; `fail` is a wrong result, `warn` a slow one, `skip` what can't be measured here. Ends with how
    long a step of each model takes here and which models fit, and with 1 if anything failed. Add the output of --json
    to a bug report; it is whole even if this is stopped, and then says `"complete": false`.

    \b
    Examples:
      flux2-mlx doctor
      flux2-mlx doctor --json
    """
    report = _Report()
    try:
        _examine(report, models_dir, as_json, quiet or as_json)
    finally:
        if as_json:
            print_result(to_json(asdict(report) | {"good": report.good}))
    if not report.good:
        ctx.exit(1)


def _examine(report: _Report, models_dir: Path | None, as_json: bool, quiet: bool) -> None:
    """Fill the `report`, and print what is known as soon as it is, but for JSON."""
    from ..doctor import CheckUp, describe, predictions
    from ..store import models_folder

    models = models_folder(models_dir)
    report.machine = describe(models)
    if not as_json:
        _print_machine(report.machine)
    check_up = CheckUp(models, partial(_begin, quiet=quiet))
    with closing(iter(check_up)) as findings:
        for finding in findings:
            finding = replace(finding, advice=in_flags(finding.advice))
            report.findings.append(finding)
            if not as_json:
                _print_finding(finding)
    report.fits = check_up.fitting
    if check_up.rates:
        report.step_seconds = predictions(check_up.rates)
    report.complete = True
    if not as_json:
        _print_models(report)


def _begin(name: str, quiet: bool) -> None:
    notice(f"checking: {name}", quiet)


def _print_machine(machine: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {number}" for name, number in (machine["versions"] or {}).items())
    click.echo(line(f"{machine['chip']}, {machine['computes_on']}, {machine['system']}, Python {machine['python']}"))
    click.echo(line(versions))
    gpu = f"{_gib(machine['gpu_memory'])} for the GPU, " if machine["gpu_memory"] else ""
    buffer = f"largest buffer {_gib(machine['largest_buffer'])}"
    click.echo(f"{_gib(machine['memory'])} of memory, {gpu}{buffer}; limit of a run {_gib(machine['memory_limit'])}")
    tf32 = {True: "on", False: "off", None: "not told"}[machine["tf32"]]
    click.echo(f"computes in {machine['dtype']}; TF32 {tf32}")
    free = "unknown" if machine["free_disk"] is None else f"{machine['free_disk'] / 1e9:.0f} GB"
    print_result(f"{machine['models_folder']}: {free} free")
    click.echo()


def _gib(nbytes: int | None) -> str:
    return "not told" if nbytes is None else f"{nbytes / 2**30:.3g} GiB"


def _print_finding(finding: "Finding") -> None:
    bound = f" ({finding.bound})" if finding.bound else ""
    advice = f": {finding.advice}" if finding.advice else ""
    click.echo(f"{finding.verdict:5} {finding.name:30}" + line(f"{finding.figure}{bound}{advice}"))


def _print_models(report: _Report) -> None:
    click.echo()
    click.echo("an image of 1024×1024; in memory, or read from disk at every step:")
    for name in report.fits or report.step_seconds:
        step = f"{report.step_seconds[name]:.3g} s a step" if name in report.step_seconds else "no speed measured"
        states = ", ".join(f"{quant} {_state(streamed)}" for quant, streamed in report.fits.get(name, {}).items())
        click.echo(f"{name:10}{step:20}{states}".rstrip())


def _state(streamed: int | None) -> str:
    if streamed is None:
        return "does not fit"
    return f"reads {streamed / 2**30:.3g} GiB" if streamed else "fits"
