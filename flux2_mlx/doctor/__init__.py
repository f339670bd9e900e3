"""A check-up of this machine: whether results are right, memory is what is planned, and how fast it is.

The CPU is what a GPU is compared with, so nothing is needed but this package.
"""

import math
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import mlx.core as mx

from ..advice import workload
from ..components import network_dtype
from ..config import QUANTIZATIONS, VARIANTS
from ..device import activation_dtype, device_memory, failures, is_virtual, on_gpu
from ..durations import Rates
from ..errors import Flux2Error, one_line
from ..metering import turn
from ..networks import Networks
from ..pipeline import Flux2Pipeline
from ..request import Request
from . import disk, machine, numerics, peaks, speed
from .finding import Finding, UnmeasurableError, judged, skipped
from .machine import describe
from .speed import MODELS, predictions

__all__ = ["CheckUp", "Finding", "describe", "fits", "predictions"]

_Check = Callable[[], Finding]
_OF_THE_HOST = ("memory of", "computing while reading")
_REPORT = "please report this output"


class CheckUp:
    """The checks, one after the other. `rates` and `fitting` (see `fits`) are set when they have been measured.

    Args:
        models: the folder whose disk is read.
        begin: called with the name of each check before that is made.
    """

    def __init__(self, models: Path, begin: Callable[[str], object] = lambda name: None):
        self._models = models
        self._begin = begin
        self._dtype = activation_dtype(None)
        self._cpu_rate = math.inf  # operations a second, when they have been measured
        self.rates: Rates | None = None
        self.fitting: dict[str, dict[str, int | None]] = {}

    def __iter__(self) -> Generator[Finding]:
        # What a check has left, such as a file, is put away before who stopped this hears of it.
        with turn(), closing(self._checks(machine.swap_used())) as checks:
            for name, check in checks:
                self._begin(name)
                yield as_guest(made(name, check))
                mx.clear_cache()

    def _checks(self, swap: int | None) -> Generator[tuple[str, _Check]]:
        dtype = self._dtype
        yield "speed of the CPU", self._measure_cpu
        yield "demo image", lambda: numerics.check_demo(_demo())
        yield "product", self._bounded(numerics.product_operations(), partial(numerics.check_product, dtype))
        yield "float32", numerics.check_float32
        for bits in (4, 6, 8):
            yield f"product with {bits} bit weights", partial(numerics.check_quantized, bits, dtype)
        yield "convolution", partial(numerics.check_convolution, network_dtype("vae", dtype))
        for head_dim in (64, 128, 512):
            yield f"attention, {head_dim} wide", partial(numerics.check_attention, head_dim, dtype)
        yield "blocks of klein-9b", lambda: numerics.check_blocks(dtype, self._cpu_rate)
        yield "memory of attention", partial(peaks.check_attention, dtype)
        yield "memory of a step", self._bounded(peaks.step_operations(), partial(peaks.check_step, dtype))
        decode = partial(peaks.check_decoding, network_dtype("vae", dtype))
        yield "memory of decoding", self._bounded(peaks.decoding_operations(), decode)
        yield "wired memory", peaks.check_wiring
        yield "longest operation", partial(speed.check_dispatch, dtype)
        yield "no cache of buffers", partial(speed.check_cache, dtype)
        with ExitStack() as kept:
            file = cache(lambda: kept.enter_context(disk.large_file(self._models)))
            yield "reading from disk", partial(disk.check_reading, file)
            yield "computing while reading", partial(disk.check_overlap, file)
        yield "speed of a block", self._bounded(speed.block_operations(), self._measure)
        yield "speed of this chip", lambda: speed.check_rates(self.rates, dtype)
        yield "swap", partial(machine.check_swap, swap)
        yield "what fits", self._fit

    def _bounded(self, operations: int, check: _Check) -> _Check:
        """`check`, which raises UnmeasurableError where so many `operations` would take a CPU too long."""

        def run() -> Finding:
            seconds = operations / self._cpu_rate
            if not on_gpu() and seconds > numerics.LONGEST:
                raise UnmeasurableError(f"this CPU would take {seconds:.0f} s; {speed.FAST_BLAS}")
            return check()

        return run

    def _measure_cpu(self) -> Finding:
        self._cpu_rate, finding = speed.measure_cpu()
        return finding

    def _measure(self) -> Finding:
        self.rates, finding = speed.measure_rates(self._dtype)
        return finding

    def _fit(self) -> Finding:
        self.fitting = fits()
        states = [streamed for quants in self.fitting.values() for streamed in quants.values()]
        fit = sum(streamed is not None for streamed in states)
        advice = "no model can be used with so little memory"
        return judged("what fits", f"{fit} of {len(states)} models and quantizations", "> 0", fit > 0, advice, "warn")


def _demo() -> Flux2Pipeline:
    pipe = Flux2Pipeline.from_pretrained("demo", prompt_cache=False, keep=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(name: str, check: _Check) -> Finding:
    """What `check` finds. Whatever it raises is a finding too, and never the end of the other checks."""
    try:
        with failures():
            return check()
    except UnmeasurableError as reason:
        return skipped(name, str(reason))
    except Flux2Error as error:
        return Finding(name, "fail", str(error), advice=_REPORT)
    except Exception as error:
        return Finding(name, "fail", one_line(f"{type(error).__name__}: {error}"), advice=_REPORT)


def as_guest(finding: Finding) -> Finding:
    """`finding`; in a virtual machine a failure of what its host decides becomes a warning."""
    if finding.verdict != "fail" or not finding.name.startswith(_OF_THE_HOST) or not is_virtual():
        return finding
    return replace(finding, verdict="warn", advice=f"this is a virtual machine; on a real one: {finding.advice}")


def fits() -> dict[str, dict[str, int | None]]:
    """For each model and quantization, the bytes that a step for an image of 1024×1024 reads from disk on this machine;
    None where it does not fit into memory."""
    return {name: {quant: _streamed(name, quant) for quant in QUANTIZATIONS} for name in MODELS}


def _streamed(model: str, quant: str) -> int | None:
    variant = VARIANTS[model]
    networks = Networks.open(variant, quant=quant)
    planned = networks.needs(workload(Request.checked(variant, variant.vae.token_size, [""]))).plan(device_memory())
    return planned.phase("transformer").streamed if planned.fits else None
