"""The FLUX.2 diffusion transformer: velocity of image tokens from text states, positions and noise level.

Source: `Flux2` of the FLUX.2 reference code.
"""

from itertools import chain

import mlx.core as mx
import mlx.nn as nn

from ..config import TransformerConfig
from ..layers import Linear
from .blocks import DoubleBlock, KeysValues, LastLayer, MLPEmbedder, Modulation, SingleBlock, timestep_embedding
from .headroom import in_units


class Flux2Transformer(nn.Module):
    """MMDiT with modulation shared by all blocks of a kind."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        D = config.hidden_size
        self._config, self._channels = config, config.timestep_guidance_channels
        self.img_in = Linear(config.in_channels, D)
        self.txt_in = Linear(config.joint_attention_dim, D)
        self.time_in = MLPEmbedder(self._channels, D)
        if config.guidance_embeds:
            self.guidance_in = MLPEmbedder(self._channels, D)
        self.double_stream_modulation_img = Modulation(D, 6)
        self.double_stream_modulation_txt = Modulation(D, 6)
        self.single_stream_modulation = Modulation(D, 3)
        self.double_blocks = [DoubleBlock(config) for _ in range(config.num_layers)]
        self.single_blocks = [SingleBlock(config) for _ in range(config.num_single_layers)]
        self.final_layer = LastLayer(config)

    @property
    def config(self) -> TransformerConfig:
        return self._config

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        timestep: mx.array,
        rope: mx.array,
        guidance: mx.array | None = None,
        past: list[KeysValues] | None = None,
    ) -> mx.array:
        """Velocity (noise − image) of the image tokens.

        Args:
            img: image tokens `[B, Li, in_channels]`, references after the target.
            txt: text states that went through `txt_in`, `[B, Lt, D]`; they are the same at every step.
            timestep: noise level σ in 0..1, `[1]` or `[B]`.
            rope: `rope_table` of the text and then the image positions, `[Lt + Li, 2, head_dim]`.
            guidance: embedded guidance scale, `[1]` or `[B]`; only for models that have `guidance_in`.
            past: what `read` gives for references, in place of their tokens in `img`.

        Returns:
            `[B, Li, in_channels]`.
        """
        vec = self._conditioning(timestep, guidance, img.dtype)
        img_mod = self.double_stream_modulation_img(vec)
        txt_mod = self.double_stream_modulation_txt(vec)
        single_mod = self.single_stream_modulation(vec)

        # Evaluating block by block frees each block's activations before the next one's are allocated.
        seen = iter(past or [None] * (len(self.double_blocks) + len(self.single_blocks)))
        img, txt = in_units(self.img_in(img)), in_units(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, img_mod, txt_mod, rope, next(seen))
            mx.eval(img, txt)
        first, x = txt.shape[1], mx.concatenate([txt, img], axis=1)
        del txt, img
        for block in self.single_blocks:
            x = block(x, single_mod, rope, next(seen))
            mx.eval(x)
        return self.final_layer(x[:, first:], vec)

    def read(self, img: mx.array, rope: mx.array, guidance: mx.array | None = None) -> list[KeysValues]:
        """Keys and values of reference tokens at every block, for models trained to see references this way.

        References see only one another, at noise level 0, so they depend on neither text, target nor step: one pass
        serves a whole run. (The reference code makes it part of the first step.)

        Args:
            img: reference tokens `[1, Lr, in_channels]`.
            rope: `rope_table` of their positions.
            guidance: as for a step.

        Returns:
            Rotated keys and values, each `[1, heads, Lr, head_dim]`: `4 · Lr · D` bytes a block in 16 bits.
        """
        vec = self._conditioning(mx.array([0.0]), guidance, img.dtype)
        img_mod, single_mod = self.double_stream_modulation_img(vec), self.single_stream_modulation(vec)
        mods = [img_mod] * len(self.double_blocks) + [single_mod] * len(self.single_blocks)
        past = []
        x = in_units(self.img_in(img))
        for block, mod in zip(chain(self.double_blocks, self.single_blocks), mods, strict=True):
            x, seen = block.read(x, mod, rope)
            past.append(seen)
            mx.eval(x, seen)
        return past

    def _conditioning(self, timestep: mx.array, guidance: mx.array | None, dtype: mx.Dtype) -> mx.array:
        vec = self.time_in(timestep_embedding(timestep, self._channels).astype(dtype))
        if guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance, self._channels).astype(dtype))
        return vec
