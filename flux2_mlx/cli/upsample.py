"""`flux2-mlx upsample`."""

from pathlib import Path
from typing import Any

import click

from .options import image_option, writing_options
from .progress import Bars, Stream
from .terminal import print_result, to_json
from .writing import check_sight, open_writer


@click.command()
@click.argument("prompt")
@click.option("-m", "--model", default="klein-4b", show_default=True, help="Whose language model to use.")
@image_option
@writing_options
def upsample(
    prompt: str,
    model: str,
    images: tuple[Path, ...],
    seed: int | None,
    temperature: float,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Rewrite PROMPT with more detail.

    With images to edit, PROMPT becomes one clear instruction; only dev's language model can see them.

    \b
    Examples:
      flux2-mlx upsample "a red fox in snow"
      flux2-mlx upsample "put the hat on the cat" -m dev -i cat.png -i hat.png
    """
    from ..images import open_image
    from ..store import resolve
    from ..upsampling import check_prompts

    check_prompts([prompt])
    pictures = [open_image(path) for path in images]
    resolved = resolve(model, options["models_dir"])
    if pictures:
        check_sight(resolved)
    with Bars(quiet) as bars, Stream(quiet) as stream:
        writer = open_writer(resolved, bars, **options)
        answer = writer.upsample([prompt], pictures, seed=seed, temperature=temperature, on_text=stream.show)[0]
    print_result(to_json({"prompt": prompt, "upsampled_prompt": answer}) if as_json else answer)
