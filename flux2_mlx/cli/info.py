"""`flux2-mlx info`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..config import QUANTIZATIONS, VARIANTS, Variant, get_variant
from .options import dtype_option, json_option, memory_option, models_dir_option, weight_options


@click.command()
@click.argument("model", required=False)
@weight_options
@dtype_option
@click.option(
    "-W", "--width", type=click.IntRange(16), help="Pixels of the image to plan for.  [default: 1024; demo 128]"
)
@click.option("-H", "--height", type=click.IntRange(16), help="The same.  [default: 1024; demo 128]")
@memory_option
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
    models_dir: Path | None,
    as_json: bool,
) -> None:
    """Show the models, or sizes, files and memory needs of one MODEL.

    Sizes are those of the stored weights; each network is in memory only while it is used. The memory is what making
    one image is expected to take on this machine.

    \b
    Examples:
      flux2-mlx info
      flux2-mlx info klein-9b -q qint8 -W 1536 -H 1536
    """
    rows = [_row(variant, models_dir) for variant in ([get_variant(model)] if model else VARIANTS.values())]
    if model:
        rows[0] |= _plan(get_variant(model), quant or "bf16", text_quant, dtype, width, height, memory_limit)
    if as_json:
        click.echo(json.dumps(rows[0] if model else rows))
    elif model:
        _print_one(rows[0])
    else:
        _print_all(rows)


def _row(variant: Variant, models_dir: Path | None) -> dict[str, Any]:
    from ..checkpoint import variant_sizes
    from ..convert import converted_folders

    return {
        "model": variant.name,
        "repo": variant.repo,
        "licence": variant.licence,
        "gated": variant.gated,
        "steps": variant.steps,
        "guidance": variant.guidance,
        "size": variant.size,
        "bytes": {quant: variant_sizes(variant, quant) for quant in QUANTIZATIONS},
        "folders": [str(folder) for folder in converted_folders(variant, models_dir)],
    }


def _plan(
    variant: Variant,
    quant: str,
    text_quant: str | None,
    wanted_dtype: str | None,
    width: int | None,
    height: int | None,
    memory_limit: str | None,
) -> dict[str, Any]:
    from ..checkpoint import network_dtype, variant_components
    from ..layers import activation_dtype, dtype_name
    from ..memory import Workload, memory_bytes, plan
    from ..quantization import DEFAULT_TEXT_QUANT
    from ..sampling import Request
    from ..streaming import footprint

    request = Request.checked(variant, variant.vae.token_size, [""], width=width, height=height)
    text_quant, dtype = text_quant or DEFAULT_TEXT_QUANT[quant], activation_dtype(wanted_dtype)
    components = variant_components(variant, quant, text_quant)
    networks = {name: footprint(part, network_dtype(name, dtype)) for name, part in components.items()}
    work = Workload(request.width, request.height, request.max_sequence_length)
    planned = plan(variant, networks, work, dtype, memory_bytes(memory_limit))
    return {
        "quant": quant,
        "text_quant": text_quant,
        "dtype": dtype_name(dtype),
        "width": request.width,
        "height": request.height,
        "phases": [asdict(phase) | {"peak_memory": phase.peak_memory} for phase in planned.phases],
        "peak_memory": planned.peak_memory,
        "limit": planned.limit,
        "fits": planned.fits,
    }


def _print_plan(row: dict[str, Any]) -> None:
    click.echo(
        f"memory for {row['width']}×{row['height']} with {row['quant']}, text encoder {row['text_quant']}, computed in "
        f"{row['dtype']}, in GiB:"
    )
    click.echo(f"{'phase':14}{'weights':>9}{'activations':>13}{'peak':>9}{'streamed a pass':>17}")
    for phase in row["phases"]:
        columns = ("weights", "activations", "peak_memory", "streamed")
        weights, activations, peak, streamed = (phase[name] / 2**30 for name in columns)
        click.echo(f"{phase['name']:14}{weights:9.2f}{activations:13.2f}{peak:9.2f}{streamed:17.2f}")
    verdict = "fits into" if row["fits"] else "does not fit into"
    click.echo(f"{row['peak_memory'] / 2**30:.2f} GiB {verdict} the limit of {row['limit'] / 2**30:.2f} GiB")


def _print_all(rows: list[dict[str, Any]]) -> None:
    sizes = "".join(f"{quant + ' GB':>10}" for quant in QUANTIZATIONS)
    click.echo(f"{'model':15}{'licence':20}{'steps':>6}{'guidance':>10}{sizes}  on disk")
    for row in rows:
        sizes = "".join(f"{sum(parts.values()) / 1e9:10.3f}" for parts in row["bytes"].values())
        state = f"{len(row['folders']) or 'not'} converted" if row["repo"] else "built in"
        click.echo(f"{row['model']:15}{row['licence']:20}{row['steps']:6}{row['guidance']:10.1f}{sizes}  {state}")


def _print_one(row: dict[str, Any]) -> None:
    click.echo(f"{row['model']}: {row['licence']} licence, {row['steps']} steps, guidance {row['guidance']}")
    if row["repo"]:
        click.echo(f"https://huggingface.co/{row['repo']}{' (gated)' if row['gated'] else ''}")
    components = list(row["bytes"]["bf16"])
    click.echo(f"{'GB':8}{''.join(f'{name:>16}' for name in components)}{'all':>10}")
    for quant, parts in row["bytes"].items():
        numbers = "".join(f"{parts[name] / 1e9:16.3f}" for name in components)
        click.echo(f"{quant:8}{numbers}{sum(parts.values()) / 1e9:10.3f}")
    _print_plan(row)
    for folder in row["folders"]:
        click.echo(folder)
