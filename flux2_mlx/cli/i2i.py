"""`flux2-mlx i2i`."""

from pathlib import Path
from typing import Any

import click

from .job import Job
from .options import image_option, painting_options, prompt_options, size_options
from .painting import paint
from .pictures import Pictures


@click.command()
@click.argument("prompt", required=False)
@image_option
@click.option(
    "--strength",
    type=float,
    help="Above 0 to 1: start from the first image instead of noise, and depart from it the further the greater. "
    "It, like all other images, is seen as a reference besides; all --steps are taken.",
)
@click.option(
    "--mask",
    type=click.Path(path_type=Path),
    metavar="IMAGE",
    help="Of the size of the first image: white is painted over, all else, black or transparent, stays as it is.",
)
@click.option(
    "--mask-crop",
    type=click.IntRange(min=0),
    metavar="PIXELS",
    help="Work on the mask's surroundings only, so many pixels around it, in full resolution.",
)
@click.option(
    "--match-colors",
    is_flag=True,
    help="Bring the brightness, contrast and saturation of what an edit does not change back to the first image's.",
)
@size_options("; not with --mask, --strength or --match-colors.  [default: the first image's]")
@prompt_options
@painting_options
def i2i(
    prompt: str | None,
    images: tuple[Path, ...],
    strength: float | None,
    mask: Path | None,
    mask_crop: int | None,
    match_colors: bool,
    profile: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Make an image from PROMPT and images.

    \b
    Examples:
      flux2-mlx i2i "put the hat on the cat" -i cat.png -i hat.png
      flux2-mlx i2i "as an oil painting" -i photo.jpg --strength 0.7
      flux2-mlx i2i "a red door" -i house.png --mask door.png
    """
    if not images and given["replay"] is None:
        raise click.UsageError("give an image with -i, or --replay")
    pictures = Pictures(images, strength, mask, mask_crop, match_colors=match_colors)
    paint(Job.of(prompt, pictures=pictures, **given), profile=profile, as_json=as_json)
