"""What ends a command from outside: Ctrl-C, a signal of the system, a terminal that closes."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_AGAIN = 0.02  # seconds after which a signal that was lost is sent again
_CODE = 128  # a shell's exit code for a signal is this much more than its number


class Terminated(KeyboardInterrupt):
    """A signal that ends a run as Ctrl-C does. Its argument is the signal's number."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise as Ctrl-C does, and a second signal ends the process at once.

    What the process was started to ignore, as `nohup` asks for, stays ignored.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    hook = sys.unraisablehook
    handled = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        handled = []

    def stop(number: int, _frame: object) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    def again(lost: "sys.UnraisableHookArgs") -> None:
        # Python drops what is raised inside a callback, and imports alone have many of those.
        if not handled or not isinstance(lost.exc_value, KeyboardInterrupt):
            hook(lost)
            return
        number = _number(lost.exc_value)
        started = False
        while not started:
            for each in handled:
                signal.signal(each, stop)
            timer = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
            timer.daemon = True
            with suppress(KeyboardInterrupt):  # on a busy machine it comes while this waits for the thread to start
                timer.start()
                started = True

    sys.unraisablehook = again
    try:
        for number in handled:
            signal.signal(number, stop)
        yield
    finally:
        sys.unraisablehook = hook
        for number in handled:
            signal.signal(number, before[number])


def report(stop: KeyboardInterrupt) -> int:
    """Say in a line on stderr that the command was stopped, and give its exit code."""
    number = _number(stop)
    word = "terminated" if isinstance(stop, Terminated) else "interrupted"
    print(f"{word}; nothing was left half written", file=sys.stderr)
    return _CODE + number


def _number(stop: KeyboardInterrupt) -> int:
    return stop.args[0] if isinstance(stop, Terminated) else signal.SIGINT
