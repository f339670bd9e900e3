"""The eyes of Mistral Small 3.2: images to embeddings that stand in for `[IMG]` tokens.

Source: transformers' `PixtralVisionModel`, `Mistral3MultiModalProjector` and `PixtralImageProcessorPil`; attribute
names are their weight names.
"""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from ..config import VisionConfig
from ..layers import Conv2d, GatedMLP, Linear, attention, gelu

# Mean and deviation of CLIP's training images, which the tower was trained with.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
_LN_PRE_EPS = 1e-5  # a number of the code in transformers, and of no config


def preprocess(image: Image.Image, config: VisionConfig) -> np.ndarray:
    """Resize and normalise an RGB image: float32 `[H, W, 3]`, sides rounded up to whole cells of patches."""
    ratio = max(image.height / config.image_size, image.width / config.image_size)
    width, height = image.size
    if ratio > 1:
        width, height = math.floor(width / ratio), math.floor(height / ratio)
    cell = config.cell_size
    size = (-(-max(width, 1) // cell) * cell, -(-max(height, 1) // cell) * cell)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    return (pixels / 255 - _MEAN) / _STD


def _rope(height: int, width: int, config: VisionConfig) -> tuple[mx.array, mx.array]:
    """Cosines and sines `[height·width, head_dim / 2]`: even frequencies turn with the row, odd with the column."""
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    rows, columns = np.divmod(np.arange(height * width), width)
    angles = np.concatenate([rows[:, None] * frequencies[::2], columns[:, None] * frequencies[1::2]], axis=1)
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


def _rotate(x: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
    cos, sin = rope
    a, b = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self._heads = config.num_attention_heads
        self.q_proj = Linear(D, D)
        self.k_proj = Linear(D, D)
        self.v_proj = Linear(D, D)
        self.o_proj = Linear(D, D)

    def __call__(self, x: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
        B, L, _ = x.shape
        q, k, v = (
            proj(x).reshape(B, L, self._heads, -1).transpose(0, 2, 1, 3)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(attention(_rotate(q, rope), _rotate(k, rope), v))


class Layer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=_LN_PRE_EPS)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=_LN_PRE_EPS)
        self.feed_forward = GatedMLP(config.hidden_size, config.intermediate_size)

    def __call__(self, x: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.feed_forward(self.ffn_norm(x))


class Layers(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self._config = config
        self.patch_conv = Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = nn.RMSNorm(config.hidden_size, eps=_LN_PRE_EPS)
        self.transformer = Layers(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        """`[1, H, W, 3]` to patch features `[1, H / patch, W / patch, D]`."""
        x = self.patch_conv(pixels)
        _, height, width, D = x.shape
        rope = _rope(height, width, self._config)
        x = self.ln_pre(x.reshape(1, -1, D))
        for layer in self.transformer.layers:
            x = layer(x, rope)
            mx.eval(x)
        return x.reshape(1, height, width, D)


class PatchMerger(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self._merge = config.spatial_merge_size
        self.merging_layer = Linear(D * self._merge**2, D)

    def __call__(self, x: mx.array) -> mx.array:
        """Patches `[1, H, W, D]` to cells `[H·W / merge², D]`; within a cell the channel varies slowest."""
        _, H, W, D = x.shape
        m = self._merge
        cells = x.reshape(H // m, m, W // m, m, D).transpose(0, 2, 4, 1, 3)
        return self.merging_layer(cells.reshape(-1, D * m * m))


class Projector(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.projector_eps)
        self.patch_merger = PatchMerger(config)
        self.linear_1 = Linear(config.hidden_size, config.text_hidden_size)
        self.linear_2 = Linear(config.text_hidden_size, config.text_hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(gelu(self.linear_1(self.patch_merger(self.norm(x)))))


class PixtralVision(nn.Module):
    """Vision tower and projector."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Embeddings `[cells, text_hidden_size]` of one `preprocess`ed image `[H, W, 3]`, row by row."""
        return self.multi_modal_projector(self.vision_tower(pixels[None]))
