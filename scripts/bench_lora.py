"""Time one denoising step of the transformer with adapters on all its linear layers, beside the step without.

    python scripts/bench_lora.py --ranks 16 32 --quant qint8

Random weights at the width of klein-4b. On a GPU the step is a whole one at 1024 × 1024, in bfloat16, unless other
sizes are given; on a CPU one that takes a second. The steps take turns in one process, each time in another order, and
ratios are taken turn by turn, so that a machine that slows down does not distort them; on a CPU of the process' own
time. What is printed of each adapter: the median ratio and the quartiles, the bytes of its factors, and those that the
peak of a step rises by.
`--ranks 16 16+16` is one of rank 16, and two of them at once; `32/3` is one of rank 32 that changes q, k and v apart,
as adapters of diffusers do.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from flux2_mlx.adapters import Adapter, Layers, LowRank, Placed
from flux2_mlx.branches import AtWork, Branches
from flux2_mlx.config import QUANTIZATIONS, VARIANTS
from flux2_mlx.device import on_gpu
from flux2_mlx.layers import adapted
from flux2_mlx.quantization import quantize_module, statement
from flux2_mlx.transformer import Flux2Transformer, image_ids, rope_table, text_ids
from flux2_mlx.transformer.execution import executions

SIGMA = 0.9
WHOLE: dict[str, Any] = {"dtype": "bfloat16", "side": 64, "text": 512, "blocks": (5, 20), "times": 15}
SMALL: dict[str, Any] = {"dtype": "float32", "side": 6, "text": 16, "blocks": (1, 1), "times": 4}
Shapes = Mapping[str, tuple[int, ...]]


def adapter(shapes: Shapes, rank: int, parts: int, dtype: mx.Dtype) -> Layers:
    """One of this rank on each linear layer, with so many changes of each `qkv`."""
    return {
        name: tuple(changes(*shape, rank, parts if name.endswith(".qkv") else 1, dtype))
        for name, shape in shapes.items()
    }


def changes(outputs: int, inputs: int, rank: int, parts: int, dtype: mx.Dtype) -> list[Placed]:
    size = outputs // parts
    return [Placed(factors(size, inputs, rank, dtype), slice(start, start + size)) for start in range(0, outputs, size)]


def factors(outputs: int, inputs: int, rank: int, dtype: mx.Dtype) -> LowRank:
    down = mx.random.normal((rank, inputs), scale=inputs**-0.5).astype(dtype)
    up = mx.random.normal((outputs, rank), scale=0.1).astype(dtype)
    mx.eval(down, up)
    return LowRank(down, up, 0.5)


def branches(ranks: str, shapes: Shapes, dtype: mx.Dtype) -> Branches:
    found = []
    for text in ranks.split("+"):
        rank, _, parts = text.partition("/")
        found.append(Adapter(text, {"transformer": adapter(shapes, int(rank), int(parts or 1), dtype)}))
    made = Branches("transformer", [AtWork(one) for one in found])
    mx.eval(made.arrays)
    return made


def network(double: int, single: int, dtype: mx.Dtype) -> Flux2Transformer:
    config = replace(VARIANTS["klein-4b"].transformer, num_layers=double, num_single_layers=single)
    model = Flux2Transformer(config)
    for name, empty in tree_flatten(model.parameters()):
        weight = mx.random.normal(empty.shape, scale=empty.shape[-1] ** -0.5).astype(dtype)
        mx.eval(weight)  # one by one, as each is several times as large before it is cast
        model.load_weights([(name, weight)], strict=False)
    return model


def linear_shapes(model: Flux2Transformer) -> Shapes:
    return {name.removesuffix(".weight"): x.shape for name, x in tree_flatten(model.parameters()) if x.ndim == 2}


def stepper(model: Flux2Transformer, side: int, text: int, dtype: mx.Dtype) -> Callable[[Flux2Transformer], float]:
    """Gives the seconds of a step of a network."""
    tokens = mx.random.normal((1, side * side, model.config.in_channels)).astype(dtype)
    states = mx.random.normal((1, text, model.config.hidden_size)).astype(dtype)
    rope = rope_table(np.concatenate([text_ids(text), image_ids(side, side)]), model.config)
    mx.eval(tokens, states, rope)
    clock = time.perf_counter if on_gpu() else time.process_time
    execution = next(executions(model.config))

    def step(network: Flux2Transformer) -> float:
        start = clock()
        mx.eval(network(tokens, states, mx.array([SIGMA]), rope, execution=execution))
        return clock() - start

    return step


def peak(step: Callable[[], float]) -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    step()
    return mx.get_peak_memory() - before


def turn(
    step: Callable[[Flux2Transformer], float], networks: Mapping[str, Flux2Transformer], number: int
) -> dict[str, float]:
    """The seconds of a step of each network, of which that of this number is the first."""
    names = [*networks]
    first = number % len(names)
    return {name: step(networks[name]) for name in (*names[first:], *names[:first])}


def show(name: str, turns: Sequence[Mapping[str, float]], nbytes: int, peaks: Mapping[str, int]) -> None:
    low, middle, high = statistics.quantiles([turn[name] / turn["without"] for turn in turns], n=4)
    more = (peaks[name] - peaks["without"]) / 2**20
    print(
        f"rank {name}: {middle:.4f} of the step ({low:.4f} to {high:.4f}), factors {nbytes / 2**20:.1f} MiB, "
        f"peak {more:+.1f} MiB on {peaks['without'] / 2**20:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = WHOLE if on_gpu() else SMALL
    parser.add_argument("--ranks", nargs="+", default=["16", "32"])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default=usual["dtype"])
    parser.add_argument("--quant", choices=QUANTIZATIONS, default="bf16", help="of the weights; bf16: as --dtype says")
    parser.add_argument("--side", type=int, default=usual["side"], help="of the image, in tokens")
    parser.add_argument("--text", type=int, default=usual["text"], help="tokens of text")
    parser.add_argument("--blocks", type=int, nargs=2, default=usual["blocks"], metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--times", type=int, default=usual["times"], help="turns")
    arguments = parser.parse_args()
    dtype = getattr(mx, arguments.dtype)
    plain = network(*arguments.blocks, dtype)
    shapes = linear_shapes(plain)
    quantize_module(plain, statement(arguments.quant, "transformer", shapes.items()))
    mx.eval(plain.parameters())
    step = stepper(plain, arguments.side, arguments.text, dtype)
    made = {ranks: branches(ranks, shapes, dtype) for ranks in arguments.ranks}
    networks = {"without": plain} | {ranks: adapted(plain, one) for ranks, one in made.items()}
    peaks = {name: peak(lambda network=network: step(network)) for name, network in networks.items()}
    turns = [turn(step, networks, number) for number in range(arguments.times)]
    print(f"without: {statistics.median(turn['without'] for turn in turns):.3f} s")
    for ranks, one in made.items():
        show(ranks, turns, one.nbytes, peaks)


if __name__ == "__main__":
    main()
