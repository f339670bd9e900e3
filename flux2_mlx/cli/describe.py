"""`flux2-mlx describe`."""

import json
from pathlib import Path

import click

from .options import json_option, memory_option, models_dir_option, quiet_option, text_quant_option, writing_options
from .progress import Bars, Stream, conversion


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option("-m", "--model", default="dev", show_default=True, help="Whose language model to use.")
@text_quant_option
@writing_options
@memory_option
@models_dir_option
@json_option
@quiet_option
def describe(
    image: Path,
    model: str,
    text_quant: str | None,
    seed: int | None,
    temperature: float,
    memory_limit: str | None,
    models_dir: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Describe IMAGE in words that an image can be made from.

    Only dev's language model sees images; its transformer is not needed.

    \b
    Example:
      flux2-mlx describe photo.jpg
    """
    from ..images import open_image
    from ..upsampling import Writer

    picture = open_image(image)
    with Bars(quiet) as bars, Stream(quiet) as stream:
        writer = Writer.from_pretrained(
            model,
            text_quant=text_quant,
            memory_limit=memory_limit,
            models_dir=models_dir,
            quiet=quiet,
            progress=conversion(bars),
        )
        answer = writer.describe([picture], seed=seed, temperature=temperature, on_text=stream.show)[0]
    click.echo(json.dumps({"image": str(image), "description": answer}, ensure_ascii=False) if as_json else answer)
