"""The device that MLX computes on: its dtypes, its memory, which kernels it has, and what its errors mean."""

import functools
import logging
import math
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx

from .chips import CHIPS, REACHED, find_chip, like
from .config import DTYPES
from .errors import DeviceError, InputError
from .requirements import check_mlx

MLX_VERSION: str = mx.__version__  # type: ignore[attr-defined]  # which the stubs of MLX leave out
check_mlx(MLX_VERSION)
GIB = 2**30
_DTYPES = {name: getattr(mx, name) for name in DTYPES}
# Chips whose GPU has no bfloat16, so that Metal makes do with float32 and conversions.
_WITHOUT_BFLOAT16 = re.compile(r"Apple M[12]\b")
# Metal's attention kernel has these head sizes; cuDNN's, in 16 bits, has the multiples of 8 up to 128.
_FUSED_ON_METAL = (64, 80, 128)
_FUSED_ON_CUDA = tuple(range(8, 129, 8))
# The share of a card's memory that networks can have. The rest is for its context and its libraries, which on an H200
# take 0.8 GiB (python scripts/bench_step.py says so at its end), and for a display.
_CARD_SHARE = 0.9
# From how many rows on packed weights are unpacked (see `rows_to_unpack`): where Metal has bfloat16, where it has not,
# and on a CPU.
_ROWS_TO_UNPACK, _ROWS_WITHOUT_BFLOAT16, _ROWS_ON_CPU = 1024, 256, 32
MOST_DISPATCH = 2.0  # seconds; macOS stops an operation after some five, and less while the display is on
_MOST_BYTES = 2**63  # what MLX's limits can hold
_FEWEST_BYTES = 10**6  # of a number without a unit; of a smaller one the unit was forgotten
_MOST_GIGABYTES = 1000  # a greater number whose unit was forgotten is of megabytes
# How MLX begins to say that a GPU failed. What follows may stand in other messages as well, which quote a path or are
# PyTorch's.
_FAILED = re.compile(r"\[METAL\]|\[metal::|\[malloc\S*\] Unable to allocate|cudaError|cu[A-Za-z]\w*(\(.*\))? failed")
# What it says then, what that means, and what to do, with what is smaller. The first that is found counts.
_FAILURES = (
    (
        r"OutOfMemory|Insufficient Memory|out of memory|cudaErrorMemoryAllocation|Unable to allocate",
        "the GPU has no memory left for this",
        "choose a lower memory_limit, {smaller}, or close other programs",
    ),
    (
        r"maximum allowed buffer size",
        "one array would be larger than the GPU allows",
        "choose {smaller}",
    ),
    (
        r"GPU Timeout|ErrorTimeout",
        "the GPU was stopped, as one of its operations took too long",
        "choose {smaller}, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment",
    ),
    (
        r"Impacting Interactivity|ImpactingInteractivity",
        "the GPU was stopped for the sake of the display",
        "let the display sleep, choose {smaller}, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment",
    ),
    ("", "the GPU failed", ""),
)
_ON_CPU = "close other programs, or set FLUX2_MLX_DEVICE=cpu in the environment, which takes longer"
_FOREIGN = "_of_a_caller"  # an attribute of exceptions
_COMPUTED_IN: set[int] = set()  # the process that MLX has computed in, which one that is forked from it inherits
_log = logging.getLogger(__name__)


def _choose() -> None:
    """Compute on the CPU if the environment says so."""
    chosen = os.environ.get("FLUX2_MLX_DEVICE", "")
    if chosen not in ("", "cpu"):
        raise InputError(f"FLUX2_MLX_DEVICE is {chosen!r}; it can be cpu, or unset, for the GPU where there is one")
    if chosen:
        mx.set_default_device(mx.cpu)


_choose()


def check_process() -> None:
    """Raise DeviceError if MLX can't compute in this process: one that was forked after MLX had computed has none of
    its threads, and would wait for them for ever."""
    if _COMPUTED_IN - {os.getpid()}:
        raise DeviceError(
            "this process was forked from one in which MLX had computed, and can't compute itself; start it with "
            "multiprocessing.get_context('spawn'), or fork before the first image is made"
        )


def begin_computing() -> None:
    """Note that MLX computes in this process from now on; raises what `check_process` does."""
    check_process()
    _COMPUTED_IN.add(os.getpid())


def on_gpu() -> bool:
    """Whether MLX computes on a GPU: Apple's, or one with CUDA."""
    return mx.is_available(mx.gpu) and mx.default_device() == mx.gpu


def on_metal() -> bool:
    """Whether MLX computes on an Apple GPU."""
    return mx.metal.is_available() and on_gpu()


def on_cuda() -> bool:
    """Whether MLX computes on another GPU."""
    return on_gpu() and not mx.metal.is_available()


