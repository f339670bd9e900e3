"""`flux2-mlx convert`."""

from pathlib import Path

import click

from ..errors import InputError
from .options import keep_source_option, quiet_option, variant_option, weight_options
from .progress import Bars, source_notice
from .terminal import print_result
from .wakefulness import caffeinate_option


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@weight_options
@variant_option
@keep_source_option
@click.option("--force", is_flag=True, help="Replace an MLX checkpoint at TARGET.")
@quiet_option
@caffeinate_option
def convert(
    source: str,
    target: Path,
    quant: str | None,
    text_quant: str | None,
    variant: str | None,
    keep_source: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Convert SOURCE into an MLX checkpoint folder TARGET.

    SOURCE is a model's name, a Hugging Face repo id, a folder in the diffusers layout, or an MLX checkpoint in bf16
    that is to have fewer bits; it means the same as MODEL does for the other commands.

    \b
    Examples:
      flux2-mlx convert klein-4b klein-4b-q8 -q qint8
      flux2-mlx convert klein-4b-bf16 klein-4b-q4 -q qint4
    """
    from ..convert import check_target
    from ..names import BUILT_IN
    from ..store import checked_variant, make_checkpoint, resolve

    model = resolve(source)
    variant = checked_variant(model, variant)
    check_target(target, force)
    if model.kind == BUILT_IN:
        raise InputError(f"{source} is built in and needs no conversion")
    with Bars(quiet) as bars:
        make_checkpoint(
            model,
            target,
            quant,
            text_quant,
            variant=variant,
            force=force,
            keep_source=keep_source,
            announce=bars.announce,
            progress=bars,
        )
    print_result(target)
    source_notice(model, keep_source, quiet)
