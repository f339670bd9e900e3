"""How fast the device is, what slows it down, and how long a step of each model will take."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .. import layers
from ..config import VARIANTS, TransformerConfig
from ..device import on_gpu
from ..transformer.blocks import SingleBlock
from ..weights import READER
from .finding import Finding, judged, skipped
from .numerics import random_weights, run_single

MODELS = ("klein-4b", "klein-9b", "dev")
_TEXT, _SIDE = 512, 64  # tokens of an image of 1024×1024, on a side, and of its text
_MOST_DISPATCH = 2.0  # seconds; macOS stops an operation after some five, and less while the display is on
_SLOW_DISK = 0.3e9
_SLEEP = 0.5  # seconds that the slow file of a check takes


@dataclass(frozen=True)
class Rates:
    """Operations a second of a transformer's blocks but for attention, all included, and of attention."""

    products: float
    attention: float

    def step_seconds(self, config: TransformerConfig, tokens: int) -> float:
        """Of one denoising step with so many tokens."""
        products, attention = step_operations(config, tokens)
        return products / self.products + attention / self.attention


def step_operations(config: TransformerConfig, tokens: int) -> tuple[int, int]:
    """Operations of the products of a denoising step with so many tokens, and of its attention.

    Either kind of block multiplies each token with 4·D² for attention and 3·D·M for the MLP.
    """
    D, M, blocks = config.hidden_size, config.mlp_hidden_size, config.num_layers + config.num_single_layers
    return 2 * tokens * blocks * (4 * D * D + 3 * D * M), 4 * tokens**2 * D * blocks


def measure_rates(dtype: mx.Dtype) -> tuple[Rates, Finding]:
    """Those of a block of klein-4b's width, timed ten times after a first one."""
    config = VARIANTS["klein-4b"].transformer
    heads, width, tokens = config.num_attention_heads, config.attention_head_dim, _TEXT + 32 * 32
    q = mx.random.normal((1, heads, tokens, width), key=mx.random.key(0)).astype(dtype)
    attending = timed(lambda: layers.attention(q, q, q), 3)
    block = _block(config, dtype)
    times = timed(lambda: run_single(block, config, dtype)[1], 10 if on_gpu() else 3)
    alone = TransformerConfig(0, 1, heads, 1, guidance_embeds=False)
    products, attention = step_operations(alone, tokens)
    rates = Rates(products / max(min(times) - min(attending), 1e-9), attention / min(attending))
    spread = max(times) / min(times)
    speeds = f"{rates.products / 1e12:.3g} TFLOP/s, attention {rates.attention / 1e12:.3g}"
    figure = f"{speeds}; slowest/fastest {spread:.2f}"
    advice = "the speed varies: other programs are at work, or the machine is hot"
    return rates, judged("speed of a block", figure, "< 1.3", spread < 1.3, advice, "warn")


def check_dispatch(dtype: mx.Dtype) -> Finding:
    """The longest operation that there can be, from the speed of attention over 4, 8 and 16 thousand tokens."""
    name = "longest operation"
    if not on_gpu():
        return skipped(name, "nothing stops a long operation of a CPU")
    slowest = 0.0
    for tokens in (4096, 8192, 16384):
        q = mx.random.normal((1, 24, tokens, 128), key=mx.random.key(0)).astype(dtype)
        operations = 4 * tokens**2 * 24 * 128
        slowest = max(slowest, min(timed(lambda q=q: layers.attention(q, q, q), 2)) / operations)
    seconds = slowest * layers.OPERATIONS_PER_CHUNK
    advice = "macOS may stop it while the display is on; let the display sleep during runs"
    return judged(name, f"{seconds:.2f} s", f"< {_MOST_DISPATCH:.0f} s", seconds < _MOST_DISPATCH, advice, "warn")


def check_cache(dtype: mx.Dtype) -> Finding:
    """What it costs where a memory limit leaves no room to keep freed buffers: the time of a block without a cache."""
    config = VARIANTS["klein-4b"].transformer
    block = _block(config, dtype)

    def once() -> mx.array:
        return run_single(block, config, dtype)[1]

    before = mx.set_cache_limit(0)
    try:
        without = min(timed(once, 5))
    finally:
        mx.set_cache_limit(before)
    ratio = without / min(timed(once, 5))
    advice = "a memory limit close to what a run needs makes it slower"
    return judged("no cache of buffers", f"{ratio:.2f} times the time", "< 1.1", ratio < 1.1, advice, "warn")


def check_overlap() -> Finding:
    """That a computation ends while a slow file is still being read, which it does not need."""
    waited = computing_seconds(_SLEEP)
    return judged(
        "computing while reading",
        f"{waited:.2f} s beside a file of {_SLEEP} s",
        f"< {_SLEEP / 2} s",
        waited < _SLEEP / 2,
        "the computation waits for files; models that are streamed will be slow",
    )


def computing_seconds(sleep: float) -> float:
    """What a small computation takes beside a file whose reading takes `sleep` seconds at least."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slow.safetensors"
        mx.save_safetensors(str(path), {"weight": mx.ones((1024, 1024))})
        with SlowFile(path, sleep) as file:
            weight = mx.load(file, format="safetensors", stream=READER)["weight"]
            x = mx.ones((64, 64))
            mx.eval(x @ x)
            mx.async_eval(weight.astype(mx.float16, stream=READER))
            start = time.perf_counter()
            mx.eval(x @ x)
            taken = time.perf_counter() - start
            mx.eval(weight)
            return taken


class SlowFile:
    """A file for `mx.load` whose contents take `sleep` seconds to come; its header comes at once."""

    def __init__(self, path: Path, sleep: float):
        self._path, self._sleep, self._reads = path, sleep, 0

    def __enter__(self) -> "SlowFile":
        self._file = self._path.open("rb", buffering=0)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview) -> int:
        if len(buffer) > 2**16:
            time.sleep(self._sleep)
        return self._file.readinto(buffer)


def check_disk(folder: Path, nbytes: int = 10**9) -> Finding:
    """How fast `folder`'s disk is read, by a file that is written there and not in the system's cache any more."""
    name = "reading from disk"
    folder.mkdir(parents=True, exist_ok=True)
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    if free < 4 * nbytes:
        return skipped(name, f"only {free / 1e9:.1f} GB are free in {folder}")
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(nbytes // 2**20):
            file.write(os.urandom(2**20))
        file.flush()
        os.fsync(file.fileno())
        _forget(file.fileno())
        file.seek(0)
        start, buffer = time.perf_counter(), bytearray(2**23)
        while file.readinto(buffer):
            pass
        rate = file.tell() / (time.perf_counter() - start)
    advice = (
        "models that don't fit into memory, and loading, will be slow; keep them on a faster disk with --models-dir"
    )
    return judged(name, f"{rate / 1e9:.2f} GB/s", "> 0.3 GB/s", rate > _SLOW_DISK, advice, "warn")


def _forget(descriptor: int) -> None:
    """Have the system read a file from its disk, not from its cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)


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


def _block(config: TransformerConfig, dtype: mx.Dtype) -> SingleBlock:
    from mlx.utils import tree_map

    block = random_weights(SingleBlock(config))
    block.update(tree_map(lambda weight: weight.astype(dtype), block.parameters()))
    return block
