"""Time a denoising step that reads cached references against one that carries them along, in alternating runs.

Random weights with few blocks, float32, as many reference tokens as image tokens. Reading the
references once (`Flux2Transformer.read`) is timed beside them: it takes the place of a whole first step's share.

    python scripts/bench_references.py --side 32 --runs 5
"""

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from flux2_mlx.config import TransformerConfig
from flux2_mlx.transformer import Flux2Transformer, image_ids, rope_table, text_ids

SIGMA = 0.9


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    mx.eval(step())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, help="tokens along a side of the image and of the reference")
    parser.add_argument("--heads", type=int, default=24, help="attention heads; klein-4b has 24")
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    side, text_length = arguments.side, arguments.text
    config = TransformerConfig(1, 2, arguments.heads, 7680, guidance_embeds=False)
    model = Flux2Transformer(config)
    model.update(tree_map(lambda x: mx.random.normal(x.shape, scale=x.shape[-1] ** -0.5), model.parameters()))
    image, reference = (mx.random.normal((1, side * side, config.in_channels)) for _ in range(2))
    text = mx.random.normal((1, text_length, config.hidden_size))
    positions, more = [text_ids(text_length), image_ids(side, side)], image_ids(side, side, t=10)
    short, long = rope_table(np.concatenate(positions), config), rope_table(np.concatenate([*positions, more]), config)
    mx.eval(model.parameters(), image, reference, text, short, long)
    timestep, own = mx.array([SIGMA]), rope_table(more, config)

    times: dict[str, list[float]] = {"read": [], "cached": [], "uncached": []}
    for _ in range(arguments.runs):
        times["read"].append(seconds(lambda: model.read(reference, own)))
        past = model.read(reference, own)
        times["cached"].append(seconds(lambda past=past: model(image, text, timestep, short, None, past)))
        joined = mx.concatenate([image, reference], axis=1)
        times["uncached"].append(seconds(lambda joined=joined: model(joined, text, timestep, long)))
    ratios = [a / b for a, b in zip(times["cached"], times["uncached"], strict=True)]
    for name, values in times.items():
        print(f"{name:9} median {statistics.median(values):7.2f} s")
    print(f"cached / uncached step: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
