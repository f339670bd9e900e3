"""`flux2-mlx lora`."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..wording import told
from .options import json_option, models_dir_option, quiet_option
from .progress import Bars, notice, size_text
from .terminal import print_result, printable, to_json
from .wakefulness import caffeinate_option

if TYPE_CHECKING:
    from ..store import Inspection, StoredAdapter

_LABEL = 11
_MAX_TEXT = 200


@click.group()
def lora() -> None:
    """Look at adapters (LoRA and its kin), and write them for other programs.

    SOURCE is a file, a folder as trainers save adapters, a Hugging Face repo id, or REPO:FILE. To make images with one
    give it to --lora of t2i, i2i and outpaint.

    \b
    Examples:
      flux2-mlx lora inspect style.safetensors
      flux2-mlx lora list
      flux2-mlx lora convert owner/name:style.safetensors style-diffusers
    """


@lora.command("inspect")
@click.argument("source")
@json_option
def inspect_command(source: str, as_json: bool) -> None:
    """Show what an adapter is, which models it is for, and what it changes.

    Of a file nothing but its header is read, or fetched from the Hub, and the numbers that changes are multiplied by.

    \b
    Examples:
      flux2-mlx lora inspect style.safetensors
      flux2-mlx lora inspect owner/name --json
    """
    from ..store import inspect_adapter

    found = inspect_adapter(source)
    if as_json:
        print_result(to_json(_values(found)))
        return
    for row in (*_summary(found), *_rows(found)):
        print_result(row)


@lora.command("list")
@models_dir_option
@json_option
def list_command(models_dir: Path | None, as_json: bool) -> None:
    """List the adapters on the disk.

    They are those in the folder loras of the models folder, and those in the Hugging Face Hub's cache.

    \b
    Examples:
      flux2-mlx lora list
      flux2-mlx lora list --json
    """
    from ..store import adapters_folder, stored_adapters

    stored = list(stored_adapters(models_dir))
    folder = adapters_folder(models_dir)
    if as_json:
        print_result(to_json({"folder": str(folder), "adapters": [_stored_values(one) for one in stored]}))
        return
    names = [_shown(one.source) for one in stored]
    width = max(map(len, names), default=0)
    for name, one in zip(names, stored, strict=True):
        print_result(f"{name:{width}}{size_text(one.nbytes):>11}  {_told(one)}")
    count = "1 adapter" if len(stored) == 1 else f"{len(stored)} adapters"
    print_result(f"{count}; those of your own belong in {_shown(str(folder))}")


@lora.command("convert")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@quiet_option
@caffeinate_option
def convert_command(source: str, target: Path, force: bool, quiet: bool) -> None:
    """Write an adapter in the layout of diffusers.

    TARGET is the file, if it ends in .safetensors, or the folder that it goes to. What it changes stays the same. LoHa,
    LoKr and whole differences become LoRA factors of the same product, which take more place; what diffusers has no
    form of is refused.

    \b
    Examples:
      flux2-mlx lora convert style.safetensors style-diffusers.safetensors
      flux2-mlx lora convert owner/name my-lora
    """
    from ..store import convert_adapter

    with Bars(quiet) as bars:
        path, notes = convert_adapter(source, target, force=force, progress=bars)
    print_result(path)
    for note in notes:
        notice(note, quiet)


def _values(found: "Inspection") -> dict[str, Any]:
    values = asdict(found)
    return {"bytes" if name == "nbytes" else name: value for name, value in values.items()}


def _stored_values(one: "StoredAdapter") -> dict[str, Any]:
    values = {"source": one.source, "path": str(one.path), "bytes": one.nbytes, "problem": one.problem}
    if (found := one.found) is None:
        return values
    own = ("kinds", "models", "trained_on", "title", "trainer", "trigger_words")
    ranks = sorted({module.rank for module in found.modules if module.rank is not None})
    return values | {name: getattr(found, name) for name in own} | {"ranks": ranks}


def _told(one: "StoredAdapter") -> str:
    """What an adapter is, in a few words."""
    if (found := one.found) is None:
        return _shown(one.problem or "")
    trigger = f", trigger words: {', '.join(map(_shown, found.trigger_words))}" if found.trigger_words else ""
    rank = _range(x.rank for x in found.modules)
    return f"{_kinds(found)}{rank and f' of rank {rank}'} for {_models(found)}{trigger}"


def _summary(found: "Inspection") -> list[str]:
    """What is known of an adapter as a whole."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    layers = " and ".join(f"{count} of the {told([network])}" for network, count in found.layers.items())
    said = {
        "title": _shown(found.title or ""),
        "trainer": _shown(found.trainer or "not known"),
        "trained on": found.trained_on if len(found.models) > 1 else None,
        "trigger": ", ".join(map(_shown, found.trigger_words)),
        "preset": found.preset and f"{found.preset}, as {_shown(found.preset.source)} says; --preset turbo sets that",
        "stored": f"{size_text(found.nbytes)}; {dtypes}",
        "names": f"as of {found.naming}",
        "rank": _range(x.rank for x in found.modules),
        "alpha": _range(x.alpha for x in found.modules),
        "times": _range(x.scale for x in found.modules),
        "layers": layers,
    }
    rows = [f"{_shown(found.source)}: {_kinds(found)} for {_models(found)}"]
    rows += [f"{label:{_LABEL}}{text}" for label, text in said.items() if text]
    rows += [f"{'note':{_LABEL}}{_shown(note)}" for note in found.notes]
    return rows + [f"{'said':{_LABEL}}{_shown(f'{key}: {text}')}" for key, text in found.metadata.items()]


def _rows(found: "Inspection") -> list[str]:
    """What becomes of each module, and of tensors that are of none."""
    ranks = ["" if module.rank is None else f" of rank {module.rank}" for module in found.modules]
    rows = {x.name: f"{x.layer}: {x.kind}{rank}" for x, rank in zip(found.modules, ranks, strict=True)}
    rows |= dict.fromkeys(found.unused, "(changes no layer)")
    width = max(len(_shown(name)) for name in rows)
    return [f"{_shown(name):{width}}  {_shown(told)}" for name, told in rows.items()]


def _models(found: "Inspection") -> str:
    return f"FLUX.2 {' or '.join(found.models)}" if found.models else "a FLUX.2 of other sizes"


def _kinds(found: "Inspection") -> str:
    return ", ".join(found.kinds) or "changes of biases"


def _shown(text: str) -> str:
    """What a file or a user says, in one line of bounded length."""
    return printable(" ".join(text.split()))[:_MAX_TEXT]


def _range(numbers: Iterable[float | None]) -> str:
    """The number that all are, or the least and the greatest; nothing if there is none."""
    found = [number for number in numbers if number is not None]
    if not found:
        return ""
    ends = dict.fromkeys((min(found), max(found)))
    return " to ".join(f"{number:.4g}" for number in ends)
