"""`flux2-mlx upsample`."""

from pathlib import Path
from typing import Any

import click

from .options import image_option, writing_options
from .progress import Bars
from .terminal import print_result, to_json
from .writing import model_of, open_writer, upsampled


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
    from ..request import check_prompt, check_words

    check_words(prompt)
    check_prompt(prompt)
    pictures = [open_image(path) for path in images]
    resolved = model_of(model, options["models_dir"], must_see=bool(pictures))
    with Bars(quiet) as bars:
        writer = open_writer(resolved, bars, **options)
        (answer,) = upsampled(writer, [prompt], pictures, quiet, seed=seed, temperature=temperature)
    print_result(to_json({"prompt": prompt, "upsampled_prompt": answer}) if as_json else answer)
