"""How much memory denoising needs, and how many tokens fit."""

import math
import os

import mlx.core as mx

from .config import TransformerConfig
from .errors import InputError
from .layers import on_metal, score_bytes

# Bytes for each token and channel while a block is at work, measured: arrays in the activations' dtype, and the
# rotation of queries and keys, which is in float32.
_ARRAYS = 7.5
_ROTATION_BYTES = 66


def activation_bytes(config: TransformerConfig, tokens: int, itemsize: int) -> int:
    """Peak of a denoising pass above the transformer's weights.

    Args:
        config: the geometry.
        tokens: of text, image and references, times the images of the pass.
        itemsize: bytes of an activation.
    """
    arrays = int(tokens * config.hidden_size * (_ARRAYS * itemsize + _ROTATION_BYTES))
    return arrays + score_bytes(config.num_attention_heads, tokens, itemsize)


def max_tokens(config: TransformerConfig, weights: int, itemsize: int, memory: int) -> int:
    """The most tokens whose pass fits into `memory` bytes beside the weights; 0 if none do."""
    low, high = 0, 2**24
    while low < high:
        middle = (low + high + 1) // 2
        fits = weights + activation_bytes(config, middle, itemsize) <= memory
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def device_memory() -> int:
    """Bytes that networks can have: what Metal recommends on an Apple GPU, else the physical memory."""
    if on_metal():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_references(
    config: TransformerConfig, weights: int, itemsize: int, memory: int, tokens: int, references: list[int], size: int
) -> None:
    """Raise InputError if a pass with references does not fit into memory, saying what would.

    Args:
        config: the transformer's geometry.
        weights: its bytes in memory.
        itemsize: bytes of an activation.
        memory: bytes that are there.
        tokens: of the text and the image.
        references: tokens of each reference.
        size: pixels of a token along one side.
    """
    needed = weights + activation_bytes(config, tokens + sum(references), itemsize)
    if needed <= memory:
        return
    room = max_tokens(config, weights, itemsize, memory) - tokens
    side = size * math.isqrt(max(0, room) // len(references))
    count = f"{len(references)} references" if len(references) > 1 else "the reference"
    advice = f"{count} of {side}×{side} pixels would fit" if side >= 64 else "not even small ones would fit"
    raise InputError(
        f"references of {sum(references)} tokens need {needed / 2**30:.1f} GiB, this machine has "
        f"{memory / 2**30:.1f} GiB: {advice}; a smaller image or -q qint4 leaves more room"
    )
