"""`flux2-mlx convert`."""

from pathlib import Path

import click

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

    SOURCE is a model's name, a Hugging Face repo id or a folder in the diffusers layout; it means the same as MODEL
    does for the other commands.

    \b
    Example:
      flux2-mlx convert klein-4b klein-4b-q8 -q qint8
    """
    from ..convert import check_target, write_checkpoint
    from ..names import BUILT_IN
    from ..store import checked_variant, open_source, resolve

    model = resolve(source)
    variant = checked_variant(model, variant)
    check_target(target, force)
    if model.kind == BUILT_IN:
        raise InputError(f"{source} is built in and needs no conversion")
    if model.is_checkpoint:
        raise InputError(f"{source} is an MLX checkpoint already")
    opened = open_source(model, variant, quiet=quiet)
    with Bars(quiet) as bars:
        write_checkpoint(
            opened,
            target,
            quant or "bf16",
            text_quant,
            name=model.origin,
            force=force,
            progress=conversion(bars),
        )
    print_result(target)
