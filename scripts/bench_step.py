"""Time a whole denoising step of a model's full geometry on this device, with each way of computing it in turns.

Weights are random, so that nothing is fetched. First the kernel that makes heads is compared with the plain path, and
every way of computing a step with the reference one. Then all ways take turns at each size. Every section reports its
own failure, and the next one goes on.

    python scripts/bench_step.py                      # klein-4b at 512², 1024² and 2048², under two minutes on a GPU
    python scripts/bench_step.py --model demo --sides 64 --seconds 10 --dtype float32
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

sys.path.insert(0, str(Path(__file__).parent.parent))

from flux2_mlx import device
from flux2_mlx.config import VARIANTS, TransformerConfig
from flux2_mlx.transformer import Flux2Transformer, image_ids, rope_table, text_ids
from flux2_mlx.transformer.blocks import QKNorm, rotated_heads
from flux2_mlx.transformer.cost import TransformerCost
from flux2_mlx.transformer.execution import PLAIN, TOKENS_PER_PART, Execution, Waits, executions
from flux2_mlx.transformer.kernel import fits, fused_heads

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass
class Way:
    """A way of computing a step, with its last block whole or of image tokens only, and what it took."""

    name: str
    execution: Execution
    last_whole: bool = False
    limited: bool = False  # by MLX's memory limit, as the plan sets it
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: int = 0
    waits: tuple[int, int] = (0, 0)


def ways(best: Execution) -> list[Way]:
    """Today's way, each change by itself or on top of the last, and all of them."""
    whole = best.part
    plain = Execution(whole, Waits.BEFORE)
    return [
        Way("parts, a wait each (as on a CPU)", PLAIN, last_whole=True),
        Way("parts, a wait each block", Execution(TOKENS_PER_PART, Waits.BLOCKS), last_whole=True),
        Way("whole, a wait each part", Execution(whole, Waits.PARTS), last_whole=True),
        Way("whole, a wait each block", Execution(whole, Waits.BLOCKS), last_whole=True),
        Way("whole, a block ahead", plain, last_whole=True),
        Way("whole, a block ahead, one kernel", replace(plain, fused=True), last_whole=True),
        Way("whole, a block ahead, two products", replace(plain, summed=True), last_whole=True),
        Way("whole, a block ahead, short last block", plain),
        Way("all changes, a block ahead", replace(plain, fused=True, summed=True)),
        Way("all changes, a wait each block", Execution(whole, Waits.BLOCKS, True, True)),
        Way("all changes in parts, a wait each", Execution(TOKENS_PER_PART, Waits.PARTS, True, True)),
        Way("all changes, a block ahead, limited by plan", replace(plain, fused=True, summed=True), limited=True),
        Way("all changes, block waits, limited by plan", Execution(whole, Waits.BLOCKS, True, True), limited=True),
    ]


