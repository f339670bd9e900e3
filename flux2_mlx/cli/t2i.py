"""`flux2-mlx t2i`."""

from typing import Any

import click

from .job import Job
from .options import painting_options, prompt_options, size_options
from .painting import paint
from .pictures import Pictures


@click.command()
@click.argument("prompt", required=False)
@size_options(".  [default: 1024; demo 128]")
@prompt_options
@painting_options
def t2i(prompt: str | None, profile: bool, as_json: bool, **given: Any) -> None:
    """Make an image from PROMPT.

    \b
    Examples:
      flux2-mlx t2i "a red fox in snow" -o fox.png
      flux2-mlx t2i "a red fox in snow" -m klein-9b -q qint8 -W 1536 -H 1024 -n 4
      flux2-mlx t2i --replay fox.png -o again.png
    """
    paint(Job.of(prompt, pictures=Pictures(), **given), profile=profile, as_json=as_json)
