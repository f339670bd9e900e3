"""Progress and notices on stderr: bars on a terminal, and lines now and then elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import click

from ..layout import INDEX
from .terminal import line, printable, said

if TYPE_CHECKING:
    from PIL import Image

    from ..store import Download, FirstUse, Model
    from .display import Display

# What is counted in bytes, and what a user is told of it. Phases of steps are shown as the library calls them.
_BYTES = {"download": "downloading", "convert": "converting", "verify": "verifying"}
_PAUSE = 10.0  # seconds between two lines of a phase


class Warnings(logging.Handler):
    """Prints log records on lines of their own, above a bar that is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(said(self.format(record)), file=sys.stderr)
        Bars.written_below()


class Bars:
    """One bar at a time, and maybe a picture above it; the next phase closes the last one's. Use it as a context
    manager."""

    _display: ClassVar["Display | None"] = None  # where a picture is shown: a terminal is one for the whole process

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._bar: Any = None
        self._phase = ""

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        Bars._display = None

    @property
    def no_pictures(self) -> str | None:
        """Why pictures can't be shown; None: they can."""
        if self._quiet:
            return "nothing is to be told"
        if not sys.stderr.isatty():
            return "stderr is no terminal"
        return "this terminal is dumb" if os.environ.get("TERM") == "dumb" else None

    def picture(self, images: "Sequence[Image.Image]") -> None:
        """Show images above the bar, in place of those before."""
        from tqdm import tqdm

        from .display import Display

        Bars._display = Bars._display or Display(sys.stderr)
        with tqdm.external_write_mode(file=sys.stderr):
            Bars._display.show(images)

    @classmethod
    def written_below(cls) -> None:
        """Have a picture that is shown stay where it is, as something else was written below it."""
        if cls._display is not None:
            cls._display.leave()

    def show(self, phase: str, done: int, total: int) -> None:
        """Show `done` of `total` bytes or steps of `phase`."""
        if self._quiet:
            return
        if phase != self._phase:
            self._close()
            self._phase = phase
            self._bar = _Bar(phase, done, total) if sys.stderr.isatty() else _Lines(phase, done, total)
        self._bar.show(done)

    def __call__(self, done: int, total: int, phase: str) -> None:
        """`show`, as the library reports the progress of a download and a conversion."""
        self.show(phase, done, total)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away from the terminal while a result is printed."""
        if not isinstance(self._bar, _Bar):
            yield
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stdout):
            yield
        self.written_below()

    def announce(self, use: "FirstUse") -> None:
        """Say what a first use will fetch, where it goes, and what stays."""
        if self._quiet:
            return
        for text in announcement(use):
            click.echo(text, err=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self.written_below()
            self._bar = None
            self._phase = ""


class _Bar:
    """tqdm's, which shows the speed of what is done from now on."""

    def __init__(self, phase: str, done: int, total: int):
        from tqdm import tqdm

        options = {"unit": "B", "unit_scale": True} if phase in _BYTES else {}
        # A phase of steps is first heard of when one is done.
        start = done if phase in _BYTES else 0
        self._bar = tqdm(desc=_label(phase), total=total, initial=start, leave=True, **options)

    def show(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """A line of a phase now and then, and one when it is complete."""

    def __init__(self, phase: str, done: int, total: int):
        self._phase = phase
        self._total = total
        self._first = done
        self._start = self._last = time.monotonic()
        self._complete = False

    def show(self, done: int) -> None:
        now = time.monotonic()
        if self._complete or (done < self._total and now - self._last < _PAUSE):
            return
        self._last = now
        self._complete = done >= self._total
        click.echo(f"{_label(self._phase)}: {self._state(done, now - self._start)}", err=True)

    def close(self) -> None:
        pass

    def _state(self, done: int, seconds: float) -> str:
        share = f"{100 * done // self._total if self._total else 100}%"
        share += f" of {size_text(self._total)}" if self._phase in _BYTES else f", {done}/{self._total}"
        if self._complete:
            return f"{share} in {_clock(seconds)}" if self._phase in _BYTES else share
        speed = (done - self._first) / seconds
        pace = f", {size_text(int(speed))}/s" if self._phase in _BYTES else ""
        left = f", {_clock((self._total - done) / speed)} left" if speed else ""
        return f"{share}{pace}{left}"


def _label(phase: str) -> str:
    return _BYTES.get(phase, phase)


def announcement(use: "FirstUse") -> list[str]:
    """The lines that say what a first use does."""
    rows = [row for download in use.downloads for row in _fetched(download)]
    fetched = sum(download.fetched for download in use.downloads)
    if use.removed:
        stays = f", once the {size_text(use.removed)} fetched now are removed"
    else:
        stays = f"; --no-keep-source removes the {size_text(fetched)} fetched now" if fetched else ""
    rows += [
        ("converted", f"{size_text(use.converted)}, to {use.target}; later runs need only this"),
        ("stays", f"{size_text(use.staying)} in all{stays}"),
    ]
    return [f"{line(use.name)} is not converted yet:", *(f"  {key:11}{line(text)}" for key, text in rows)]


def _fetched(download: "Download") -> list[tuple[str, str]]:
    """What is to be said of the files of a repo."""
    there = "all" if download.present == download.size else size_text(download.present)
    there = f", {there} of it already there" if download.present else ""
    gated = "; gated, and this account has access" if download.is_gated else ""
    names = [] if INDEX in download.files else [("files", ", ".join(download.files))]
    return [
        ("from", download.page),
        ("licence", f"{download.licence or 'see that page'}{gated}"),
        *names,
        ("download", f"{size_text(download.size)} in {len(download.files)} files{there}, to {download.storage}"),
    ]


def size_text(nbytes: int) -> str:
    """A number of bytes for people, such as 1.2 GB."""
    for unit, digits in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {digits}"
    return f"{nbytes} bytes"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def notice(message: str, quiet: bool) -> None:
    """Print a line on stderr, unless `quiet`."""
    if not quiet:
        click.echo(line(message), err=True)


def source_notice(model: "Model", keep_source: bool, quiet: bool) -> None:
    """Say where a download stays though it was not to be kept: this run has not fetched it, or not alone."""
    from ..store.inventory import is_downloaded

    if keep_source or model.path is not None or model.repo is None:
        return
    if is_downloaded(model.repo):
        way_out = f"`flux2-mlx models rm {model.repo} --only source` removes it"
        notice(f"a download of {model.repo} was there before and stays; {way_out}", quiet)


class Stream:
    """Generated text on stderr while it is written. Use it as a context manager."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._number = 0
        self._shown = ""

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
            self._number = number
            self._shown = ""
        # The last character of an unfinished word may still change.
        settled = text.rstrip("\ufffd")
        if settled.startswith(self._shown):
            click.echo(printable(settled[len(self._shown) :]), nl=False, err=True)
            self._shown = settled
