"""The `flux2-mlx` command group."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..errors import Flux2Error
from ..requirements import mlx_needed
from .bench import bench
from .cache import cache
from .convert import convert
from .describe import describe
from .doctor import doctor
from .download import download
from .i2i import i2i
from .info import info
from .lora import lora
from .models import models
from .outpaint import outpaint
from .progress import Warnings
from .stopping import report
from .t2i import t2i
from .terminal import line, said
from .upsample import upsample


@contextmanager
def _reported() -> Iterator[None]:
    """Turns the library's errors into one line and exit code 1, and what stops a command into its exit code."""
    try:
        with mlx_needed():
            yield
    except click.ClickException as error:
        error.message = line(error.message)  # type: ignore[misc]  # click calls it final, but it may hold escapes
        raise
    except Flux2Error as error:
        raise click.ClickException(said(str(error))) from error
    except OSError as error:
        if error.errno == errno.EPIPE:  # click ends quietly when a pipe closes
            raise
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise click.ClickException(line(message)) from error
    except KeyboardInterrupt as stop:
        raise click.exceptions.Exit(report(stop)) from stop


class _Group(click.Group):
    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _reported():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _reported():
            return super().invoke(ctx)


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


for _command in (t2i, i2i, outpaint, upsample, describe, convert, download, info, models, lora, doctor, bench, cache):
    cli.add_command(_command)
