"""Keeping a Mac awake while a command works, which it would not be without its user for long."""

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from subprocess import Popen

_PATIENCE = 1  # seconds


@contextmanager
def awake() -> Iterator[None]:
    """Within it macOS does not go to sleep for idleness; the display may.

    What sees to that watches this process, so that it ends however this one does.
    """
    program = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if program is None:
        yield
        return
    import subprocess  # which only those need who wait

    watching = None
    silent = subprocess.DEVNULL
    with suppress(OSError):
        watching = subprocess.Popen(
            [program, "-i", "-w", str(os.getpid())],
            stdin=silent,
            stdout=silent,
            stderr=silent,
            start_new_session=True,  # or Ctrl-C would end it while the command still puts its things away
        )
    try:
        yield
    finally:
        if watching is not None:
            _end(watching)


def _end(watching: "Popen[bytes]") -> None:
    from subprocess import TimeoutExpired

    watching.terminate()
    try:
        watching.wait(_PATIENCE)
    except TimeoutExpired:
        watching.kill()
        watching.wait()


def caffeinate_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--no-caffeinate`, and without it the command is `awake` while it works."""

    @functools.wraps(command)
    def wakeful(*arguments: Any, no_caffeinate: bool, **given: Any) -> Any:
        if no_caffeinate:
            return command(*arguments, **given)
        with awake():
            return command(*arguments, **given)

    option = click.option("--no-caffeinate", is_flag=True, help="Let a Mac go to sleep while this works.")
    return option(wakeful)
