"""`flux2-mlx outpaint`."""

from pathlib import Path
from typing import Any

import click

from .job import Job
from .options import painting_options
from .painting import paint
from .pictures import Pictures

_PROMPT = "Extend the image beyond its borders; the scene goes on naturally in the same style and light."


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("prompt", default=_PROMPT)
@click.option("--left", type=int, default=0, help="Pixels to add on the left.")
@click.option("--right", type=int, default=0, help="Pixels to add on the right.")
@click.option("--top", type=int, default=0, help="Pixels to add at the top.")
@click.option("--bottom", type=int, default=0, help="Pixels to add at the bottom.")
@click.option(
    "--overlap",
    type=click.IntRange(0, 512),
    default=32,
    show_default=True,
    help="Pixels of the image at a seam that change: the half beside what is new is painted anew, the other half fades "
    "into the image. All others stay as they are.",
)
@click.option("--match-colors", is_flag=True, help="Give what is painted the colours that the image itself keeps.")
@painting_options
def outpaint(
    image: Path,
    prompt: str,
    left: int,
    right: int,
    top: int,
    bottom: int,
    overlap: int,
    match_colors: bool,
    profile: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Extend IMAGE on the sides that are named; PROMPT says what is to be seen there.

    \b
    Example:
      flux2-mlx outpaint photo.png "a wide beach" --left 256 --right 256
    """
    extend = {"left": left, "right": right, "top": top, "bottom": bottom, "overlap": overlap}
    pictures = Pictures((image,), extend=extend, match_colors=match_colors)
    job = Job.of(prompt, pictures=pictures, width=None, height=None, prompts_file=None, replay=None, **given)
    paint(job, profile=profile, as_json=as_json)
