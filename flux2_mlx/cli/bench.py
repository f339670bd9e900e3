"""`flux2-mlx bench`."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import QUANTIZATIONS
from .options import (
    dtype_option,
    json_option,
    keep_source_option,
    memory_option,
    models_dir_option,
    quiet_option,
    text_quant_option,
    variant_option,
)
from .progress import Bars, notice
from .terminal import line, print_result, to_json
from .wakefulness import caffeinate_option

if TYPE_CHECKING:
    from .. import Flux2Pipeline
    from ..benchmark import Case, Comparison, Measured, Spread

_DEMO = "demo"
_COMPARE = "compare"


class _Bench(click.Group):
    """A group whose argument is a model's name, but for those of its one command."""

    allow_interspersed_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, others, _ = self.make_parser(ctx).parse_args(list(args))
        if given.get("model") == _COMPARE:
            args = _of_comparison(args, ctx)
            ctx.allow_interspersed_args = False  # what follows are that command's options
        elif others and not ctx.resilient_parsing:
            raise click.UsageError(_too_many(str(given["model"]), others[0]), ctx)
        return super().parse_args(ctx, args)


def _of_comparison(args: list[str], ctx: click.Context) -> list[str]:
    """The arguments of a comparison in their order; those that stand before its name are its own, too."""
    place = args.index(_COMPARE)
    before, after = args[:place], args[place + 1 :]
    wrong = next((option for option in before if option not in ("--json", *ctx.help_option_names)), None)
    if wrong is not None and not ctx.resilient_parsing:
        raise click.UsageError(f"a comparison measures nothing, so {wrong} has no effect on it; leave it out", ctx)
    return [_DEMO, _COMPARE, *before, *after]


def _too_many(model: str, other: str) -> str:
    if other == _COMPARE:
        return f"a comparison is of two results, not of the model {model!r}; write `flux2-mlx bench {_COMPARE} A B`"
    return f"one model is measured at a time, {model!r} or {other!r}; give one of them"


