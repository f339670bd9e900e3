"""Networks that stay in memory after their phase, and what the runs that are going on hold there."""

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class Kept:
    """The networks of one pipeline that stay in memory after their phases.

    A run says which ones may (`during`), and offers each one that it has loaded (`offer`). They stay until a run that
    does not want them, or until another pipeline's run needs their room.
    """

    def __init__(self) -> None:
        self._modules: dict[str, nn.Module] = {}  # by the names of networks
        self._allowed: tuple[str, ...] = ()  # those that the run which is going on may keep

    def get(self, name: str) -> nn.Module | None:
        """A network that has stayed."""
        return self._modules.get(name)

    def offer(self, name: str, module: nn.Module) -> None:
        """Have a network stay if the run may keep it."""
        if name in self._allowed:
            self._modules[name] = module

    def may_stay(self, name: str) -> bool:
        """Whether the next run may keep a network. A run that a callback makes within another one keeps no more than
        that one has planned to."""
        return not _RUNS.going_on or name in self._allowed or name in self._modules

    @property
    def in_use(self) -> tuple[str, ...]:
        """The networks that have stayed and belong to a run that is going on; a run within that one uses them too."""
        return self.names if self in _RUNS.going_on else ()

    @property
    def is_nested(self) -> bool:
        """Whether a run is going on within another one of the same pipeline."""
        return _RUNS.going_on.count(self) > 1

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._modules)

    @property
    def nbytes(self) -> int:
        modules = list(self._modules.values())
        return sum(array.nbytes for module in modules for array in dict(tree_flatten(module.parameters())).values())

    @contextmanager
    def during(self, names: Sequence[str], spare: int) -> Iterator[None]:
        """A run that keeps these networks and no others of its pipeline, and leaves `spare` bytes for those that other
        pipelines keep."""
        self._make_room(names, spare)
        _PIPELINES.add(self)
        around = self._allowed
        self._allowed = tuple(names)
        try:
            with _RUNS.another(self):
                yield
        finally:
            self._allowed = around

    def _make_room(self, names: Sequence[str], spare: int) -> None:
        """Give back what does not fit beside a run, first of this pipeline and then of others, but nothing in use."""
        if self not in _RUNS.going_on:
            self._drop([name for name in self._modules if name not in names])
        others = [kept for kept in idle() if kept is not self]
        if sum(kept.nbytes for kept in others) > spare:
            for kept in others:
                kept.clear()

    def clear(self) -> None:
        self._allowed = ()
        self._drop(list(self._modules))

    def _drop(self, names: list[str]) -> None:
        for name in names:
            self._modules.pop(name, None)
        if names:
            gc.collect()
            mx.clear_cache()


class _Runs(threading.local):
    """The runs of a thread that have begun and not ended, `going_on`: the first one, and those that callbacks make,
    each within the one before. Only the thread that has the turn has any."""

    def __init__(self) -> None:
        self.going_on: list[Kept] = []
        self._before = 0  # bytes that were in memory when the first one began, but for what any pipeline kept

    @contextmanager
    def another(self, kept: Kept) -> Iterator[None]:
        if not self.going_on:
            self._before = mx.get_active_memory() - sum(kept.nbytes for kept in _PIPELINES)
        self.going_on.append(kept)
        try:
            yield
        finally:
            self.going_on.pop()

    @property
    def nbytes(self) -> int:
        """Bytes that these runs hold in memory."""
        if not self.going_on:
            return 0
        return max(0, mx.get_active_memory() - self._before - sum(kept.nbytes for kept in idle()))


_RUNS = _Runs()
_PIPELINES: WeakSet[Kept] = WeakSet()  # whoever has the turn may look at what they keep


def idle() -> list[Kept]:
    """The kept networks of pipelines that have no run going on."""
    return [kept for kept in _PIPELINES if kept not in _RUNS.going_on]


def held() -> int:
    """Bytes of memory that are not there for a run which a callback makes, as the runs around it hold them; 0 if there
    are none."""
    return _RUNS.nbytes
