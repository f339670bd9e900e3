"""Progress bars and notices on stderr."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from .terminal import line, printable

_LABELS = {
    "text_encoder": "text encoder",
    "vae_encoder": "references",
    "transformer": "denoising",
    "vae": "decoding",
    "convert": "converting",
    "verify": "verifying",
}


class Warnings(logging.Handler):
    """Prints log records on lines of their own, above a bar that is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(line(self.format(record)), file=sys.stderr)


class Bars:
    """One bar at a time; the next phase closes the last one's. Use it as a context manager."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._bar: Any = None
        self._phase = ""

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def show(self, phase: str, done: int, total: int, **options: Any) -> None:
        """Show `done` of `total` units of `phase`; `options` go to tqdm when the bar is made."""
        if self._quiet:
            return
        if phase != self._phase:
            from tqdm import tqdm

            self._close()
            self._phase, self._bar = phase, tqdm(desc=_LABELS[phase], total=total, leave=True, **options)
        self._bar.update(done - self._bar.n)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away from the terminal while a result is printed."""
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stdout):
            yield

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar, self._phase = None, ""


def conversion(bars: Bars) -> Callable[[int, int], None]:
    """A `progress` callback in bytes for conversions."""
    return lambda done, total: bars.show("convert", done, total, unit="B", unit_scale=True)


def notice(message: str, quiet: bool) -> None:
    """Print a line on stderr, unless `quiet`."""
    if not quiet:
        click.echo(line(message), err=True)


class Stream:
    """Generated text on stderr while it is written. Use it as a context manager."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._number, self._shown = 0, ""

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            click.echo(err=True)

    def show(self, number: int, text: str) -> None:
        """Print what answer `number` has become longer by."""
        if self._quiet:
            return
        if number != self._number:
            click.echo(err=True)
            self._number, self._shown = number, ""
        # The last character of an unfinished word may still change.
        settled = text.rstrip("\ufffd")
        if settled.startswith(self._shown):
            click.echo(printable(settled[len(self._shown) :]), nl=False, err=True)
            self._shown = settled
