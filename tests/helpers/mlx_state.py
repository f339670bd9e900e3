"""What MLX keeps for the whole process: its limits, and the memory that it takes. Random weights."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from flux2_mlx.memory import Plan
from flux2_mlx.output import Phase


def mlx_limits() -> tuple[int, int]:
    """MLX's memory and cache limits, which can only be read by setting them."""
    limits = mx.set_memory_limit(2**40), mx.set_cache_limit(2**40)
    mx.set_memory_limit(limits[0])
    mx.set_cache_limit(limits[1])
    return limits


@contextmanager
def nothing_allocated() -> Iterator[None]:
    """Fail if more than a few random keys are put into memory inside."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    yield
    assert mx.get_peak_memory() - before < 100_000


def plan_ratios(planned: Plan, run: Callable[[], list[Phase]], most: float, attempts: int) -> dict[str, float]:
    """What each phase is planned to take in what it takes at most of several runs.

    How far MLX allocates ahead of its computing differs, so there are runs until no ratio is above `most`, at least
    three and at most `attempts`.
    """
    gc.collect()
    base, ratios = mx.get_active_memory(), {}
    for attempt in range(attempts):
        timings = run()
        assert [phase.name for phase in timings] == [phase.name for phase in planned.phases]
        for phase, took in zip(planned.phases, timings, strict=True):
            ratio = phase.peak_memory / (took.peak_memory - base)
            ratios[phase.name] = min(ratio, ratios.get(phase.name, ratio))
        if attempt >= 2 and max(ratios.values()) <= most:
            break
    print({name: round(ratio, 3) for name, ratio in ratios.items()})
    return ratios


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` with random matrices and kernels, as large as MLX's own layers draw them."""
    mx.random.seed(seed)

    def draw(x: mx.array) -> mx.array:
        scale = (x.size // len(x)) ** -0.5
        return x if x.ndim == 1 else mx.random.uniform(-scale, scale, x.shape)

    module.update(tree_map(draw, module.parameters()))
    return module
