"""A check-up of this machine: whether results are right, memory is what is planned, and how fast it is.

The CPU is what a GPU is compared with, so nothing is needed but this package.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import mlx.core as mx

from ..advice import workload
from ..components import network_dtype
from ..config import QUANTIZATIONS, VARIANTS
from ..device import activation_dtype, device_memory, failures, is_virtual, on_gpu
from ..errors import Flux2Error, one_line
from ..metering import turn
from ..networks import Networks
from ..pipeline import Flux2Pipeline
from ..request import Request
from . import disk, machine, numerics, peaks, speed
from .finding import Finding, UnmeasurableError, skipped
from .machine import describe
from .speed import MODELS, Rates, predictions

__all__ = ["CheckUp", "Finding", "describe", "fits", "predictions"]

_Check = Callable[[], Finding]
_OF_THE_HOST = ("memory of", "computing while reading")
_REPORT = "please report this output"


class CheckUp:
    """The checks, one after the other; `rates` is set when they have been measured.

    Args:
        models: the folder whose disk is read.
    """

    def __init__(self, models: Path):
        self._models, self._dtype = models, activation_dtype(None)
        self.rates: Rates | None = None

    def __iter__(self) -> Iterator[Finding]:
        # What a check has left, such as a file, is put away before who stopped this hears of it.
        with turn(), closing(self._checks(machine.swap_used())) as checks:
            for name, check in checks:
                yield as_guest(made(name, check))
                mx.clear_cache()

    def _checks(self, swap: int | None) -> Generator[tuple[str, _Check]]:
        dtype = self._dtype
        yield (
            "demo image",
            lambda: numerics.check_demo(Flux2Pipeline.from_pretrained("demo", prompt_cache=False, keep=False)),
        )
        yield "product", partial(numerics.check_product, dtype)
        if on_gpu():
            yield "float32", numerics.check_float32
        for bits in (4, 8):
            yield f"product with {bits} bit weights", partial(numerics.check_quantized, bits, dtype)
        yield "convolution", partial(numerics.check_convolution, network_dtype("vae", dtype))
        for head_dim in (64, 128, 512):
            yield f"attention, {head_dim} wide", partial(numerics.check_attention, head_dim, dtype)
        yield "blocks of klein-9b", partial(numerics.check_blocks, dtype)
        yield "memory of attention", partial(peaks.check_attention, dtype)
        yield "memory of a step", partial(peaks.check_step, dtype)
        yield "memory of decoding", partial(peaks.check_decoding, network_dtype("vae", dtype))
        yield "wired memory", peaks.check_wiring
        yield "longest operation", partial(speed.check_dispatch, dtype)
        yield "no cache of buffers", partial(speed.check_cache, dtype)
        with ExitStack() as kept:
            file = cache(lambda: kept.enter_context(disk.large_file(self._models)))
            yield "reading from disk", partial(disk.check_reading, file)
            yield "computing while reading", partial(disk.check_overlap, file)
        yield "speed of a block", partial(self._measure, dtype)
        yield "swap", partial(machine.check_swap, swap)

    def _measure(self, dtype: mx.Dtype) -> Finding:
        self.rates, finding = speed.measure_rates(dtype)
        return finding


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
    """`finding`, and in a virtual machine no failure of what its host decides."""
    if finding.verdict != "fail" or not finding.name.startswith(_OF_THE_HOST) or not is_virtual():
        return finding
    return replace(finding, verdict="warn", advice=f"this is a virtual machine; on a real one: {finding.advice}")


def fits() -> dict[str, dict[str, int | None]]:
    """Of each model and quantization, bytes that a step for an image of 1024×1024 reads from disk on this machine; None
    where that does not fit into memory."""
    return {name: {quant: _streamed(name, quant) for quant in QUANTIZATIONS} for name in MODELS}


def _streamed(model: str, quant: str) -> int | None:
    variant = VARIANTS[model]
    networks = Networks.open(variant, quant=quant, memory_limit=device_memory())
    planned = networks.plan(workload(Request.checked(variant, variant.vae.token_size, [""])))
    return planned.phase("transformer").streamed if planned.fits else None
