"""`flux2-mlx describe`."""

from pathlib import Path
from typing import Any

import click

from .options import writing_options
from .progress import Bars
from .terminal import print_result, to_json
from .writing import described, model_of, open_writer


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option("-m", "--model", default="dev", show_default=True, help="Whose language model to use.")
@writing_options
def describe(
    image: Path,
    model: str,
    seed: int | None,
    temperature: float,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Describe IMAGE in words that an image can be made from.

    Only dev's language model sees images; its transformer is not needed.

    \b
    Example:
      flux2-mlx describe photo.jpg
    """
    from ..images import open_image

    picture = open_image(image)
    resolved = model_of(model, options["models_dir"], must_see=True)
    with Bars(quiet) as bars:
        writer = open_writer(resolved, bars, **options)
        (answer,) = described(writer, [picture], quiet, seed=seed, temperature=temperature)
    print_result(to_json({"image": str(image), "description": answer}) if as_json else answer)
