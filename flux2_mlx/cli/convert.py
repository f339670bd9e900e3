"""`flux2-mlx convert`."""

from pathlib import Path

import click

from ..config import get_variant
from ..errors import InputError
from .options import quiet_option, variant_option, weight_options
from .progress import Bars, conversion
from .terminal import print_result


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

    SOURCE is a model's name, a Hugging Face repo id or a folder in the diffusers layout.

    \b
    Example:
      flux2-mlx convert klein-4b klein-4b-q8 -q qint8
    """
    from .. import hub
    from ..checkpoint import is_checkpoint
    from ..convert import Source, check_target, write_checkpoint
    from ..store import look_up

    if variant is not None:
        get_variant(variant)
    check_target(target, force)
    if is_checkpoint(Path(source)):
        raise InputError(f"{source} is an MLX checkpoint already")
    known, repo = look_up(source)
    if known and repo is None:
        raise InputError(f"{source} is built in and needs no conversion")
    folder = Path(source) if repo is None else hub.fetch(repo, quiet=quiet)
    with Bars(quiet) as bars:
        write_checkpoint(
            Source.open(folder, variant or (known and known.name)),
            target,
            quant or "bf16",
            text_quant,
            name=source,
            force=force,
            progress=conversion(bars),
        )
    print_result(target)
