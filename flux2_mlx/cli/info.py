"""`flux2-mlx info`."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..config import DTYPES, QUANTIZATIONS, VARIANTS, Variant
from ..wording import told
from .identified import found_values, print_found
from .options import dtype_option, json_option, memory_option, models_dir_option, variant_option, weight_options
from .progress import notice
from .replay import elsewhere
from .report import is_image, print_settings
from .terminal import in_flags, print_result, to_json

if TYPE_CHECKING:
    from .. import Flux2Pipeline
    from ..request import Request
    from ..store import Model
    from ..store.identification import Found

Shown = TypeVar("Shown")


@click.command()
@click.argument("model", required=False)
@weight_options
@dtype_option
@click.option(
    "-W", "--width", type=click.IntRange(16), help="Pixels of the image to plan for.  [default: 1024; demo 128]"
)
@click.option("-H", "--height", type=click.IntRange(16), help="Its height in pixels.  [default: 1024; demo 128]")
@memory_option
@click.option(
    "--chip",
    metavar="NAME",
    help="Such as 'M3 Max': how long it is expected to take there, in that chip's dtype where --dtype names none.  "
    "[default: this Mac's]",
)
@variant_option
@models_dir_option
@json_option
def info(
    model: str | None,
    quant: str | None,
    text_quant: str | None,
    dtype: str | None,
    width: int | None,
    height: int | None,
    memory_limit: str | None,
    chip: str | None,
    variant: str | None,
    models_dir: Path | None,
    as_json: bool,
) -> None:
    """Show the models, what one MODEL takes, what a file of weights is, or the settings of an image.

    MODEL is a name, a repo id or a folder, as for the other commands, a file of weights of any model, here or on the
    Hub as REPO:FILE, or an image that this program has made. Sizes are those of the stored weights; each network is in
    memory only while it is used. The memory is what making one image is expected to take on this machine. With --json
    the models are a list. Of a file nothing but its header is read.

    \b
    Examples:
      flux2-mlx info
      flux2-mlx info klein-9b -q qint8 -W 1536 -H 1536
      flux2-mlx info finetune.safetensors
      flux2-mlx info owner/name:lora.safetensors
      flux2-mlx info fox.png
    """
    planning = {"quant": quant, "text-quant": text_quant, "dtype": dtype, "width": width, "height": height}
    planning |= {"memory-limit": memory_limit, "chip": chip}
    planned = [name for name, value in planning.items() if value is not None]
    if (model is None or is_image(model)) and (given := planned or ["variant"] * (variant is not None)):
        raise _about_a_model(given[0])
    if model is None:
        _put(_all_rows(models_dir), _print_all, as_json)
    elif is_image(model):
        _show_image(Path(model), as_json)
    elif found := _found(model, variant, models_dir, planned):
        _show_found(found, as_json)
    else:
        from ..device import memory_reason
        from ..pipeline import Flux2Pipeline
        from ..store import conversions, described, resolve, usual_quants

        resolved = resolve(model, models_dir)
        folders = conversions(resolved, models_dir, variant=variant, painting=True)
        outline = described(resolved, folders, variant, quant, partial(notice, quiet=False))
        quant, text_quant = usual_quants(resolved, variant, quant, text_quant)
        pipe = Flux2Pipeline.outline(
            outline,
            quant=quant,
            text_quant=text_quant,
            dtype=dtype,
            memory_limit=memory_limit,
        )
        row = _one_row(resolved, pipe, folders) | _plan(pipe, width, height, chip, has_dtype=dtype is not None)
        _put(row | {"limit_reason": None if memory_limit else memory_reason()}, _print_one, as_json)


def _show_found(found: "Found", as_json: bool) -> None:
    if as_json:
        print_result(to_json(found_values(found)))
    else:
        print_found(found)


def _show_image(path: Path, as_json: bool) -> None:
    """Show the settings of an image, and on stderr how another one would differ here."""
    from ..images import read_settings

    settings = read_settings(path)
    _put(settings, print_settings, as_json)
    if said := _elsewhere(settings, path):
        notice(said, quiet=False)


def _elsewhere(settings: dict[str, Any], image: Path) -> str | None:
    """The line of `elsewhere` about making `image` again as it was made."""
    from ..device import computing_dtype

    dtype = settings.get("dtype")
    computing_dtype(dtype if dtype in DTYPES else None)
    return elsewhere(settings, image)


def _about_a_model(option: str) -> click.UsageError:
    return click.UsageError(f"--{option} is about one model; give a MODEL")


def _found(model: str, variant: str | None, models_dir: Path | None, planned: list[str]) -> "Found | None":
    """What the weights are that `model` names; None: they are a whole model in 16 bits, or it is `planned` for."""
    from ..store import FILE, REPO, SOURCE, conversions, resolve

    resolved = resolve(model, models_dir)
    if resolved.kind not in (FILE, REPO, SOURCE):
        return None
    from ..store.identification import identify_files, identify_folder, identify_repo, is_weights

    if resolved.kind == FILE and not conversions(resolved, models_dir):
        if planned:
            raise _about_a_model(planned[0])
        return identify_repo(str(resolved.repo), resolved.file, variant)
    if planned:
        return None
    if resolved.kind == SOURCE:
        identify = identify_files if is_weights(resolved.place) else identify_folder
        return identify(resolved.place, model, variant, models_dir)
    if resolved.kind == REPO and resolved.repo and not conversions(resolved, models_dir):
        return identify_repo(resolved.repo, None, variant)
    return None


def _put(shown: Shown, show: Callable[[Shown], None], as_json: bool) -> None:
    """Print as JSON, or else as `show` does."""
    if as_json:
        print_result(to_json(shown))
    else:
        show(shown)


def _all_rows(models_dir: Path | None) -> list[dict[str, Any]]:
    from ..store import converted_folders

    folders = converted_folders(models_dir)
    return [
        {
            "model": variant.name,
            "repo": variant.repo,
            **_row(variant),
            "folders": [str(x) for x in folders[variant.name]],
        }
        for variant in VARIANTS.values()
    ]


def _row(variant: Variant) -> dict[str, Any]:
    from ..store import sizes

    return {
        "licence": variant.licence,
        "gated": variant.gated,
        "steps": variant.steps,
        "guidance": variant.guidance,
        "size": variant.size,
        "bytes": sizes(variant),
    }


def _one_row(model: "Model", pipe: "Flux2Pipeline", folders: list[Path]) -> dict[str, Any]:
    """What is known of `model`. A fine-tune is not shown as the model that it was made from."""
    from ..store import BUILT_IN, calibration, is_official, mixture

    checkpoint = pipe.checkpoint
    folders = [] if model.kind == BUILT_IN else folders
    official = model.variant is not None or is_official(checkpoint)
    row = {
        "model": checkpoint.variant.name if official else model.name,
        "kind": model.kind,
        "variant": checkpoint.variant.name,
        "official": official,
        "source": checkpoint.source.get("name"),
        "parts": checkpoint.origins,
        "adapters": checkpoint.folded,
        "layers": {str(bits): count for bits, count in mixture(checkpoint).items()},
        "calibration": calibration(checkpoint),
        "repo": checkpoint.variant.repo if official else model.repo,
        **_row(checkpoint.fitted_variant),
        "folders": [str(folder) for folder in folders],
        "verified": _verified(folders),
    }
    return row if official else row | {"licence": None, "gated": None}


def _plan(
    pipe: "Flux2Pipeline", width: int | None, height: int | None, chip: str | None, *, has_dtype: bool
) -> dict[str, Any]:
    from ..device import dtype_name

    request = pipe.request([""], width=width, height=height)
    planned, advice = pipe.expected(request)
    passes = 2 if pipe.variant.uses_cfg and request.guidance > 1 else 1
    return {
        "quant": pipe.quant,
        "text_quant": pipe.text_quant,
        "dtype": dtype_name(pipe.dtype),
        "width": request.width,
        "height": request.height,
        "phases": [asdict(phase) | {"peak_memory": phase.peak_memory} for phase in planned.phases],
        "read_a_step": passes * planned.phase("transformer").streamed,
        "peak_memory": planned.peak_memory,
        "limit": planned.limit,
        "fits": planned.fits,
        "advice": advice and in_flags(advice),
        "expected": _expected(pipe, request, chip, has_dtype=has_dtype),
    }


def _expected(pipe: "Flux2Pipeline", request: "Request", name: str | None, *, has_dtype: bool) -> dict[str, Any] | None:
    """How long a run takes here, or on the chip of that `name` in its own dtype where none is asked for."""
    from ..chips import chip_named

    chip = None if name is None else chip_named(name)
    if chip is not None and not has_dtype:
        pipe = type(pipe).outline(
            pipe.checkpoint,
            quant=pipe.quant,
            text_quant=pipe.text_quant,
            dtype=chip.dtype,
            memory_limit=pipe.memory_limit,
        )
    found = pipe.duration(request, chip=chip)
    return None if found is None else asdict(found) | {"seconds": found.seconds}


def _verified(folders: Iterable[Path]) -> dict[str, dict[str, Any] | None]:
    """When each folder was found good by `models verify`, and what has changed since; None: it never was."""
    from ..verification import remembered

    return {str(folder): (memory := remembered(folder)) and memory._asdict() for folder in folders}


def _verdict(memory: dict[str, Any] | None) -> str:
    if memory is None:
        return "not verified"
    if memory["changed"]:
        return f"changed since it was verified at {memory['time']}: {', '.join(memory['changed'])}"
    return f"verified at {memory['time']}{'' if memory['hashed'] else ', without hashes to compare with'}"


def _print_plan(row: dict[str, Any]) -> None:
    click.echo(
        f"memory for {row['width']}×{row['height']} with {row['quant']}, text encoder {row['text_quant']}, computed in "
        f"{row['dtype']}, in GiB:"
    )
    click.echo(f"{'phase':14}{'weights':>9}{'activations':>13}{'peak':>9}{'streamed a pass':>17}")
    for phase in row["phases"]:
        columns = ("weights", "activations", "peak_memory", "streamed")
        weights, activations, peak, streamed = (phase[name] / 2**30 for name in columns)
        click.echo(f"{phase['name']:14}{weights:9.3g}{activations:13.3g}{peak:9.3g}{streamed:17.3g}")
    verdict, more = ("fits into", _reading(row)) if row["fits"] else ("does not fit into", f"; {row['advice']}")
    click.echo(f"{row['peak_memory'] / 2**30:.3g} GiB {verdict} the limit of {row['limit'] / 2**30:.3g} GiB{more}")
    if row["limit_reason"]:
        click.echo(f"that limit is the default: {row['limit_reason']}; --memory-limit sets another")
    if expected := row["expected"]:
        step, whole = (_about(expected[name]) for name in ("step", "seconds"))
        besides = f"{whole} for {row['steps']} steps with text and image, besides reading from disk"
        click.echo(f"expected of an {expected['chip']} in {expected['dtype']}: about {step} a step, {besides}")


def _about(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"


def _reading(row: dict[str, Any]) -> str:
    """How much is read from disk again and again so that a run fits, as the end of a sentence."""
    text = next(phase["streamed"] for phase in row["phases"] if phase["name"] == "text_encoder")
    reads = {"for every prompt": text, "at every step": row["read_a_step"]}
    said = [f"{nbytes / 2**30:.3g} GiB {when}" for when, nbytes in reads.items() if nbytes]
    return f" by reading from disk: {' and '.join(said)}" if said else ""


def _print_all(rows: list[dict[str, Any]]) -> None:
    from ..device import device_memory, memory_reason

    sizes = "".join(f"{quant + ' GB':>10}" for quant in QUANTIZATIONS)
    click.echo(f"{'model':15}{'licence':20}{'steps':>6}{'guidance':>10}{sizes}  on disk")
    for row in rows:
        sizes = "".join(f"{sum(parts.values()) / 1e9:10.3f}" for parts in row["bytes"].values())
        state = f"{len(row['folders']) or 'not'} converted" if row["repo"] else "built in"
        click.echo(f"{row['model']:15}{row['licence']:20}{row['steps']:6}{row['guidance']:10.1f}{sizes}  {state}")
    limit = f"the default limit of a run's memory is {device_memory() / 2**30:.3g} GiB"
    click.echo(f"{limit}: {memory_reason()}; --memory-limit sets another")


def _mixture(row: dict[str, Any]) -> str:
    """How many layers of the transformer have which bits, and who chose them."""
    counts = " and ".join(f"{count} layers in {bits} bits" for bits, count in row["layers"].items())
    measured = row["calibration"]
    if measured is None:
        return f"transformer: {counts}, by their places"
    return f"transformer: {counts}, calibrated by {measured.get('prompts')} prompts at {measured.get('side')} pixels"


def _print_one(row: dict[str, Any]) -> None:
    kind = f"{row['licence']} licence" if row["official"] else f"a {row['variant']} of another source"
    print_result(f"{row['model']}: {kind}, {row['steps']} steps, guidance {row['guidance']}")
    if row["repo"]:
        print_result(f"https://huggingface.co/{row['repo']}{' (gated)' if row['gated'] else ''}")
    elif row["source"] and not row["official"]:
        print_result(f"converted from {row['source']}")
    if row["adapters"]:
        folded = ", ".join(f"{one.get('source')} × {one.get('scale')}" for one in row["adapters"])
        print_result(f"with the adapters {folded}")
    if row["layers"]:
        print_result(_mixture(row))
    for part, place in row["parts"].items():
        print_result(f"its {told([part])} from {place}")
    components = list(row["bytes"]["bf16"])
    click.echo(f"{'GB':8}{''.join(f'{name:>16}' for name in components)}{'all':>10}")
    for quant, parts in row["bytes"].items():
        numbers = "".join(f"{parts[name] / 1e9:16.3f}" for name in components)
        click.echo(f"{quant:8}{numbers}{sum(parts.values()) / 1e9:10.3f}")
    _print_plan(row)
    for folder, memory in row["verified"].items():
        print_result(f"{folder}: {_verdict(memory)}")
