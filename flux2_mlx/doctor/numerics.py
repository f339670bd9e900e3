"""Whether what the device computes is right: by numpy in float64 where a part of a result tells, else by the CPU."""

import math
from collections.abc import Callable, Sequence
from importlib.resources import files

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from PIL import Image

from .. import layers
from ..config import VARIANTS, TransformerConfig
from ..device import direct_convolutions, on_gpu
from ..pipeline import Flux2Pipeline
from ..quantization import GROUP_SIZE, quantize_array
from ..transformer import image_ids, rope_table, text_ids
from ..transformer.blocks import DoubleBlock, SingleBlock
from ..transformer.execution import executions
from ..transformer.headroom import in_units, unit
from .finding import Finding, judged, skipped

# The error of a network's block that is rounding, relative to its output.
BOUNDS = {mx.float32: 1e-5, mx.float16: 3e-3, mx.bfloat16: 1e-2}
_WRONG = "results of this device are not right; please report this output"
# The picture of the README, as a CPU makes it in float32.
DEMO_PROMPT = "a yellow star left of a red ring on a blue background"
DEMO_SEED = 7
DEMO_PICTURE = "star.png"
_TEXT = 512  # tokens of a block's text
_SIDE = 32  # tokens on a side of a block's image
_PRODUCT = (1024, 12288, 4096)  # rows, inner size and columns
_PACKED = (1024, 4096)  # the shape of a weight before it is packed
_CHANNELS = 256  # of a convolution
BLOCKS = VARIANTS["klein-9b"].transformer
LONGEST = 60  # seconds that a CPU may take for a check
_COLUMNS = 512  # of a product, that are computed in float64 at a time
# What one value may be off by at most, against the bound of the root mean square of all: the worst of some million
# errors of rounding was seen to be up to 16 times that. A value that is not computed is off by 100 times and more.
_WORST = 16

Pass = Callable[[], mx.array]
Errors = tuple[float, float]


def check_demo(pipe: Flux2Pipeline) -> Finding:
    """The built-in model's image against the shipped one, by its peak signal-to-noise ratio."""
    made = np.asarray(pipe(DEMO_PROMPT, seed=DEMO_SEED).images[0], np.float64)
    shipped = np.asarray(Image.open(str(files("flux2_mlx.demo") / DEMO_PICTURE)).convert("RGB"), np.float64)
    error = np.mean((made - shipped) ** 2)
    decibels = 10 * np.log10(255**2 / error) if error else np.inf
    least = 50 if pipe.dtype == mx.float32 else 35
    return judged("demo image", f"{decibels:.1f} dB", f"> {least} dB", decibels > least, _WRONG)


def product_operations() -> int:
    """Operations of `check_product`."""
    return 2 * math.prod(_PRODUCT)


def check_product(dtype: mx.Dtype) -> Finding:
    """A product of the size of a transformer's, all of it."""
    rows, inner, columns = _PRODUCT
    x, w = _normal((rows, inner), dtype), _normal((inner, columns), dtype, 1)
    found = _multiply(x, w)
    exact = _float64(x)
    parts = [exact @ _float64(w[:, start : start + _COLUMNS]) for start in range(0, columns, _COLUMNS)]
    return _compared("product", [_errors(found, np.concatenate(parts, axis=1))], BOUNDS[dtype])


def check_float32() -> Finding:
    """Whether products in float32 are that precise: matrix units may cut them to 10 bits, which is called TF32."""
    x, w = _normal((64, 4096), mx.float32), _normal((4096, 64), mx.float32, 1)
    error, _ = _errors(_multiply(x, w), _float64(x) @ _float64(w))
    advice = "products in float32 are cut to TF32; MLX_ENABLE_TF32=0 in the environment prevents that"
    return judged("float32", f"error {error:.1e}", "< 1e-05", error < 1e-5, advice, "warn" if error < 2e-3 else "fail")


