"""`flux2-mlx download`."""

from pathlib import Path

import click

from ..errors import InputError
from .options import models_dir_option, quiet_option, variant_option, weight_options
from .progress import Bars, conversion, notice
from .terminal import print_result


@click.command()
@click.argument("model")
@weight_options
@variant_option
@models_dir_option
@quiet_option
def download(
    model: str, quant: str | None, text_quant: str | None, variant: str | None, models_dir: Path | None, quiet: bool
) -> None:
    """Fetch MODEL and convert it, ready for `t2i`.

    MODEL is a variant's name or a Hugging Face repo id. An interrupted download goes on where it stopped. Gated
    models need an account that has accepted their licence, and its token in HF_TOKEN.

    \b
    Examples:
      flux2-mlx download klein-4b
      flux2-mlx download klein-9b -q qint8
    """
    from ..store import find_checkpoint, resolve

    resolved = resolve(model, models_dir)
    if (row := resolved.variant) and not row.commercial_use:
        notice(f"{row.name}: {row.licence} licence", quiet)
    with Bars(quiet) as bars:
        folder = find_checkpoint(
            resolved,
            variant=variant,
            quant=quant,
            text_quant=text_quant,
            models_dir=models_dir,
            quiet=quiet,
            progress=conversion(bars),
        )
    _check_quants(folder, quant, text_quant)
    print_result(folder)


def _check_quants(folder: Path, quant: str | None, text_quant: str | None) -> None:
    """Raise InputError if an MLX checkpoint that MODEL is itself is stored in another quantization than asked for."""
    from ..checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    stored = (checkpoint.quant, checkpoint.text_quant)
    if quant not in (None, stored[0]) or text_quant not in (None, stored[1]):
        raise InputError(
            f"{folder} is an MLX checkpoint already, stored as {stored[0]} with the text encoder as {stored[1]}; "
            "leave -q and --text-quant out, or convert the original"
        )
