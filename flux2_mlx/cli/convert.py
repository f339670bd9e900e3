"""`flux2-mlx convert`."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import keep_source_option, quiet_option, variant_option, weight_options
from .progress import Bars, notice, source_notice
from .terminal import print_result
from .wakefulness import caffeinate_option

if TYPE_CHECKING:
    from ..store import Calibrate


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path())
@weight_options
@variant_option
@click.option("--transformer", metavar="PART", help="Where the transformer is, if not in SOURCE.")
@click.option("--text-encoder", metavar="PART", help="Where the text encoder is, if not in SOURCE.")
@click.option("--vae", metavar="PART", help="Where the VAE is, if not in SOURCE.")
@click.option("--tokenizer", metavar="PART", help="Where the tokenizer is, if not in SOURCE.")
@click.option(
    "--lora",
    multiple=True,
    metavar="SOURCE[:SCALE]",
    help="Adapter to fold in, with the scale of what it changes; may be given several times.",
)
@click.option(
    "--calibrate",
    is_flag=True,
    help="With -q mixed4, of an MLX checkpoint in bf16: try each layer in small images, and keep 8 bits where 4 change "
    "them most.",
)
@keep_source_option
@click.option("--force", is_flag=True, help="Replace an MLX checkpoint at TARGET.")
@quiet_option
@caffeinate_option
def convert(
    source: str,
    target: str,
    quant: str | None,
    text_quant: str | None,
    variant: str | None,
    lora: tuple[str, ...],
    calibrate: bool,
    keep_source: bool,
    force: bool,
    quiet: bool,
    **places: Path | None,
) -> None:
    """Convert SOURCE into an MLX checkpoint folder TARGET.

    SOURCE is a model's name, a Hugging Face repo id, a folder in the diffusers layout, a .safetensors or .gguf file of
    one or several parts, REPO:FILE for one on the Hub, or an MLX checkpoint in bf16 that is to have fewer bits; it
    means the same as MODEL does for the other commands.

    A PART that is elsewhere is a file, a folder, a repo id or REPO:FILE. What is nowhere given is taken from a
    converted model of the same geometry, or else from the official repo: only those files, which are told first.

    An adapter is folded into the weights before they are quantized, and stays there; see `flux2-mlx lora`.

    \b
    Examples:
      flux2-mlx convert klein-4b klein-4b-q8 -q qint8
      flux2-mlx convert klein-4b-bf16 klein-4b-q4 -q qint4
      flux2-mlx convert klein-4b-bf16 klein-4b-mixed -q mixed4 --calibrate
      flux2-mlx convert finetune.safetensors mine -q qint8
      flux2-mlx convert owner/name:model-Q4_K_M.gguf mine --text-encoder Qwen/Qwen3-4B
      flux2-mlx convert klein-4b fox-q8 -q qint8 --lora fox.safetensors:0.8
    """
    from ..store import convert_model
    from .loras import read

    given = {name: path for name, path in places.items() if path is not None}
    if calibrate and (quant != "mixed4" or lora or given):
        raise click.UsageError("--calibrate is for -q mixed4 of a model as it is, without --lora and other parts")
    if not target:  # which would be the current folder
        raise click.UsageError("TARGET is empty; give the folder to make")
    if os.path.islink(target) and not os.path.exists(target):
        notice(f"{target} is a link to {os.path.realpath(target)}, where nothing is yet; the model goes there", quiet)
    with Bars(quiet) as bars:
        model = convert_model(
            source,
            Path(target),
            variant=variant,
            adapters=[(one.source, one.scale) for one in read(lora, None)],
            quant=quant,
            text_quant=text_quant,
            parts=given,
            calibrate=_calibrate(bars) if calibrate else None,
            force=force,
            keep_source=keep_source,
            announce=bars.announce,
            progress=bars,
        )
    print_result(Path(target))
    source_notice(model, keep_source, quiet)


def _calibrate(bars: Bars) -> "Calibrate":
    """What measures a model, whose images a bar counts."""
    from ..calibration import calibrated

    return partial(calibrated, progress=partial(bars.show, "calibrating"))
