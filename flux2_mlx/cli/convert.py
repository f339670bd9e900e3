"""`flux2-mlx convert`."""

from pathlib import Path

import click

from .options import quiet_option, variant_option, weight_options
from .progress import Bars, conversion


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@weight_options
@variant_option
@click.option("--force", is_flag=True, help="Replace an MLX checkpoint at TARGET.")
@quiet_option
def convert(
    source: str,
    target: Path,
    quant: str | None,
    text_quant: str | None,
    variant: str | None,
    force: bool,
    quiet: bool,
) -> None:
    """Convert SOURCE into an MLX checkpoint folder TARGET.

    SOURCE is a folder in the diffusers layout or a Hugging Face repo id.

    \b
    Example:
      flux2-mlx convert black-forest-labs/FLUX.2-klein-4B klein-4b-q8 -q qint8
    """
    from .. import hub
    from ..convert import Source, check_target, write_checkpoint

    check_target(target, force)
    folder = hub.fetch(source, quiet=quiet) if hub.is_repo_id(source) else Path(source)
    with Bars(quiet) as bars:
        write_checkpoint(
            Source.open(folder, variant),
            target,
            quant or "bf16",
            text_quant,
            name=source,
            force=force,
            progress=conversion(bars),
        )
    click.echo(target)
