"""Runs that are timed, and the products that they are compared with."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import mlx.core as mx

from .. import layers
from ..config import TransformerConfig
from ..device import dtype_name
from ..doctor.speed import timed
from ..memory import Plan
from ..metering import turn
from ..output import Phase
from ..pipeline import Flux2Pipeline
from ..request import Progress, Request
from ..store import is_official
from ..transformer import pass_products
from .result import Measured, PhaseFigures, Spread

PROMPT = "a small red circle on a blue background"
_SEED = 0
_TIMES = 3  # that each product is timed


@dataclass(frozen=True)
class Case:
    """A model in one quantization and size. `open` gives a new pipeline of it, which keeps no encoded prompts.

    `steps` is at least 2: the first one of a run is not timed, as it may prepare what the others use.
    """

    open: Callable[[], Flux2Pipeline]
    width: int | None
    height: int | None
    steps: int

    def request(self, pipe: Flux2Pipeline) -> Request:
        """The settings of its runs; InputError if the model can't have them."""
        return pipe.request([PROMPT], width=self.width, height=self.height, steps=self.steps, seed=_SEED)

    def check(self, pipe: Flux2Pipeline) -> None:
        """Raise InputError if it can't be measured: a setting is wrong, or it does not fit into memory."""
        pipe.plan(self.request(pipe))


@dataclass
class _Timed:
    """One run: its seconds, those of its steps, its phases, and how they were planned."""

    planned: Plan
    seconds: float = 0.0
    steps: list[float] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)


def measure(
    cases: Iterable[Case], repeats: int, begin: Callable[[str], object] = lambda name: None
) -> Generator[Measured]:
    """What each of `cases` takes: a first run of a new pipeline, and so many later ones of that.

    Args:
        cases: what is measured.
        repeats: how many later runs there are, at least 1.
        begin: called with what is about to be measured.
    """
    read: set[Path] = set()
    for case in cases:
        yield _measured(case, repeats, begin, read)


def _measured(case: Case, repeats: int, begin: Callable[[str], object], read: set[Path]) -> Measured:
    """One row; the folder of its files is added to those that were `read`."""
    with turn():  # no run of another thread comes between, or while products are timed
        start = perf_counter()
        with _opened(case) as pipe:
            request = case.request(pipe)
            folder = Path(pipe.checkpoint.folder)
            first_here = folder not in read
            read.add(folder)
            name = f"{pipe.variant.name} {pipe.quant} {request.width}×{request.height}"
            begin(f"{name}, first run")
            cold = _run(pipe, request, start)
            warm = []
            for number in range(repeats):
                begin(f"{name}, run {number + 2} of {repeats + 1}")
                warm.append(_run(pipe, request, perf_counter()))
        begin(f"{name}, products of these shapes")
        return _figures(pipe, request, cold, warm, first_here=first_here)


@contextmanager
def _opened(case: Case) -> Iterator[Flux2Pipeline]:
    """A new pipeline, which leaves nothing in memory."""
    pipe = case.open()
    try:
        yield pipe
    finally:
        pipe.release()


def _run(pipe: Flux2Pipeline, request: Request, start: float) -> _Timed:
    planned = pipe.plan(request)
    run = _Timed(planned.keeping(pipe.networks.may_stay, pipe.networks.kept.names))
    ends: list[float] = []

    def on_progress(progress: Progress) -> None:
        if progress.step is not None:
            ends.append(perf_counter())

    run.phases = pipe.run(request, planned=planned, on_progress=on_progress).timings
    run.seconds = perf_counter() - start
    run.steps = [after - before for before, after in pairwise(ends)]
    return run


def _figures(
    pipe: Flux2Pipeline, request: Request, cold: _Timed, warm: Sequence[_Timed], *, first_here: bool
) -> Measured:
    checkpoint = pipe.checkpoint
    step = Spread.of([seconds for run in warm for seconds in run.steps])
    passes = 1 + bool(request.negative_prompts)
    image = request.width * request.height // pipe.token_size**2
    config = checkpoint.components["transformer"].config
    products = passes * own_products(config, pipe.dtype, request.max_sequence_length, image)
    expected = pipe.duration(request)
    return Measured(
        variant=checkpoint.variant.name,
        official=is_official(checkpoint),
        fingerprint=checkpoint.source.get("fingerprint"),
        quant=pipe.quant,
        text_quant=pipe.text_quant,
        dtype=dtype_name(pipe.dtype),
        width=request.width,
        height=request.height,
        steps=request.steps,
        passes=passes,
        memory_limit=pipe.memory_limit,
        first_here=first_here,
        cold=cold.seconds,
        warm=Spread.of([run.seconds for run in warm]),
        phases=tuple(_phase(place, cold, warm) for place in range(len(cold.phases))),
        step=step,
        products=products,
        ratio=step.median / products,
        expected_step=None if expected is None else expected.step,
    )


def _phase(place: int, cold: _Timed, warm: Sequence[_Timed]) -> PhaseFigures:
    """The phase at a `place`; all runs have the same ones."""
    first, later = cold.phases[place], [run.phases[place] for run in warm]
    memory = [(run.phases[place].peak_memory, run.planned.phase(first.name).peak_memory) for run in (cold, *warm)]
    peak, planned = max(memory, key=lambda pair: pair[0] / pair[1])
    seconds = Spread.of([phase.seconds for phase in later])
    return PhaseFigures(first.name, first.seconds, seconds, peak, planned, later[-1].read, later[-1].streamed)


def own_products(config: TransformerConfig, dtype: mx.Dtype, text: int, image: int) -> float:
    """Seconds that all products and attention of a pass take by themselves, each shape timed alone: no more than a
    layer's weight and what it is multiplied by is in memory at one time."""
    seconds = 0.0
    for (rows, columns, inner), count in pass_products(config, text, image).items():
        x, weight = (mx.random.normal((size, inner), dtype, key=mx.random.key(0)) for size in (rows, columns))
        mx.eval(x, weight)
        seconds += count * min(timed(partial(mx.matmul, x, weight.T), _TIMES))
    shape = (1, config.num_attention_heads, text + image, config.attention_head_dim)
    k = mx.random.normal(shape, dtype, key=mx.random.key(0))
    # The last block asks for the image alone.
    for tokens, count in ((text + image, config.num_layers + config.num_single_layers - 1), (image, 1)):
        q = mx.contiguous(k[:, :, -tokens:])
        mx.eval(q)
        seconds += count * min(timed(partial(layers.attention, q, k, k), _TIMES))
    mx.clear_cache()
    return seconds