class Step:
    """A step of one image of `side`² pixels."""

    def __init__(self, model: Flux2Transformer, side: int, text: int, dtype: mx.Dtype):
        config = model.config
        self._model = model
        self._tokens = mx.random.normal((1, (side // 16) ** 2, config.in_channels)).astype(dtype)
        self._text = mx.random.normal((1, text, config.hidden_size)).astype(dtype)
        self._rope = rope_table(np.concatenate([text_ids(text), image_ids(side // 16, side // 16)]), config)
        self.count = text + self._tokens.shape[1]
        mx.eval(self._tokens, self._text, self._rope)

    def __call__(self, way: Way) -> mx.array:
        arguments = self._tokens, self._text, mx.array([0.9]), self._rope
        x, shared = self._model.begin(*arguments, execution=way.execution)
        for block in self._model.blocks(shared):
            if way.last_whole:  # the last argument says what is wanted of a single block
                call = getattr(block, "func", None)
                if call.__name__ == "_run_single":
                    x = way.execution.finish(x, call(*block.args[:-1], None, x))
                    continue
            x = way.execution.finish(x, block(x))
        y = self._model.end(x, shared)
        mx.eval(y)
        return y


@contextmanager
def told(name: str) -> Iterator[None]:
    """Print what fails inside, and go on."""
    try:
        yield
    except Exception:
        print("FAILED", name, traceback.format_exc(limit=-4), flush=True)


@contextmanager
def section(name: str) -> Iterator[None]:
    print(f"\n== {name}", flush=True)
    start = time.perf_counter()
    with told(name):
        yield
    print(f"-- {time.perf_counter() - start:.1f} s", flush=True)


@contextmanager
def counted_waits() -> Iterator[list[int]]:
    """Calls of `mx.eval` and of `mx.async_eval` inside."""
    counts = [0, 0]
    functions = mx.eval, mx.async_eval

    def counting(place: int) -> Callable[..., None]:
        def call(*arrays: object) -> None:
            counts[place] += 1
            functions[place](*arrays)

        return call

    mx.eval, mx.async_eval = counting(0), counting(1)
    try:
        yield counts
    finally:
        mx.eval, mx.async_eval = functions


def errors(a: mx.array, b: mx.array) -> str:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    difference = mx.abs(a - b)
    largest = (difference.max() / mx.abs(b).max()).item()
    relative = math.sqrt(mx.square(difference).sum().item() / mx.square(b).sum().item())
    return f"largest/max {largest:.2e}, relative {relative:.2e}, equal {(a == b).mean().item():.4f}"


def timed(work: Callable[[], object], runs: int = 20) -> str:
    mx.eval(work())
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        mx.eval(work())
        taken.append(1000 * (time.perf_counter() - start))
    return f"{min(taken):.3f}/{statistics.median(taken):.3f}/{max(taken):.3f} ms"


def check_kernel(config: TransformerConfig, dtype: mx.Dtype, runs: int) -> None:
    """The kernel against the plain path, for the projections of both kinds of block and for text and image."""
    norm = QKNorm(config.attention_head_dim, config.eps)
    for one in (norm.query_norm, norm.key_norm):
        one.scale = mx.random.uniform(0.5, 1.5, one.scale.shape).astype(dtype)
    D = config.hidden_size
    for batch, side, width in ((1, 32, 3 * D), (1, 64, 3 * D + 2 * config.mlp_hidden_size), (2, 24, 3 * D)):
        projected = (3 * mx.random.normal((batch, side * side, width))).astype(dtype)
        rope = rope_table(image_ids(side, side), config)
        mx.eval(projected, rope, norm.parameters())
        if not fits(projected, config.attention_head_dim, *norm.scales):
            print("this device, or heads of this size, have no kernel, or it is not right")
        plain = partial(rotated_heads, projected, config.num_attention_heads, norm, rope, PLAIN)
        fused = partial(fused_heads, projected, config.num_attention_heads, norm.scales, norm.eps, rope)
        for name, mine, theirs in zip("qkv", fused(), plain(), strict=True):
            print(f"{dtype} {tuple(projected.shape)} {name}: {errors(mine, theirs)}", flush=True)
        print(f"   min/median/max: plain {timed(plain, runs)}, one kernel {timed(fused, runs)}", flush=True)


def check_steps(model: Flux2Transformer, text: int, dtype: mx.Dtype, best: Execution, side: int) -> None:
    step = Step(model, side, text, dtype)
    all_ways = ways(best)
    reference = step(all_ways[0])
    again = step(all_ways[0])
    print(f"{side}²: {all_ways[0].name}, twice: {errors(again, reference)}")
    for way in all_ways[1:-2]:
        with told(way.name):
            print(f"{side}²: {way.name}: {errors(step(way), reference)}", flush=True)
    # Of the rounding itself: parts of another size are the same arithmetic by other kernels.
    print(f"{side}²: parts of 640: {errors(step(Way('', replace(PLAIN, part=640))), reference)}")


def measure(step: Step, way: Way, cost: TransformerCost, held: int) -> None:
    """Take one turn of a way."""
    costs = replace(cost, execution=way.execution)
    ahead = costs.passing(step.count)
    before = mx.set_memory_limit(held + ahead) if way.limited else None
    try:
        if way.limited:  # buffers that others have freed don't fit, and giving them back would be counted
            mx.clear_cache()
            step(way)
        mx.reset_peak_memory()
        with counted_waits() as counts:
            start, cpu = time.perf_counter(), time.process_time()
            step(way)
            way.cpu.append(time.process_time() - cpu)
            way.seconds.append(time.perf_counter() - start)
        way.waits = counts[0], counts[1]
        way.peak = max(way.peak, mx.get_peak_memory() - held)
    finally:
        if before is not None:
            mx.set_memory_limit(before)


def compare(model: Flux2Transformer, side: int, text: int, cost: TransformerCost, best: Execution, most: float) -> None:
    step = Step(model, side, text, cost.dtype)
    alive = []
    mx.synchronize()
    mx.clear_cache()
    held = mx.get_active_memory()
    for way in ways(best):
        with told(way.name):
            measure(step, way, cost, held)  # compiles what it needs; not counted
            way.seconds.clear(), way.cpu.clear()
            alive.append(way)
    end = time.perf_counter() + most
    while time.perf_counter() < end and len(alive[0].seconds) < 25:
        for way in alive:
            measure(step, way, cost, held)
    print(f"{side}², {step.count} tokens, {len(alive[0].seconds)} turns; weights {held / 1e9:.2f} GB")
    print(f"{'way':42} {'min':>8} {'median':>8} {'max':>8} {'ratio':>6} {'CPU s':>6} eval async  peak GB planned")
    for way in alive:
        ratio = statistics.median(a / b for a, b in zip(way.seconds, alive[0].seconds, strict=True))
        planned = replace(cost, execution=way.execution).passing(step.count)
        print(
            f"{way.name:42} {min(way.seconds):8.4f} {statistics.median(way.seconds):8.4f} {max(way.seconds):8.4f} "
            f"{ratio:6.3f} {statistics.median(way.cpu):6.3f} {way.waits[0]:4} {way.waits[1]:5} "
            f"{way.peak / 1e9:8.3f} {planned / 1e9:7.3f}",
            flush=True,
        )


def random_model(config: TransformerConfig, dtype: mx.Dtype) -> Flux2Transformer:
    model = Flux2Transformer(config)
    model.update(
        tree_map(lambda x: (mx.random.normal(x.shape) * x.shape[-1] ** -0.5).astype(dtype), model.parameters())
    )
    for block in [*model.double_blocks, *model.single_blocks]:
        mx.eval(block.parameters())
    mx.eval(model.parameters())
    return model


def card_memory() -> None:
    """What a card's own tool says is in use, beside what MLX knows of: the difference is for context and libraries."""
    told = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv"],
        capture_output=True,
        text=True,
        timeout=20,
    ).stdout.strip()
    known = mx.get_active_memory() + mx.get_cache_memory()
    print(f"{told.splitlines()[-1] if told else 'nothing told'}; MLX holds {known / 2**20:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="klein-4b", choices=list(VARIANTS))
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 512, 2048])
    parser.add_argument("--text", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=60, help="for the turns of all sizes together")
    parser.add_argument("--runs", type=int, default=20, help="of each kernel that is timed by itself")
    arguments = parser.parse_args()
    dtype, config = DTYPES[arguments.dtype], VARIANTS[arguments.model].transformer
    print(f"{device.chip()}, MLX {device.MLX_VERSION}, GPU {device.on_gpu()}, {arguments.model} in {arguments.dtype}")
    mx.random.seed(1)
    best = next(executions(config))
    for other in DTYPES.values():
        with section(f"kernel in {other}"):
            if device.on_gpu():
                check_kernel(config, other, arguments.runs)
    with section("weights"):
        model = random_model(config, dtype)
    with section("all ways give the same"):
        check_steps(model, arguments.text, dtype, best, min(arguments.sides))
    cost = TransformerCost(config, dtype)
    for side in arguments.sides:
        with section(f"turns at {side}²"):
            compare(model, side, arguments.text, cost, best, arguments.seconds / len(arguments.sides))
    if device.on_gpu() and not device.on_metal():
        with section("memory of the card"):
            card_memory()


if __name__ == "__main__":
    main()
