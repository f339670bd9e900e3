"""`flux2-mlx info`."""

import json
from pathlib import Path
from typing import Any

import click

from ..config import QUANTIZATIONS, VARIANTS, Variant, get_variant
from .options import json_option, models_dir_option


@click.command()
@click.argument("model", required=False)
@models_dir_option
@json_option
def info(model: str | None, models_dir: Path | None, as_json: bool) -> None:
    """Show the models, or the sizes and the files of one MODEL.

    Sizes are those of the stored weights; each network is in memory only while it is used.

    \b
    Examples:
      flux2-mlx info
      flux2-mlx info klein-9b
    """
    rows = [_row(variant, models_dir) for variant in ([get_variant(model)] if model else VARIANTS.values())]
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
    click.echo(f"{'GB':8}{''.join(f'{name:>14}' for name in components)}{'all':>10}")
    for quant, parts in row["bytes"].items():
        numbers = "".join(f"{parts[name] / 1e9:14.3f}" for name in components)
        click.echo(f"{quant:8}{numbers}{sum(parts.values()) / 1e9:10.3f}")
    for folder in row["folders"]:
        click.echo(folder)
