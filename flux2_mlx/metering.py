"""One run at a time, and what each of its phases takes."""

import atexit
import gc
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace

import mlx.core as mx

from .device import (
    MOST_DISPATCH,
    begin_computing,
    check_process,
    chip,
    chip_class,
    device_memory,
    dispatch_seconds,
    failures,
    on_gpu,
    on_metal,
)
from .errors import DeviceError
from .memory import Plan
from .output import Phase
from .streaming import Reading

_log = logging.getLogger(__name__)
_TURN = threading.RLock()
_THREAD = threading.local()
_ENDING = threading.Event()
# The share of a phase's activations up to which MLX may allocate ahead of what it computes. It looks before it
# allocates, so that one more array comes on top.
_AHEAD = 0.9


@contextmanager
def turn() -> Iterator[None]:
    """Runs of several threads take turns, since MLX counts memory, and limits it, for the process as a whole.

    Raises:
        DeviceError: MLX can't compute in this process.
    """
    begin_computing()  # before the lock, which a process that was forked may have inherited locked
    with _TURN:
        end_with_process()
        if threading.current_thread() is not threading.main_thread() and not hasattr(_THREAD, "streams"):
            _THREAD.streams = _Streams()
        try:
            with failures():
                yield
        finally:
            if _ENDING.is_set():  # while the process waits, as later no call of MLX would return to this thread
                vars(_THREAD).pop("streams", None)


def end_with_process() -> None:
    """End a thread whose process is about to."""
    if _ENDING.is_set() and threading.current_thread() is not threading.main_thread():
        raise SystemExit


@atexit.register
def _end_runs() -> None:
    """Let the run of a daemon thread end at its next step: MLX aborts a process that exits while it computes."""
    _ENDING.set()
    with suppress(DeviceError):
        check_process()  # there is no other thread in one that was forked, which may have left the lock locked
        _TURN.acquire()


class _Streams:
    """The streams of MLX of a thread. Unless they are cleared when it ends, MLX may abort the process at its exit."""

    def __del__(self) -> None:
        mx.clear_streams()


@dataclass
class _Span:
    """What a phase, which others may interrupt, has taken so far. `place` is its place among the timings."""

    name: str
    place: int
    reading: Reading  # of the whole run
    seconds: float = 0.0
    peak: int = 0
    read: Reading = field(default_factory=Reading)

    def start(self) -> None:
        mx.reset_peak_memory()
        self._before = replace(self.reading)
        self._start = time.perf_counter()

    def stop(self) -> None:
        read = self.reading.since(self._before)
        self.read.add(read.nbytes, read.beside)
        self.seconds += time.perf_counter() - self._start
        self.peak = max(self.peak, mx.get_peak_memory())

    def phase(self, planned: Plan) -> Phase:
        streamed = planned.phase(self.name).streamed if self.read.nbytes else 0
        return Phase(self.name, self.seconds, self.peak, self.read.nbytes, streamed, self.read.overlap)


_OPEN: list[_Span] = []  # the phases that whoever has the turn is in, each within the one before


class Meter:
    """Measures the phases of a run that starts now, and keeps each within what is planned.

    What is in memory already does not belong to the run, but for what is kept. A phase that is entered within another,
    be it of the same run or of one that a callback makes, interrupts that.

    Args:
        timings: gets a `Phase` for each phase.
        planned: the plan of the run.
        reading: what is streamed from disk.
        kept: bytes in memory that the plan includes, as they were kept for the run.
    """

    def __init__(self, timings: list[Phase], planned: Plan, reading: Reading, kept: int = 0):
        self._timings = timings
        self._planned = planned
        self._reading = reading
        self._others = max(0, mx.get_active_memory() - kept)
        self._spans: dict[str, _Span] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is done inside as phase `name`, and give its memory back at the end."""
        span = self._span(name)
        for outer in _OPEN[-1:]:
            outer.stop()
        _OPEN.append(span)
        mx.clear_cache()
        span.start()
        try:
            with limits(self._planned, name, self._others):
                yield
        finally:
            span.stop()
            self._timings[span.place] = span.phase(self._planned)
            _OPEN.pop()
            gc.collect()
            mx.clear_cache()
            for outer in _OPEN[-1:]:
                outer.start()

    def _span(self, name: str) -> _Span:
        if name not in self._spans:
            self._spans[name] = _Span(name, len(self._timings), self._reading)
            self._timings.append(Phase(name, 0.0, 0))
        return self._spans[name]


@contextmanager
def limits(planned: Plan, name: str, others: int) -> Iterator[None]:
    """MLX's own limits as the plan has them for a phase; the former ones are back afterwards.

    Memory: before MLX allocates beyond it, freed buffers are given back and running work is waited for. Cache: freed
    buffers are kept within what the phase leaves. A GPU, which takes long for new ones, keeps up to the activations of
    a phase that leaves less: its buffers together stay within the memory limit, as freed ones are given back first.
    Wired: on Metal, what the phase needs is never paged out.

    Args:
        planned: the plan of the run.
        name: that of the phase.
        others: bytes that are in memory besides the run.
    """
    phase = planned.phase(name)
    peak = phase.peak_memory
    ahead = int(_AHEAD * phase.activations)
    with ExitStack() as former:  # each is back even if another can't be
        former.callback(mx.set_memory_limit, mx.set_memory_limit(others + phase.weights + ahead))
        if on_metal():  # or it may be more than a Mac's GPU can have wired
            former.callback(mx.set_wired_limit, mx.set_wired_limit(min(peak, device_memory())))
        cache = mx.set_cache_limit(0)
        former.callback(mx.set_cache_limit, cache)
        kept = phase.activations if on_gpu() else 0
        mx.set_cache_limit(min(cache, max(kept, planned.limit - peak)))
        yield
        mx.synchronize()


def warn_of_long_operations(planned: Plan, smaller: str) -> None:
    """Say that the system may stop what is planned, and what would be `smaller`."""
    seconds = dispatch_seconds(planned.longest)
    if seconds is not None and seconds > MOST_DISPATCH:
        _log.warning(
            "an operation takes this GPU about %.1f s%s, and macOS may stop it; let the display sleep, or choose %s",
            seconds,
            "" if chip_class() == chip() else f" if it is as fast as an {chip_class()}",
            smaller,
        )
