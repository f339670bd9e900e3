"""Error against bytes of the quantizations of transformers, as markdown.

    python scripts/bench_bits.py random [MODEL ...]     # the true widths with random weights
    python scripts/bench_bits.py demo [CHECKPOINT ...]  # the trained weights of the demo, or of checkpoints in bf16

Random networks have one block of each kind, so that dev takes 9 GB, and their error is that of the velocity of 64 image
tokens beside 64 of text, relative to the one with weights in 16 bits, computed in float32. Blocks of `mixed4` are those
in 4 bits; what belongs to no block is in 8. Images of the demo are compared with those of bf16 and the same seeds by
their peak signal-to-noise ratio; a checkpoint in other bits that was made of the demo is compared with these too.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoint import Checkpoint, Component, variant_components
from flux2_mlx.config import QUANTIZATIONS, VARIANTS
from flux2_mlx.loading import module_tensors
from flux2_mlx.quantization import GROUP_SIZE, layer_bits, quantize_array
from flux2_mlx.transformer import Flux2Transformer, image_ids, rope_table, text_ids

SIDE = TEXT = 8  # tokens on a side of the image, and rows of that many tokens of text
PROMPTS = [
    "a yellow star left of a red ring on a blue background",
    "a green square above a blue circle on a white background",
    "a red triangle on a black background",
    "a blue star right of a green ring on a yellow background",
]
IMAGES = 2  # of each prompt


def random_table(models: list[str]) -> Iterator[str]:
    """Lines of markdown: bytes of each model's transformer, and the error of a random network of its widths."""
    yield "| model | weights | GB | bits a weight | error |"
    yield "|---|---|--:|--:|--:|"
    for model in models:
        config = VARIANTS[model].transformer
        small = Component("transformer", replace(config, num_layers=1, num_single_layers=1), None, ())
        exact = velocity(random_network(small, small))
        for quant in QUANTIZATIONS:
            wanted = small.quantized(quant, ranking=())
            found = exact if quant == "bf16" else velocity(random_network(small, wanted))
            error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
            whole = size(transformer(model, quant))
            yield f"| `{model}` | {quant} | {whole} | {error:.2%} |"


def size(component: Component) -> str:
    """Cells: gigabytes, and bits a weight."""
    weights = sum(math.prod(x.shape) for x in replace(component, quantization=None).infos.values())
    return f"{component.nbytes / 1e9:.2f} | {8 * component.nbytes / weights:.2f}"


def random_network(plain: Component, stored: Component) -> Flux2Transformer:
    """One with random weights of about the size that training gives, or with the numbers that they are stored as."""
    module = plain.build()
    bits = layer_bits(stored.quantization, stored.infos)
    for seed, (name, info) in enumerate(module_tensors(module).items()):
        layer = name.removesuffix(".weight")
        weight = mx.ones(info.shape, mx.bfloat16)
        if len(info.shape) == 2:
            weight = drawn(info.shape, seed)
        if layer in bits:
            weight = dequantized(weight, bits[layer])
        mx.eval(weight)
        module.load_weights([(name, weight)], strict=False)
    return module


def drawn(shape: tuple[int, ...], seed: int) -> mx.array:
    """Normal numbers that keep the size of what they meet, in bfloat16, some rows at a time."""
    step = max(1, 2**24 // shape[1])
    keys = [mx.random.key(1000 * seed + start // step) for start in range(0, shape[0], step)]
    heights = [min(step, shape[0] - start) for start in range(0, shape[0], step)]
    parts = []
    for key, height in zip(keys, heights, strict=True):
        part = (mx.random.normal((height, shape[1]), key=key) * shape[1] ** -0.5).astype(mx.bfloat16)
        mx.eval(part)
        parts.append(part)
    return mx.concatenate(parts)


def dequantized(weight: mx.array, bits: int) -> mx.array:
    packed, scales, biases = quantize_array(weight, bits).values()
    return mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), GROUP_SIZE, bits)


def velocity(network: Flux2Transformer) -> np.ndarray:
    """What a network gives for random tokens, in float32."""
    config = network.config
    widths = config.in_channels, config.joint_attention_dim
    img, txt = (mx.random.normal((1, SIDE * SIDE, width), key=mx.random.key(width)) for width in widths)
    rope = rope_table(np.concatenate([text_ids(SIDE * TEXT), image_ids(SIDE, SIDE)]), config)
    guidance = mx.array([4.0]) if config.guidance_embeds else None
    return np.array(network(img, network.txt_in(txt), mx.array([0.7]), rope, guidance))


def demo_table(places: list[str]) -> Iterator[str]:
    """Lines of markdown: bytes of the demo's transformer, and how near its images come to those of 16 bits."""
    yield "| weights | MB | bits a weight | PSNR, dB: mean | worst image |"
    yield "|---|--:|--:|--:|--:|"
    exact = images("demo", "bf16")
    made = [("demo", quant) for quant in QUANTIZATIONS[1:]] + [(place, None) for place in places]
    for model, quant in made:
        errors = np.square(images(model, quant) - exact).mean(axis=(1, 2, 3))
        ratios = -10 * np.log10(errors)
        component = transformer(model, quant)
        nbytes, bits = component.nbytes / 1e6, size(component).rpartition("| ")[2]
        yield f"| {quant or Path(model).name} | {nbytes:.2f} | {bits} | {ratios.mean():.1f} | {ratios.min():.1f} |"


def transformer(model: str, quant: str | None) -> Component:
    if quant is not None:
        return variant_components(VARIANTS[model], quant)["transformer"]
    return Checkpoint.open(Path(model)).components["transformer"]


def images(model: str, quant: str | None) -> np.ndarray:
    """Images `[B, H, W, 3]` in 0..1 of fixed prompts and seeds, whose texts are encoded in 16 bits."""
    pipe = pipeline(model, quant)
    texts = pipeline("demo", "bf16").encode_prompt(PROMPTS)
    made = pipe(prompt_embeds=texts, seed=0, num_images_per_prompt=IMAGES, width=128, height=128, output_type="np")
    return np.asarray(made.images)


def pipeline(model: str, quant: str | None) -> Flux2Pipeline:
    text_quant = None if quant is None else "bf16"
    pipe = Flux2Pipeline.from_pretrained(model, quant=quant, text_quant=text_quant, dtype="float32", prompt_cache=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("random", "demo"))
    parser.add_argument("names", nargs="*", help="models of the table, or checkpoints made of the demo")
    given = parser.parse_args()
    models = given.names or ["klein-4b", "klein-9b", "dev"]
    for line in demo_table(given.names) if given.what == "demo" else random_table(models):
        print(line, flush=True)


if __name__ == "__main__":
    main()
