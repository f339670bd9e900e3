"""`flux2-mlx convert`."""

from pathlib import Path

import click

from .options import keep_source_option, quiet_option, variant_option, weight_options
from .progress import Bars, source_notice
from .terminal import print_result
from .wakefulness import caffeinate_option

_PLACE = click.Path(path_type=Path)


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@weight_options
@variant_option
@click.option("--transformer", type=_PLACE, help="Where the transformer is, if not in SOURCE.")
@click.option("--text-encoder", type=_PLACE, help="Where the text encoder is, if not in SOURCE.")
@click.option("--vae", type=_PLACE, help="Where the VAE is, if not in SOURCE.")
@click.option("--tokenizer", type=_PLACE, help="Folder of tokenizer.json, if it is not in SOURCE.")
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
    **places: Path | None,
) -> None:
    """Convert SOURCE into an MLX checkpoint folder TARGET.

    SOURCE is a model's name, a Hugging Face repo id, a folder in the diffusers layout, a .safetensors file of one or
    several parts, or an MLX checkpoint in bf16 that is to have fewer bits; it means the same as MODEL does for the
    other commands. Parts that are elsewhere are files or folders given by their options; what a file lacks then is
    taken from a converted model of the same geometry.

    \b
    Examples:
      flux2-mlx convert klein-4b klein-4b-q8 -q qint8
      flux2-mlx convert klein-4b-bf16 klein-4b-q4 -q qint4
      flux2-mlx convert finetune.safetensors mine -q qint8
    """
    from ..store import convert_model

    with Bars(quiet) as bars:
        model = convert_model(
            source,
            target,
            variant=variant,
            quant=quant,
            text_quant=text_quant,
            parts={name: path for name, path in places.items() if path is not None},
            force=force,
            keep_source=keep_source,
            announce=bars.announce,
            progress=bars,
        )
    print_result(target)
    source_notice(model, keep_source, quiet)
