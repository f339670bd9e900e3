"""`flux2-mlx download`."""

from pathlib import Path

import click

from ..errors import InputError
from .options import keep_source_option, models_dir_option, quiet_option, variant_option, weight_options
from .progress import Bars, source_notice
from .terminal import print_result
from .wakefulness import caffeinate_option


@click.command()
@click.argument("model")
@weight_options
@variant_option
@models_dir_option
@keep_source_option
@quiet_option
@caffeinate_option
def download(
    model: str,
    quant: str | None,
    text_quant: str | None,
    variant: str | None,
    models_dir: Path | None,
    keep_source: bool,
    quiet: bool,
) -> None:
    """Fetch MODEL and convert it, ready for `t2i`.

    MODEL is a variant's name or a Hugging Face repo id. An interrupted download goes on where it stopped. Gated
    models need an account that has accepted their licence, and its token in HF_TOKEN.

    The download stays in the Hugging Face Hub's cache, where other programs and other quantizations find it. With
    --no-keep-source what this run has fetched is removed when it is converted, and nothing else.

    \b
    Examples:
      flux2-mlx download klein-4b
      flux2-mlx download klein-9b -q qint8 --no-keep-source
    """
    from ..pipeline import Flux2Pipeline
    from ..store import resolve

    resolved = resolve(model, models_dir)
    with Bars(quiet) as bars:
        folder = Flux2Pipeline.prepare(
            resolved,
            variant=variant,
            quant=quant,
            text_quant=text_quant,
            models_dir=models_dir,
            keep_source=keep_source,
            announce=bars.announce,
            progress=bars,
        )
    if resolved.is_checkpoint:
        _check_quants(folder, quant, text_quant)
    print_result(folder)
    source_notice(resolved, keep_source, quiet)


def _check_quants(folder: Path, quant: str | None, text_quant: str | None) -> None:
    """Raise InputError if an MLX checkpoint that MODEL is itself is stored in another quantization than asked for."""
    from ..store import stored_quants

    stored = stored_quants(folder)
    if quant not in (None, stored[0]) or text_quant not in (None, stored[1]):
        raise InputError(
            f"{folder} is an MLX checkpoint already, stored as {stored[0]} with the text encoder as {stored[1]}; "
            "leave -q and --text-quant out, or convert the original"
        )
