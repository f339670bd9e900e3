"""One run at a time: its phases, each kept within what is planned for it, and what each one takes."""

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
from .memory import PhasePlan, Plan
from .networks import Networks
from .output import Phase
from .streaming import Reading

_log = logging.getLogger(__name__)
_TURN = threading.RLock()
_THREAD = threading.local()
_ENDING = threading.Event()
# The share of a phase's activations up to which MLX may allocate ahead of what it computes. It looks before it
# allocates, so that one more array comes on top. With this share peaks reach 99 % of the plan, with 1.0 they pass it
# by 1 % in the first cases of: python -m pytest -s tests/test_memory.py -k near_the_peak
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

    def phase(self, planned: PhasePlan) -> Phase:
        streamed = planned.streamed if self.read.nbytes else 0
        return Phase(self.name, self.seconds, self.peak, self.read.nbytes, streamed, self.read.overlap)


_OPEN: list[_Span] = []  # the phases that whoever has the turn is in, each within the one before


class Phases:
    """The phases of a run, which begins when this is made.

    In each of them MLX is held to what is planned for it, and what it takes is measured. What was in memory before the
    run is left out of that, unless the plan counts it. A phase may be entered within another one, of this run or of one
    around it, which is neither timed nor measured meanwhile.

    Args:
        planned: the plan of the run.
        timings: gets a `Phase` for each phase.
        reading: what is streamed from disk.
        counted: bytes that are in memory already and counted in the plan.

    Attributes:
        beside: whether images are decoded while others are denoised.
        longest: operations that the device is given at one time, at most.
        execution: how a pass of the transformer is computed.
        strip_bytes: what the VAE may allocate for one strip.
    """

    def __init__(self, planned: Plan, timings: list[Phase], reading: Reading, counted: int = 0):
        self.beside = planned.beside
        self.longest = planned.longest
        self.execution = planned.execution
        self.strip_bytes = planned.strip_bytes
        self._planned = {phase.name: phase for phase in planned.phases}
        self._spare = {phase.name: planned.limit - phase.peak_memory for phase in planned.phases}
        self._timings = timings
        self._reading = reading
        self._others = max(0, mx.get_active_memory() - counted)
        self._spans: dict[str, _Span] = {}

    def planned(self, name: str) -> PhasePlan:
        """What is planned for a phase."""
        return self._planned[name]

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """Count what is done inside as phase `name`, and give its memory back at the end."""
        span = self._span(name)
        for outer in _OPEN[-1:]:
            outer.stop()
        _OPEN.append(span)
        mx.clear_cache()
        span.start()
        planned = self._planned[name]
        try:
            with limits(planned, self._spare[name], self._others, self._keeps_to_plan(name)):
                yield
        finally:
            span.stop()
            self._timings[span.place] = span.phase(planned)
            _OPEN.pop()
            gc.collect()
            mx.clear_cache()
            for outer in _OPEN[-1:]:
                outer.start()

    def _keeps_to_plan(self, name: str) -> bool:
        """Whether a phase takes no more than planned by what it waits for, and needs no limit for that."""
        return name == "transformer" and self.execution.runs_ahead

    def _span(self, name: str) -> _Span:
        if name not in self._spans:
            self._spans[name] = _Span(name, len(self._timings), self._reading)
            self._timings.append(Phase(name, 0.0, 0))
        return self._spans[name]


@contextmanager
def running(networks: Networks, planned: Plan, timings: list[Phase], *, keep: bool) -> Iterator[Phases]:
    """A run of `networks` as it is `planned`, alone on the device.

    With `keep`, networks stay in memory after their phases as far as they fit beside all the others. `timings` gets
    what each phase took.
    """
    with turn():
        planned = planned.keeping(networks.may_stay if keep else {}, networks.kept.names)
        spare = min(planned.limit - phase.peak_memory for phase in planned.phases)
        with networks.keeping(planned.kept, spare):
            yield Phases(planned, timings, networks.reading, networks.planned_bytes)


@contextmanager
def limits(phase: PhasePlan, spare: int, others: int, keeps_to_plan: bool = False) -> Iterator[None]:
    """MLX's own limits as a phase is planned; the former ones are back afterwards.

    Memory: before MLX allocates beyond it, freed buffers are given back and running work is waited for. A phase that
    needs none of this to keep to its plan has all that the run may take, so that a GPU keeps its buffers from one block
    to the next. Cache: freed
    buffers are kept within what the phase leaves. A GPU, which takes long for new ones, keeps up to the activations of
    a phase that leaves less: its buffers together stay within the memory limit, as freed ones are given back first.
    Wired: on Metal, what the phase needs is never paged out.

    Args:
        phase: what is planned.
        spare: bytes of the run's limit that the phase leaves.
        others: bytes that are in memory besides the run.
        keeps_to_plan: whether the phase takes no more than planned without a limit.
    """
    ahead = int(_AHEAD * phase.activations) + (spare if keeps_to_plan else 0)
    with ExitStack() as former:  # each is back even if another can't be
        former.callback(mx.set_memory_limit, mx.set_memory_limit(others + phase.weights + ahead))
        if on_metal():  # or it may be more than a Mac's GPU can have wired
            former.callback(mx.set_wired_limit, mx.set_wired_limit(min(phase.peak_memory, device_memory())))
        cache = mx.set_cache_limit(0)
        former.callback(mx.set_cache_limit, cache)
        kept = phase.activations if on_gpu() else 0
        mx.set_cache_limit(min(cache, max(kept, spare)))
        yield
        mx.synchronize()


def warn_of_long_operations(longest: int, smaller: str) -> None:
    """Say that the system may stop a product or attention of so many operations, and what would be `smaller`."""
    seconds = dispatch_seconds(longest)
    if seconds is not None and seconds > MOST_DISPATCH:
        _log.warning(
            "an operation takes this GPU about %.1f s%s, and macOS may stop it; let the display sleep, or choose %s",
            seconds,
            "" if chip_class() == chip() else f" if it is as fast as an {chip_class()}",
            smaller,
        )
