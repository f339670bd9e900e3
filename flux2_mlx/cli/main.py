"""The `flux2-mlx` command group."""

import errno
import logging
from typing import Any

import click

from ..errors import Flux2Error
from .cache import cache
from .convert import convert
from .describe import describe
from .download import download
from .i2i import i2i
from .info import info
from .models import models
from .outpaint import outpaint
from .progress import Warnings
from .t2i import t2i
from .upsample import upsample

_INTERRUPTED = 130


class _Group(click.Group):
    """Turns the library's errors into one line and exit code 1, and Ctrl-C into exit code 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Flux2Error as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # click ends quietly when a pipe closes
                raise
            raise click.ClickException(
                f"{error.filename}: {error.strerror}" if error.filename else str(error)
            ) from error
        except KeyboardInterrupt:
            click.echo("interrupted; nothing was left half written", err=True)
            ctx.exit(_INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flux2-mlx")
def cli() -> None:
    """FLUX.2 image generation on Apple Silicon.

    \b
    Examples:
      flux2-mlx t2i "a small red circle on a blue background" -m demo
      flux2-mlx t2i "a red fox in snow" -m klein-4b -q qint8 --seed 42 -o fox.png
    """
    logging.basicConfig(level=logging.WARNING, handlers=[Warnings()], format="%(message)s")


for _command in (t2i, i2i, outpaint, upsample, describe, convert, download, info, models, cache):
    cli.add_command(_command)


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="flux2-mlx")
