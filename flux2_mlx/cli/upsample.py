"""`flux2-mlx upsample`."""

import json
from pathlib import Path

import click

from .options import (
    image_option,
    json_option,
    memory_option,
    models_dir_option,
    quiet_option,
    text_quant_option,
    writing_options,
)
from .progress import Bars, Stream, conversion


@click.command()
@click.argument("prompt")
@click.option("-m", "--model", default="klein-4b", show_default=True, help="Whose language model to use.")
@image_option
@text_quant_option
@writing_options
@memory_option
@models_dir_option
@json_option
@quiet_option
def upsample(
    prompt: str,
    model: str,
    images: tuple[Path, ...],
    text_quant: str | None,
    seed: int | None,
    temperature: float,
    memory_limit: str | None,
    models_dir: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Rewrite PROMPT with more detail.

    With images to edit, PROMPT becomes one clear instruction; only dev's language model can see them.

    \b
    Examples:
      flux2-mlx upsample "a red fox in snow"
      flux2-mlx upsample "put the hat on the cat" -m dev -i cat.png -i hat.png
    """
    from ..images import open_image
    from ..upsampling import Writer

    pictures = [open_image(path) for path in images]
    with Bars(quiet) as bars, Stream(quiet) as stream:
        writer = Writer.from_pretrained(
            model,
            text_quant=text_quant,
            memory_limit=memory_limit,
            models_dir=models_dir,
            quiet=quiet,
            progress=conversion(bars),
        )
        answer = writer.upsample([prompt], pictures, seed=seed, temperature=temperature, on_text=stream.show)[0]
    click.echo(json.dumps({"prompt": prompt, "upsampled_prompt": answer}, ensure_ascii=False) if as_json else answer)
