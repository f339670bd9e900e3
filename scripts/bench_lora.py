"""Time one denoising step of the transformer with adapters on all its linear layers, beside the step without.

    python scripts/bench_lora.py --ranks 16 32 --times 9

Random weights at the width of klein-4b with fewer blocks. The steps take turns in one process, and ratios are taken
turn by turn, so that a machine that slows down does not distort them; on a CPU of the process' own time. What is
printed of each adapter: the median ratio and the quartiles, the bytes of its factors, and those that the peak of a step
rises by. `--ranks 16 16+16` is one of rank 16, and two of them at once.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from flux2_mlx.adapters import Adapter, Layers, LowRank, Placed
from flux2_mlx.branches import AtWork, Branches
from flux2_mlx.config import TransformerConfig
from flux2_mlx.device import on_gpu
from flux2_mlx.layers import adapted
from flux2_mlx.transformer import Flux2Transformer, image_ids, rope_table, text_ids

SIGMA = 0.9


def adapter(network: Flux2Transformer, rank: int, dtype: mx.Dtype) -> Layers:
    """One of this rank on each linear layer."""
    weights = [(name.removesuffix(".weight"), x.shape) for name, x in tree_flatten(network.parameters()) if x.ndim == 2]
    return {name: (Placed(factors(outputs, inputs, rank, dtype)),) for name, (outputs, inputs) in weights}


def factors(outputs: int, inputs: int, rank: int, dtype: mx.Dtype) -> LowRank:
    down = mx.random.normal((rank, inputs), scale=inputs**-0.5).astype(dtype)
    up = mx.random.normal((outputs, rank), scale=0.1).astype(dtype)
    mx.eval(down, up)
    return LowRank(down, up, 0.5)


def network(double: int, single: int, dtype: mx.Dtype) -> Flux2Transformer:
    model = Flux2Transformer(TransformerConfig(double, single, 24, 7680, guidance_embeds=False))
    model.update(tree_map(lambda x: mx.random.normal(x.shape, scale=x.shape[-1] ** -0.5), model.parameters()))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def stepper(model: Flux2Transformer, side: int, text: int, dtype: mx.Dtype) -> Callable[[Flux2Transformer], float]:
    """Gives the seconds of a step of a network."""
    tokens = mx.random.normal((1, side * side, model.config.in_channels)).astype(dtype)
    states = mx.random.normal((1, text, model.config.hidden_size)).astype(dtype)
    rope = rope_table(np.concatenate([text_ids(text), image_ids(side, side)]), model.config)
    mx.eval(tokens, states, rope)
    clock = time.perf_counter if on_gpu() else time.process_time

    def step(network: Flux2Transformer) -> float:
        start = clock()
        mx.eval(network(tokens, states, mx.array([SIGMA]), rope))
        return clock() - start

    return step


def peak(step: Callable[[], float]) -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    step()
    return mx.get_peak_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", default=["16", "32"])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--side", type=int, default=32, help="of the image, in tokens")
    parser.add_argument("--text", type=int, default=512, help="tokens of text")
    parser.add_argument("--blocks", type=int, nargs=2, default=(1, 2), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--times", type=int, default=9, help="turns")
    arguments = parser.parse_args()
    dtype = getattr(mx, arguments.dtype)
    plain = network(*arguments.blocks, dtype)
    step = stepper(plain, arguments.side, arguments.text, dtype)
    networks, nbytes = {"without": plain}, {"without": 0}
    for ranks in arguments.ranks:
        changes = [adapter(plain, int(rank), dtype) for rank in ranks.split("+")]
        branches = Branches("transformer", [AtWork(Adapter(ranks, {"transformer": some})) for some in changes])
        mx.eval(branches.arrays)
        networks[ranks], nbytes[ranks] = adapted(plain, branches), branches.nbytes
    peaks = {name: peak(lambda network=network: step(network)) for name, network in networks.items()}
    turns = [{name: step(network) for name, network in networks.items()} for _ in range(arguments.times)]
    print(f"without: {statistics.median(turn['without'] for turn in turns):.3f} s")
    for name in arguments.ranks:
        low, middle, high = statistics.quantiles([turn[name] / turn["without"] for turn in turns], n=4)
        more = (peaks[name] - peaks["without"]) / 2**20
        print(
            f"rank {name}: {middle:.4f} of the step ({low:.4f} to {high:.4f}), factors {nbytes[name] / 2**20:.1f} MiB, "
            f"peak {more:+.1f} MiB on {peaks['without'] / 2**20:.0f}"
        )


if __name__ == "__main__":
    main()