def _sizes(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Width and height in pixels of each size."""
    return tuple(map(_size, texts))


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})(?:[x×](\d{1,5}))?", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise click.BadParameter(f"{text[:40]!r} is no size; write one such as 512 or 1024x768.")
    return int(match[1]), int(match[2] or match[1])


@dataclass
class _Report:
    """What has been measured so far; `complete` when that is all."""

    complete: bool = False
    machine: dict[str, Any] | None = None
    rows: "list[Measured]" = field(default_factory=list)


@click.group(cls=_Bench, invoke_without_command=True, subcommand_metavar=f"| {_COMPARE} A B")
@click.argument("model", default=_DEMO)
@click.option(
    "-q",
    "--quant",
    "quants",
    type=click.Choice(QUANTIZATIONS),
    multiple=True,
    help="Quantization of the transformer; may be given several times.  [default: bf16, or as few bits as the source "
    "has]",
)
@text_quant_option
@dtype_option
@click.option(
    "--size",
    "sizes",
    callback=_sizes,
    multiple=True,
    metavar="SIZE",
    help="Pixels of the image, such as 512 or 1024x768; may be given several times.  [default: 1024; demo 128]",
)
@click.option("-s", "--steps", type=click.IntRange(2, 1000), default=4, show_default=True, help="Steps of each run.")
@click.option(
    "--repeats",
    type=click.IntRange(1, 1000),
    default=3,
    show_default=True,
    help="How many runs are timed after the first one.",
)
@memory_option
@variant_option
@models_dir_option
@keep_source_option
@json_option
@quiet_option
@caffeinate_option
@click.pass_context
def bench(
    ctx: click.Context,
    model: str,
    quants: tuple[str, ...],
    sizes: tuple[tuple[int, int], ...],
    steps: int,
    repeats: int,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Measure how fast MODEL makes images here, by default the built-in demo.

    For each quantization and size there is a first run, which loads the networks, and later ones. Each phase is shown
    with its seconds, its peak of memory as a share of what was planned, and what it has read from disk. A step is
    compared with the products of its shapes, which are timed here for themselves. A MODEL that is not here yet is
    fetched and converted, as for `t2i`.

    A first run reads files as the system has them: what was read lately, by the same command for another size or by any
    program, may come from its memory. For a run from the disk restart the computer, and ask for one size.

    The object of --json is made to be shared: it tells of this machine's kind, and of no names and paths. If this is
    stopped once measuring has begun, it is whole, and says `"complete": false`; before that there is none. `bench
    compare` puts two of them side by side.

    \b
    Examples:
      flux2-mlx bench
      flux2-mlx bench klein-4b -q bf16 -q qint8 --size 512 --size 1024x768 --json > mine.json
      flux2-mlx bench compare mine.json theirs.json
    """
    if ctx.invoked_subcommand is not None:
        return
    report = _Report()
    try:
        _measure(report, _cases(model, quants, sizes, steps, quiet, settings), repeats, as_json, quiet)
    finally:
        if as_json and report.machine is not None:
            _print_json(report)


def _cases(
    model: str,
    quants: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    steps: int,
    quiet: bool,
    settings: dict[str, Any],
) -> "list[Case]":
    """What is measured, after a look that all of it can be; of the model, what is not here yet is fetched first."""
    from ..pipeline import Flux2Pipeline
    from ..store import resolve

    resolved = resolve(model, settings["models_dir"])
    of_source = {name: settings.pop(name) for name in ("keep_source", "variant")}
    cases = []
    with Bars(quiet) as bars:
        for quant in dict.fromkeys(quants) or (None,):
            folder = Flux2Pipeline.prepare(
                resolved,
                quant=quant,
                check=partial(_check, sizes=sizes, steps=steps),
                announce=bars.announce,
                progress=bars,
                **of_source,
                **settings,
            )
            opened = partial(
                Flux2Pipeline.from_checkpoint, folder, quant=quant, prompt_cache=False, name=model, **settings
            )
            _check(opened(), sizes, steps)
            cases += _sized(opened, sizes, steps)
    return cases


def _sized(opened: "Callable[[], Flux2Pipeline]", sizes: Sequence[tuple[int, int]], steps: int) -> "list[Case]":
    """A model at each size, or at its own."""
    from ..benchmark import Case

    chosen: list[tuple[int | None, int | None]] = [*dict.fromkeys(sizes)] or [(None, None)]
    return [Case(opened, width, height, steps) for width, height in chosen]


def _check(pipe: "Flux2Pipeline", sizes: Sequence[tuple[int, int]], steps: int) -> None:
    for case in _sized(lambda: pipe, sizes, steps):
        case.check(pipe)


def _measure(report: _Report, cases: "list[Case]", repeats: int, as_json: bool, quiet: bool) -> None:
    """Fill the `report`, and print each row as soon as it is known, but for JSON."""
    from ..benchmark import describe, measure

    report.machine = describe()
    if not as_json:
        click.echo(_about(report.machine))
    with closing(measure(cases, repeats, partial(notice, quiet=quiet))) as rows:
        for row in rows:
            report.rows.append(row)
            if not as_json:
                _print_row(row)
    report.complete = True


def _print_json(report: _Report) -> None:
    from ..benchmark import result

    print_result(to_json(result(report.machine, report.rows, complete=report.complete)))


def _about(machine: dict[str, Any]) -> str:
    versions = machine["versions"] or {}
    made = f"flux2-mlx {versions.get('flux2-mlx')}, MLX {versions.get('mlx')}"
    return line(f"{machine['chip']}, {machine['computes_on']}, {machine['system']}, {made}")


def _print_row(row: "Measured") -> None:
    click.echo()
    bits = f"{row.quant}, text encoder {row.text_quant}, computed in {row.dtype}"
    click.echo(f"{row.variant} {row.width}×{row.height}, {row.steps} steps, {bits}:")
    if not row.first_here:
        click.echo("its files were read for an earlier row, so that the first run may find them in memory")
    click.echo(
        f"{'seconds':14}{'first':>9}{'later':>9}{'least':>9}{'most':>9}{'peak GiB':>10}{'of plan':>9}{'read GiB':>10}"
    )
    for phase in row.phases:
        memory = f"{phase.peak_memory / 2**30:10.3g}{phase.peak_memory / phase.planned:9.2f}{phase.read / 2**30:10.3g}"
        click.echo(f"{phase.name:14}{_times(phase.cold, phase.warm)}{memory}")
    click.echo(f"{'whole run':14}{_times(row.cold, row.warm)}")
    click.echo(f"{'a step':14}{'–':>9}{_three(row.step)}  {row.ratio:.2f} times its products, {row.products:.3g} s")
    if row.expected_step is not None:
        click.echo(f"{'':14}{row.expected_step:18.3g}  is expected of this chip")


def _times(first: float, later: "Spread") -> str:
    return f"{first:9.3g}{_three(later)}"


def _three(spread: "Spread") -> str:
    return f"{spread.median:9.3g}{spread.least:9.3g}{spread.most:9.3g}"


@bench.command()
@click.argument("first", type=click.Path(path_type=Path), metavar="A")
@click.argument("second", type=click.Path(path_type=Path), metavar="B")
@json_option
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Compare two results of `bench --json`: what B took, in times of what A took.

    Of later runs and steps the medians are compared; beside them stand the least and the most that the ratio of any
    two of the measured values can be. What can't be compared, as runs of another number of steps, is "–", and said.
    Ends with 1 if the results have no model, quantization and size in common.

    \b
    Example:
      flux2-mlx bench compare mine.json theirs.json
    """
    from ..benchmark import compare as compare_results
    from ..benchmark import read_result

    found = compare_results(read_result(first), read_result(second))
    if as_json:
        print_result(to_json(asdict(found)))
    else:
        for text in _comparison(found):
            click.echo(line(text))


def _comparison(found: "Comparison") -> Iterator[str]:
    """The lines that show a comparison."""
    if found.differences:
        yield f"A and B differ, so that their ratios tell of all of it: {'; '.join(found.differences)}"
    for row in found.rows:
        yield f"{row.name}: B took, in times of A,"
        once = "–" if row.cold is None else f"{row.cold:.2f}"
        yield f"first run {once}; later runs {_ratio(row.warm)}; a step {_ratio(row.step)}; peak {row.peak_memory:.2f}"
        if row.differing:
            yield f"other things that differ: {', '.join(row.differing)}"
    for name, rows, complete in zip("AB", (found.only_first, found.only_second), found.complete, strict=True):
        if not complete:
            yield f"{name} is not whole, as it was stopped"
        if rows:
            yield f"only in {name}: {', '.join(rows)}"


def _ratio(spread: "Spread | None") -> str:
    return "–" if spread is None else f"{spread.median:.2f} ({spread.least:.2f} to {spread.most:.2f})"