def activation_dtype(name: str | None) -> mx.Dtype:
    """The dtype called `name`; InputError if there is none.

    None: the device's own, which is float16 on M1 and M2 (Pro, Max and Ultra included), bfloat16 on other GPUs, and
    float32 on a CPU.
    """
    if name is None:
        return _gpu_dtype() if on_gpu() else mx.float32
    if name not in _DTYPES:
        raise InputError(f"unknown dtype {name!r}; choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _gpu_dtype() -> mx.Dtype:
    return mx.float16 if _WITHOUT_BFLOAT16.match(chip()) else mx.bfloat16


def computing_dtype(name: str | None) -> mx.Dtype:
    """`activation_dtype` for a computation that begins. A float32 that was asked for is no TF32, or a warning says so.

    MLX reads whether TF32 is wanted once, with its first product on a GPU. So there is none before this is called.
    """
    if name == "float32" and on_gpu():
        os.environ.setdefault("MLX_ENABLE_TF32", "0")
        if cuts_float32():
            _warn_of_tf32()
    return activation_dtype(name)


def cuts_float32() -> bool | None:
    """Whether the GPU's matrix units cut products in float32 to 10 bits, which is called TF32, as a product shows.

    None: it failed. Ask only where it is known what is computed in: the first product decides (see `computing_dtype`).
    """
    if not on_gpu():
        return False
    with suppress(DeviceError), failures():
        return _is_product_cut()
    return None


@functools.cache
def _is_product_cut() -> bool:
    x = mx.full((512, 512), 1 + 2**-12)
    return bool((x @ x)[0, 0] < 512 * (1 + 2**-12))


@functools.cache  # once is enough
def _warn_of_tf32() -> None:
    _log.warning("float32 is cut to TF32 here; set MLX_ENABLE_TF32=0 in the environment before Python starts")


def is_slow_with_qint4() -> bool:
    """Whether a step takes longer with 4 bit weights than with 16 bit ones in memory, as was measured on M2."""
    return on_metal() and _WITHOUT_BFLOAT16.match(chip()) is not None


def rows_to_unpack() -> float:
    """From how many rows on packed weights are better unpacked and multiplied as dense ones; infinite: never.

    Metal unpacks a weight anew for every few rows. That makes products of 4,096 rows 30 % slower than dense ones on an
    M2 Pro (Rapid-MLX issue 3058); for an M3 Max 7 to 14 % is estimated, though none was seen on an M3 Ultra. Unpacking
    once writes 2 bytes a weight, which takes as long as some 40 rows take to be multiplied by it on all of these chips.
    From M5 on both kinds of product reach the same rate (omlx issue 2212), as what unpacks stands beside the matrix
    units. MLX's CPU backend multiplies packed weights by one row after the other: 3 GFLOP/s on two Linux cores, where
    dense ones reach 130 with a fast BLAS and 3 without, and 0.2 in bfloat16, where dense ones reach 5.
    """
    if not on_gpu():
        return _ROWS_ON_CPU
    known = find_chip(chip()) if on_metal() else None
    if known is None or known.has_matrix_units:
        return math.inf
    return _ROWS_TO_UNPACK if known.has_bfloat16 else _ROWS_WITHOUT_BFLOAT16


def chip() -> str:
    """The name of the chip that computes, in its maker's words."""
    return str(mx.device_info(mx.gpu if on_gpu() else mx.cpu).get("device_name") or "an unknown chip")


def is_virtual() -> bool:
    """Whether the GPU is a Mac's in a virtual machine, which has no say in its memory and its time."""
    return "Paravirtual" in chip()


def system() -> str:
    """The operating system and its version, without what may be told of one machine alone."""
    release = platform.mac_ver()[0] or ".".join(re.findall(r"\d+", platform.release())[:3])
    return f"{'macOS' if platform.system() == 'Darwin' else platform.system()} {release}"


def machine() -> dict[str, str | bool | None]:
    """What results depend on besides the settings: on another machine they differ in the last bits, or more. Ask only
    where `cuts_float32` may be asked."""
    return {"chip": chip(), "system": system(), "mlx": MLX_VERSION, "tf32": cuts_float32()}


def dtype_name(dtype: mx.Dtype) -> str:
    """The name that `activation_dtype` knows it by."""
    return str(dtype).rpartition(".")[2]


def fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`function`, compiled into one kernel on a GPU. (On a CPU that would need a C++ compiler at run time.)"""
    compiled = mx.compile(function, shapeless=True)

    @functools.wraps(function)
    def call(*arrays: mx.array) -> mx.array:
        return compiled(*arrays) if on_gpu() else function(*arrays)

    return call


def fuses_attention(head_dim: int, itemsize: int) -> bool:
    """Whether attention over heads of this size, in numbers of `itemsize` bytes, never stores its scores."""
    if on_metal():
        return head_dim in _FUSED_ON_METAL
    return on_gpu() and head_dim in _FUSED_ON_CUDA and itemsize == 2


def relative_speed() -> float:
    """How many times as fast as the slowest chip of the table this Mac's is taken for; 1 on other machines."""
    return like(chip()).tflops / CHIPS[0].tflops if on_metal() else 1.0


def dispatch_seconds(operations: int) -> float | None:
    """About how many seconds the GPU of this Mac computes so many operations, if it is as fast as its `chip_class`;
    None on other machines."""
    if not on_metal():
        return None
    return operations / (REACHED * like(chip()).tflops * 1e12)


def chip_class() -> str:
    """The chip of known speed that this Mac's is taken for, see `chips.like`."""
    return f"Apple {like(chip()).name}"


@contextmanager
def direct_convolutions() -> Iterator[None]:
    """Have Metal convolve directly. Winograd's method, which MLX would take for large layers in 16 bits as well, keeps
    its intermediates in 16 bits, and they reach 100 times the result: 9 to 36 times the error, up to 11 of 255 levels.

    What is convolved must be evaluated inside, by whoever has the turn: the setting is the process'.
    """
    before = os.environ.get("MLX_CONV_WINOGRAD")
    os.environ["MLX_CONV_WINOGRAD"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLX_CONV_WINOGRAD"]
        else:
            os.environ["MLX_CONV_WINOGRAD"] = before


def device_memory() -> int:
    """Bytes that networks can have: of an Apple GPU what Metal recommends, or less so that the system keeps 4 GiB (on a
    Mac of 8 GiB) to 8 GiB (from 24 GiB on); of another GPU nine tenths; of a CPU the physical memory.

    What is planned with is wired, and Macs of 16 GiB froze when all that Metal recommends was (mlx issue 3186).
    """
    if on_metal():
        return mac_limit(*_mac_memory())
    if on_gpu():
        return int(_CARD_SHARE * _card_memory())
    return _host_memory()


def mac_limit(whole: int, recommended: int) -> int:
    """Bytes that networks can have of a Mac with `whole` bytes, of which Metal recommends `recommended`. Where it is
    smaller than any real Mac, as virtual ones are, the system keeps half."""
    return min(recommended, whole - min(8 * GIB, 2 * GIB + whole // 4, whole // 2))


def _mac_memory() -> tuple[int, int]:
    """Bytes of memory that the Mac has, and those that Metal recommends: all where it does not say."""
    info = mx.device_info(mx.gpu)
    whole = min(int(info.get("memory_size") or _host_memory()), _MOST_BYTES - 1)
    return whole, int(info.get("max_recommended_working_set_size") or whole)


def _card_memory() -> int:
    if total := mx.device_info(mx.gpu).get("total_memory"):
        return int(total)
    raise DeviceError("MLX does not say how much memory this GPU has; say it with a memory_limit, such as 12GB")


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_reason() -> str:
    """Why `device_memory` is what it is, in a few words."""
    if on_metal():
        whole, recommended = _mac_memory()
        kept = f"{(whole - device_memory()) / GIB:.3g} GiB"
        metal = f" (Metal recommends at most {recommended / GIB:.3g} GiB)" if recommended != whole else ""
        return f"of the {whole / GIB:.3g} GiB of this Mac {kept} are kept for the system{metal}"
    if on_gpu():
        return f"of the {_card_memory() / GIB:.3g} GiB of this GPU a tenth is left for what the libraries need"
    return "all of this machine's memory, as no GPU is used"


def memory_bytes(limit: str | int | None) -> int:
    """The bytes of a memory limit; None: `device_memory`."""
    return device_memory() if limit is None else parse_memory(limit)


def parse_memory(text: str | int) -> int:
    """Bytes of a size such as `12GB`, `7.5GiB` or `800MB`, or of a number of them; InputError if it is none.

    A number without a unit that no run could do with is not taken for bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ") if match else 0
    number = float(match[1]) if match else 0.0
    if match is None or not 1 <= number * unit < _MOST_BYTES:
        raise InputError(f"memory_limit must be a size such as 12GB or 7.5GiB, got {str(text)[:40]!r}")
    if unit == 1 and number < _FEWEST_BYTES:
        meant = f"{match[1]}{'GB' if number < _MOST_GIGABYTES else 'MB'}"
        raise InputError(f"{match[1]} bytes of memory are too few for any run; did you mean {meant}?")
    return int(number * unit)


@contextmanager
def failures(smaller: str | None = "a smaller image") -> Iterator[None]:
    """Turn what MLX raises for a GPU that fails into a DeviceError; other errors pass.

    Args:
        smaller: what would take the GPU less; None: nothing, but the CPU can do it as well.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_failure(error):
            raise
        raise DeviceError(f"{_meaning(str(error), smaller)} ({_first_line(error)})") from error


def is_failure(error: Exception) -> bool:
    """Whether MLX raised `error` for a GPU that fails, and not in a function of the caller's."""
    return type(error) is RuntimeError and not hasattr(error, _FOREIGN) and _FAILED.match(str(error)) is not None


@contextmanager
def foreign() -> Iterator[None]:
    """Mark what a function of the caller's raises inside, so that it is not taken for a failure of the GPU."""
    try:
        yield
    except RuntimeError as error:
        setattr(error, _FOREIGN, True)
        raise


def _meaning(message: str, smaller: str | None) -> str:
    found = ((meaning, way) for pattern, meaning, way in _FAILURES if re.search(pattern, message, re.IGNORECASE))
    meaning, way = next(found)
    way = way.format(smaller=smaller) if smaller else _ON_CPU
    return f"{meaning}; {way}" if way else meaning


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0][:200]