def check_quantized(bits: int, dtype: mx.Dtype) -> Finding:
    """A product with packed weights against the product with the numbers that they stand for."""
    x = _normal((64, _PACKED[1]), dtype)
    packed = quantize_array(_normal(_PACKED, mx.bfloat16, 1), bits)
    parts = {name: x.astype(dtype) if name != "weight" else x for name, x in packed.items()}
    weight, scales, biases = parts["weight"], parts["scales"], parts["biases"]
    y = mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=GROUP_SIZE, bits=bits)
    unpacked = np.unpackbits(np.array(weight).view(np.uint8), axis=-1, bitorder="little")
    codes = unpacked.reshape(*unpacked.shape[:-1], -1, bits) @ (1 << np.arange(bits))
    grouped = codes.reshape(*scales.shape, GROUP_SIZE) * _float64(scales)[..., None] + _float64(biases)[..., None]
    errors = _errors(y, _float64(x) @ grouped.reshape(len(weight), -1).T)
    return _compared(f"product with {bits} bit weights", [errors], BOUNDS[dtype])


def check_convolution(dtype: mx.Dtype) -> Finding:
    """A convolution of the autoencoder."""
    x, w = _normal((1, 64, 64, _CHANNELS), dtype), _normal((_CHANNELS, 3, 3, _CHANNELS), dtype, 1)
    with direct_convolutions():
        y = mx.conv2d(x, w, padding=1)
        mx.eval(y)
    padded = np.pad(_float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernels = _float64(w)
    shifts = [(i, j) for i in range(3) for j in range(3)]
    errors = _errors(y, sum(padded[:, i : i + 64, j : j + 64] @ kernels[:, i, j].T for i, j in shifts))
    most = 4e-3 if dtype != mx.float32 else 1e-5
    advice = f"MLX computes it by Winograd's method in 16 bits; {_WRONG}" if 1e-2 < errors[0] < 6e-2 else _WRONG
    return _compared("convolution", [errors], most, advice)


def check_attention(head_dim: int, dtype: mx.Dtype) -> Finding:
    """Attention of four times as many heads as there are keys, under a mask."""
    q, k, v = (_normal((1, heads, 256, head_dim), dtype, seed) for seed, heads in enumerate((8, 2, 2)))
    mask = np.random.RandomState(0).rand(1, 1, 256, 256) < 0.7
    y = layers.attention(q, k, v, mx.array(mask))
    keys, values = (np.repeat(_float64(x), 4, axis=1) for x in (k, v))
    scores = np.where(mask, _float64(q) @ keys.swapaxes(2, 3) / np.sqrt(head_dim), -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = (scores / scores.sum(axis=-1, keepdims=True)) @ values
    errors = _errors(y, expected.transpose(0, 2, 1, 3).reshape(1, 256, -1))
    return _compared(f"attention, {head_dim} wide", [errors], BOUNDS[dtype])


def check_blocks(dtype: mx.Dtype, rate: float) -> Finding:
    """The blocks of klein-9b, at random weights, against the CPU in float32, which does `rate` operations a second."""
    name = "blocks of klein-9b"
    config = BLOCKS
    if not on_gpu():
        return skipped(name, "needs a GPU, which the CPU is compared with")
    # Either kind of block multiplies each token with 13 squares of the width.
    seconds = 2 * 2 * 13 * config.hidden_size**2 * (_SIDE**2 + _TEXT) / rate
    if seconds > LONGEST:
        return skipped(name, f"the CPU, which the GPU is compared with, would take {seconds:.0f} s")
    kinds = ((DoubleBlock(config), double_pass), (SingleBlock(config), single_pass))
    return _compared(name, [_block_errors(block, made, config, dtype) for block, made in kinds], BOUNDS[dtype])


def double_pass(block: nn.Module, config: TransformerConfig, dtype: mx.Dtype) -> Pass:
    """What a double block makes of random tokens, in float32 and not in units."""
    img, txt = _stream(_SIDE**2, config, dtype), _stream(_TEXT, config, dtype)
    mods = [[_modulation(config, dtype, seed) for seed in range(6)] for _ in range(2)]
    rope = _rope(config, _SIDE)
    execution = next(executions(config))
    return lambda: (
        mx.concatenate(block(img, txt, *mods, rope, None, execution), axis=1).astype(mx.float32) * unit(dtype)
    )


def single_pass(block: nn.Module, config: TransformerConfig, dtype: mx.Dtype, side: int = _SIDE) -> Pass:
    """What a single block makes of random tokens, `side`² of them an image's, in float32 and not in units."""
    x = _stream(side**2 + _TEXT, config, dtype)
    rope = _rope(config, side)
    mods = [_modulation(config, dtype, seed) for seed in range(3)]
    execution = next(executions(config))
    return lambda: block(x, mods, rope, None, execution).astype(mx.float32) * unit(dtype)


def random_weights(module: nn.Module) -> nn.Module:
    """`module` with weights of about the size that training gives, in bfloat16."""

    def drawn(weight: mx.array) -> mx.array:
        if weight.ndim == 1:
            return mx.ones(weight.shape, mx.bfloat16)
        # Not drawn by the CPU, one core of which would take a minute for blocks of klein-9b.
        x = mx.random.normal(weight.shape, key=mx.random.key(0)) * weight.shape[-1] ** -0.5
        x = x.astype(mx.bfloat16)
        mx.eval(x)  # or all would be in memory in float32
        return x

    module.update(tree_map(drawn, module.parameters()))
    mx.eval(module.parameters())
    return module


def _block_errors(block: nn.Module, made: Callable[..., Pass], config: TransformerConfig, dtype: mx.Dtype) -> Errors:
    random_weights(block)
    with mx.stream(mx.cpu):
        expected = _float64(made(block, config, mx.float32)())
    cast(block, dtype)
    return _errors(made(block, config, dtype)(), expected)


def cast(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """`module` with its weights in `dtype`."""
    module.update(tree_map(lambda weight: weight.astype(dtype), module.parameters()))
    mx.eval(module.parameters())
    return module


def _stream(tokens: int, config: TransformerConfig, dtype: mx.Dtype) -> mx.array:
    return in_units(_normal((1, tokens, config.hidden_size), mx.bfloat16, tokens).astype(dtype))


def _modulation(config: TransformerConfig, dtype: mx.Dtype, seed: int) -> mx.array:
    return (0.3 * _normal((1, 1, config.hidden_size), mx.bfloat16, 100 + seed)).astype(dtype)


def _rope(config: TransformerConfig, side: int) -> mx.array:
    return rope_table(np.concatenate([text_ids(_TEXT), image_ids(side, side)]), config)


def _normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int = 0) -> mx.array:
    """Normal numbers, drawn by the CPU, so that all devices have the same. The caller's generator stays as it is."""
    x = mx.random.normal(shape, key=mx.random.key(seed), stream=mx.cpu).astype(dtype, stream=mx.cpu)
    mx.eval(x)
    return x


def _multiply(x: mx.array, w: mx.array) -> mx.array:
    return x @ w


def _float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _errors(found: mx.array, expected: np.ndarray) -> Errors:
    """The root mean square of the difference, and the largest one, both relative to the root mean square of what is
    expected; infinite where numbers are not finite."""
    with np.errstate(all="ignore"):
        difference = _float64(found) - expected
        scale = np.sqrt(np.mean(expected**2))
        errors = np.sqrt(np.mean(difference**2)) / scale, np.abs(difference).max() / scale
    return errors if np.isfinite(errors).all() else (np.inf, np.inf)


def _compared(name: str, results: Sequence[Errors], most: float, advice: str = _WRONG) -> Finding:
    """The finding of the worst errors of `results`, whose root mean square may be `most`."""
    error, worst = np.max(results, axis=0)
    figure, bound = f"error {error:.1e}, of one value {worst:.1e}", f"< {most:.0e}, {_WORST * most:.0e}"
    return judged(name, figure, bound, bool(error < most and worst < _WORST * most), advice)
