"""How fast the device is, what slows it down, and how long a step of each model will take."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import mlx.core as mx

from .. import layers
from ..config import VARIANTS, TransformerConfig
from ..device import MOST_DISPATCH, on_gpu
from ..durations import Rates, own_chip, rates_of
from ..transformer import pass_operations
from ..transformer.blocks import SingleBlock
from .finding import Finding, judged, skipped
from .numerics import cast, random_weights, single_pass

MODELS = ("klein-4b", "klein-9b", "dev")
_TEXT = 512  # tokens of an image's text
_SIDE = 64  # tokens on a side of an image of 1024×1024
# Of the image whose block is timed: tokens on a side, on a GPU and on a CPU.
_TIMED_SIDE = (32, 16)
_SLOW_CPU = 12e9  # operations a second, with which some checks would take a minute each; the reference BLAS does 1 to 3
_AS_FAST = 0.75  # times what a chip is expected to do
FAST_BLAS = (
    "on Linux, install a fast BLAS (libopenblas0-pthread on Debian and Ubuntu) and name its libblas.so.3 in LD_PRELOAD"
)


def measure_cpu() -> tuple[float, Finding]:
    """Operations a second of a product on the CPU in float32."""
    x, w = mx.ones((512, 1024), stream=mx.cpu), mx.ones((1024, 1024), stream=mx.cpu)
    rate = 2 * x.size * w.shape[1] / min(timed(lambda: mx.matmul(x, w, stream=mx.cpu), 3))
    figure = f"{rate / 1e9:.3g} GFLOP/s"
    advice = f"what a CPU computes takes long here; {FAST_BLAS}"
    bound = f"> {_SLOW_CPU / 1e9:.0f} GFLOP/s"
    return rate, judged("speed of the CPU", figure, bound, rate > _SLOW_CPU, advice, "warn")


def block_operations() -> int:
    """Operations of the products of all runs of the block that `measure_rates` times."""
    return (1 + _repeats()) * pass_operations(_block(), _timed_tokens())[0]


def measure_rates(dtype: mx.Dtype) -> tuple[Rates, Finding]:
    """The rates of a block of klein-4b's width, timed ten times (on a CPU three times) after a first one."""
    config = VARIANTS["klein-4b"].transformer
    heads, width = config.num_attention_heads, config.attention_head_dim
    tokens = _timed_tokens()
    q = mx.random.normal((1, heads, tokens, width), key=mx.random.key(0)).astype(dtype)
    attending = timed(lambda: layers.attention(q, q, q), 3)
    times = timed(_block_pass(config, dtype), _repeats())
    products, attention = pass_operations(_block(), tokens)
    rates = Rates(products / max(min(times) - min(attending), 1e-9), attention / min(attending))
    spread = max(times) / min(times)
    speeds = f"{rates.products / 1e12:.3g} TFLOP/s, attention {rates.attention / 1e12:.3g}"
    figure = f"{speeds}; slowest/fastest {spread:.2f}"
    advice = "the speed varies: other programs are at work, or the machine is hot"
    return rates, judged("speed of a block", figure, "< 1.3", spread < 1.3, advice, "warn")


def check_rates(rates: Rates | None, dtype: mx.Dtype) -> Finding:
    """Whether the measured `rates` are those that this chip is known for."""
    name = "speed of this chip"
    chip = own_chip()
    if chip is None:
        return skipped(name, "the table of chips does not have it")
    if rates is None:
        return skipped(name, "no speed was measured")
    expected = predictions(rates_of(chip, dtype))
    share = min(expected[model] / seconds for model, seconds in predictions(rates).items())
    advice = "other programs are at work, or the machine is hot, on battery or in low power mode; if not, please report"
    figure = f"{share:.2f} of what an {chip.name} is expected to do"
    return judged(name, figure, f"> {_AS_FAST}", share > _AS_FAST, advice, "warn")


def check_dispatch(dtype: mx.Dtype) -> Finding:
    """The longest operation that there can be, from the speed of attention over 4, 8 and 16 thousand tokens."""
    name = "longest operation"
    if not on_gpu():
        return skipped(name, "nothing stops a long operation of a CPU")
    slowest = 0.0
    for tokens in (4096, 8192, 16384):
        q = mx.random.normal((1, 24, tokens, 128), key=mx.random.key(0)).astype(dtype)
        operations = 4 * tokens**2 * 24 * 128
        slowest = max(slowest, min(timed(partial(layers.attention, q, q, q), 2)) / operations)
    seconds = slowest * layers.OPERATIONS_PER_CHUNK
    advice = "macOS may stop it while the display is on; let the display sleep during runs"
    return judged(name, f"{seconds:.2f} s", f"< {MOST_DISPATCH:.0f} s", seconds < MOST_DISPATCH, advice, "warn")


def check_cache(dtype: mx.Dtype) -> Finding:
    """What it costs where a memory limit leaves no room to keep freed buffers: the time of a block without a cache."""
    if not on_gpu():
        return skipped("no cache of buffers", "a CPU gets memory at once")
    once = _block_pass(VARIANTS["klein-4b"].transformer, dtype)
    before = mx.set_cache_limit(0)
    try:
        without = min(timed(once, 5))
    finally:
        mx.set_cache_limit(before)
    ratio = without / min(timed(once, 5))
    advice = "a memory limit close to what a run needs makes it slower"
    return judged("no cache of buffers", f"{ratio:.2f} times the time", "< 1.1", ratio < 1.1, advice, "warn")


def predictions(rates: Rates) -> dict[str, float]:
    """Seconds of a denoising step of each model for an image of 1024×1024."""
    tokens = _TEXT + _SIDE * _SIDE
    return {name: rates.step_seconds(VARIANTS[name].transformer, tokens) for name in MODELS}


def timed(work: Callable[[], mx.array], times: int) -> list[float]:
    """Seconds of each of so many runs, after a first one."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        mx.eval(work())
        taken.append(time.perf_counter() - start)
    return taken[1:]


def _block() -> TransformerConfig:
    """A transformer of the single block that is timed."""
    return replace(VARIANTS["klein-4b"].transformer, num_layers=0, num_single_layers=1)


def _repeats() -> int:
    return 10 if on_gpu() else 3


def _timed_side() -> int:
    return _TIMED_SIDE[not on_gpu()]


def _timed_tokens() -> int:
    return _TEXT + _timed_side() ** 2


def _block_pass(config: TransformerConfig, dtype: mx.Dtype) -> Callable[[], mx.array]:
    """What a single block with random weights makes of the tokens of an image of 512×512 (256×256 on a CPU)."""
    return single_pass(cast(random_weights(SingleBlock(config)), dtype), config, dtype, _timed_side())
