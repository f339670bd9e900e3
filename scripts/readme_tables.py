"""Write the README's tables of commands, options and arguments, as the code has them.

    python scripts/readme_tables.py --readme README.md

They stand between two marks at its end. Without `--readme` they are printed.
"""

import argparse
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click

from flux2_mlx import Flux2Output, Flux2Pipeline
from flux2_mlx.cli.main import cli

MARKS = "<!-- reference -->\n", "<!-- end of reference -->\n"
CALLS = {
    "Flux2Pipeline.from_pretrained": Flux2Pipeline.from_pretrained,
    "pipe": Flux2Pipeline.__call__,
    "pipe.decode": Flux2Pipeline.decode,
    "out.save": Flux2Output.save,
}
# Methods that a line says enough of.
METHODS = ("encode_prompt", "upsample_prompt", "describe_image", "decode", "set_progress_bar_config")


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command by its name, those of groups included, and no hidden ones."""
    for name, command in sorted(cli.commands.items()):
        if command.hidden:
            continue
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", one) for sub, one in sorted(command.commands.items()))


def commands_table() -> str:
    rows = ["| command | what it does |", "|---|---|"]
    for name, command in commands():
        arguments = " ".join(_metavar(one) for one in command.params if isinstance(one, click.Argument))
        words = f"flux2-mlx {name} {arguments}".strip()
        rows.append(f"| `{words}` | {_cell(command.get_short_help_str(200))} |")
    return "\n".join(rows)


def options_table() -> str:
    """Each option once, with the commands that have it in these words."""
    owners: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, command in commands():
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                owners[_spelled(option), _cell(option.help or "")].append(name)
    rows = ["| option | of | meaning |", "|---|---|---|"]
    for (spelled, meaning), names in sorted(owners.items(), key=lambda row: row[0][0].lstrip("-").lower()):
        rows.append(f"| {spelled} | {', '.join(names)} | {meaning} |")
    return "\n".join(rows)


def arguments_table(name: str, call: Callable) -> str:
    """What a method's docstring says of its arguments, with their defaults."""
    parameters = inspect.signature(call).parameters
    rows = [f"| `{name}(…)` | default | meaning |", "|---|---|---|"]
    for argument, meaning in described(call):
        default = parameters[argument].default if argument in parameters else inspect.Parameter.empty
        shown = "–" if default is inspect.Parameter.empty else f"`{default!r}`"
        rows.append(f"| `{argument}` | {shown} | {_cell(meaning)} |")
    return "\n".join(rows)


def methods_table() -> str:
    """The other methods of a pipeline, each with the beginning of its docstring."""
    rows = ["| method | what it gives |", "|---|---|"]
    for name in METHODS:
        method = getattr(Flux2Pipeline, name)
        arguments = ", ".join(list(inspect.signature(method).parameters)[1:])
        first = inspect.cleandoc(method.__doc__).partition("\n\n")[0]
        rows.append(f"| `pipe.{name}({arguments})` | {_cell(first)} |")
    return "\n".join(rows)


def described(call: Callable) -> list[tuple[str, str]]:
    """The arguments of a docstring's section `Args:`, each with its text in one line."""
    found = re.search(r"^Args:\n((?: +.*\n|\n)+)", f"{inspect.cleandoc(call.__doc__ or '')}\n", re.M)
    if not found:
        return []
    items = re.findall(r"^    ([\w, *]+): (.*(?:\n      +.*)*)", found[1], re.M)
    return [(name.strip(), " ".join(text.split())) for names, text in items for name in names.split(",")]


def tables() -> str:
    """All of them, as Markdown."""
    calls = "\n\n".join(arguments_table(name, call) for name, call in CALLS.items())
    return f"{commands_table()}\n\n{options_table()}\n\n{calls}\n\n{methods_table()}\n"


def _metavar(argument: click.Argument) -> str:
    metavar = argument.make_metavar(click.Context(click.Command("flux2-mlx")))
    return metavar.upper()


def _spelled(option: click.Option) -> str:
    return " ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write(path: Path, made: str) -> None:
    """Put what was `made` between the marks of the file."""
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(f"(?<={re.escape(MARKS[0])}).*?(?={re.escape(MARKS[1])})", re.DOTALL)
    if not pattern.search(text):
        sys.exit(f"{path} has no marks {MARKS[0].strip()} and {MARKS[1].strip()}")
    path.write_text(pattern.sub(lambda _: f"\n{made}\n", text), encoding="utf-8")


def main(words: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, help="write them there")
    arguments = parser.parse_args(words)
    if arguments.readme:
        write(arguments.readme, tables())
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main()
