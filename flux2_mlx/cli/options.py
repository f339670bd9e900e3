"""Options that several commands share."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from ..config import QUANTIZATIONS


def _silence(ctx: click.Context, param: click.Parameter, quiet: bool) -> bool:
    """Drop the library's warnings until the command ends."""
    logger = logging.getLogger(__package__.partition(".")[0])
    if quiet:
        ctx.call_on_close(partial(logger.setLevel, logger.level))
        logger.setLevel(logging.ERROR)
    return quiet


quant_option = click.option(
    "-q", "--quant", type=click.Choice(QUANTIZATIONS), help="Quantization of the transformer.  [default: bf16]"
)
text_quant_option = click.option(
    "--text-quant",
    type=click.Choice(QUANTIZATIONS),
    help="Quantization of the text encoder.  [default: qint8; qint4 with -q qint4]",
)
models_dir_option = click.option(
    "--models-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where converted models are kept.  [default: $FLUX2_MLX_HOME or ~/.cache/flux2-mlx]",
)
no_cache_option = click.option("--no-cache", is_flag=True, help="Neither use nor keep encoded prompts on disk.")
variant_option = click.option("--variant", metavar="NAME", help="Which model a folder or repo holds, if it can't tell.")
quiet_option = click.option(
    "--quiet", is_flag=True, callback=_silence, help="No progress, notices or warnings on stderr."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")

image_option = click.option(
    "-i",
    "--images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="IMAGE",
    help="Image to look at; may be given several times.",
)


def weight_options(command: Callable) -> Callable:
    """`--quant` and `--text-quant`."""
    return quant_option(text_quant_option(command))


def writing_options(command: Callable) -> Callable:
    """`--seed` and `--temperature` of generated text."""
    seed = click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Makes the text repeatable.")
    temperature = click.option(
        "--temperature",
        type=click.FloatRange(0, 2),
        default=0.15,
        show_default=True,
        help="0 takes the likeliest word each time.",
    )
    return seed(temperature(command))
