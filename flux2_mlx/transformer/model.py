"""The FLUX.2 diffusion transformer: velocity of image tokens from text states, positions and noise level.

Source: `Flux2` of the FLUX.2 reference code.
"""

import mlx.core as mx
import mlx.nn as nn

from ..config import TransformerConfig
from .blocks import DoubleBlock, LastLayer, MLPEmbedder, Modulation, SingleBlock, timestep_embedding


class Flux2Transformer(nn.Module):
    """MMDiT with modulation shared by all blocks of a kind."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        D = config.hidden_size
        self._channels = config.timestep_guidance_channels
        self.img_in = nn.Linear(config.in_channels, D, bias=False)
        self.txt_in = nn.Linear(config.joint_attention_dim, D, bias=False)
        self.time_in = MLPEmbedder(self._channels, D)
        if config.guidance_embeds:
            self.guidance_in = MLPEmbedder(self._channels, D)
        self.double_stream_modulation_img = Modulation(D, 6)
        self.double_stream_modulation_txt = Modulation(D, 6)
        self.single_stream_modulation = Modulation(D, 3)
        self.double_blocks = [DoubleBlock(config) for _ in range(config.num_layers)]
        self.single_blocks = [SingleBlock(config) for _ in range(config.num_single_layers)]
        self.final_layer = LastLayer(config)

    def __call__(
        self,
        img: mx.array,
        txt: mx.array,
        timestep: mx.array,
        rope: mx.array,
        guidance: mx.array | None = None,
    ) -> mx.array:
        """Velocity (noise − image) of the image tokens.

        Args:
            img: image tokens `[B, Li, in_channels]`, references after the target.
            txt: text states that went through `txt_in`, `[B, Lt, D]`; they are the same at every step.
            timestep: noise level σ in 0..1, `[1]` or `[B]`.
            rope: `rope_table` of the text and then the image positions, `[Lt + Li, head_dim / 2]`.
            guidance: embedded guidance scale, `[1]` or `[B]`; only for models that have `guidance_in`.

        Returns:
            `[B, Li, in_channels]`.
        """
        vec = self._conditioning(timestep, guidance, img.dtype)
        img_mod = self.double_stream_modulation_img(vec)
        txt_mod = self.double_stream_modulation_txt(vec)
        single_mod = self.single_stream_modulation(vec)

        # Evaluating block by block frees each block's activations before the next one's are allocated.
        img = self.img_in(img)
        for block in self.double_blocks:
            img, txt = block(img, txt, img_mod, txt_mod, rope)
            mx.eval(img, txt)
        x = mx.concatenate([txt, img], axis=1)
        for block in self.single_blocks:
            x = block(x, single_mod, rope)
            mx.eval(x)
        return self.final_layer(x[:, txt.shape[1] :], vec)

    def _conditioning(self, timestep: mx.array, guidance: mx.array | None, dtype: mx.Dtype) -> mx.array:
        vec = self.time_in(timestep_embedding(timestep, self._channels).astype(dtype))
        if guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance, self._channels).astype(dtype))
        return vec
