"""The FLUX.2 diffusion transformer: velocity of image tokens from text states, positions and noise level.

Source: `Flux2` of the FLUX.2 reference code.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..config import TransformerConfig
from ..layers import Linear
from .blocks import DoubleBlock, KeysValues, LastLayer, MLPEmbedder, Modulation, SingleBlock, timestep_embedding
from .execution import PLAIN, Execution
from .headroom import in_units


class Shared(NamedTuple):
    """What all blocks of a pass are given: how many tokens of the stream are `text`, which come first, and `image`, the
    ones after these whose velocity is wanted, the embedded noise level `vec` `[1 or B, D]`, what each kind of block
    modulates by, the rotations of all tokens, and how all is computed."""

    text: int
    image: int
    vec: mx.array
    img_mod: list[mx.array]
    txt_mod: list[mx.array]
    single_mod: list[mx.array]
    rope: mx.array
    execution: Execution

    @property
    def wanted(self) -> slice:
        return slice(self.text, self.text + self.image)

    def wanted_of(self, x: mx.array) -> mx.array:
        """Those tokens of a stream whose velocity is wanted, which are all that the last block gives."""
        return x if x.shape[1] == self.image else x[:, self.wanted]


class Flux2Transformer(nn.Module):
    """MMDiT with modulation shared by all blocks of a kind.

    A pass is `begin`, `blocks`, `end`: each block turns the stream of text and then image tokens `[B, Lt + Li, D]` into
    the next one, so that a caller may stop after any of them, or evaluate and differentiate them one by one. The last
    single block gives those tokens only whose velocity is wanted.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        D = config.hidden_size
        self._config = config
        self._channels = config.timestep_guidance_channels
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
        *,
        image: int | None = None,
        execution: Execution = PLAIN,
    ) -> mx.array:
        """Velocity (noise − image) of the image tokens.

        Args:
            img: image tokens `[B, Li, in_channels]`, references after the target.
            txt: text states that went through `txt_in`, `[B, Lt, D]`; they are the same at every step.
            timestep: noise level σ in 0..1, `[1]` or `[B]`.
            rope: `rope_table` of the text and then the image positions, `[Lt + Li, 2, head_dim]`.
            guidance: embedded guidance scale, `[1]` or `[B]`; only for models that have `guidance_in`.
            past: what `read` gives for references, in place of their tokens in `img`.
            image: how many of the image tokens have a velocity that is wanted, the first ones; None: all.
            execution: how it is computed. Gradients need one that is not `fused`.

        Returns:
            `[B, image, in_channels]`.
        """
        x, shared = self.begin(img, txt, timestep, rope, guidance, image=image, execution=execution)
        for block in self.blocks(shared, past):
            x = execution.finish(x, block(x))  # frees activations before the next ones are allocated
        return self.end(x, shared)

    def begin(
        self,
        img: mx.array,
        txt: mx.array,
        timestep: mx.array,
        rope: mx.array,
        guidance: mx.array | None = None,
        *,
        image: int | None = None,
        execution: Execution = PLAIN,
    ) -> tuple[mx.array, Shared]:
        """The stream before the first block, and what all blocks are given; arguments as for a call."""
        x = mx.concatenate([in_units(txt), in_units(self.img_in(img))], axis=1)
        wanted = img.shape[1] if image is None else image
        return x, self._shared((txt.shape[1], wanted), timestep, guidance, rope, img.dtype, execution)

    def blocks(self, shared: Shared, past: list[KeysValues] | None = None) -> Iterator[Callable[[mx.array], mx.array]]:
        """Each block as a function from the stream before it to the one after it. Where blocks are streamed, what one
        gives must be evaluated before the next one is asked for."""
        count = len(self.double_blocks)
        seen: Sequence[KeysValues | None] = past or [None] * (count + len(self.single_blocks))
        for double, own in zip(self.double_blocks, seen[:count], strict=True):
            yield partial(_run_double, double, shared, own)
        last = len(self.single_blocks) - 1
        for number, (single, own) in enumerate(zip(self.single_blocks, seen[count:], strict=True)):
            yield partial(_run_single, single, shared, own, shared.wanted if number == last else None)

    def end(self, x: mx.array, shared: Shared) -> mx.array:
        """Velocity `[B, image, in_channels]` of the tokens that the last block gives, or of such ones of a stream."""
        return self.final_layer(shared.wanted_of(x), shared.vec)

    def read(
        self, img: mx.array, rope: mx.array, guidance: mx.array | None = None, execution: Execution = PLAIN
    ) -> list[KeysValues]:
        """Keys and values of reference tokens at every block, for models trained to see references this way.

        References see only one another, at noise level 0, so they depend on neither text, target nor step: one pass
        serves a whole run. (The reference code makes it part of the first step.)

        Args:
            img: reference tokens `[1, Lr, in_channels]`.
            rope: `rope_table` of their positions.
            guidance: as for a step.
            execution: as for a step.

        Returns:
            Rotated keys and values, each `[1, heads, Lr, head_dim]`: `4 · Lr · D` bytes a block in 16 bits.
        """
        shared = self._shared((0, img.shape[1]), mx.array([0.0]), guidance, rope, img.dtype, execution)
        mods = [shared.img_mod] * len(self.double_blocks) + [shared.single_mod] * len(self.single_blocks)
        x = in_units(self.img_in(img))
        past = []
        for block, mod in zip(chain(self.double_blocks, self.single_blocks), mods, strict=True):
            given, seen = block.read(x, mod, rope, execution)
            x = execution.finish(x, given, seen)
            past.append(seen)
        return past

    def _shared(
        self,
        lengths: tuple[int, int],
        timestep: mx.array,
        guidance: mx.array | None,
        rope: mx.array,
        dtype: mx.Dtype,
        execution: Execution,
    ) -> Shared:
        vec = self.time_in(timestep_embedding(timestep, self._channels).astype(dtype))
        if guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance, self._channels).astype(dtype))
        return Shared(
            *lengths,
            vec,
            self.double_stream_modulation_img(vec),
            self.double_stream_modulation_txt(vec),
            self.single_stream_modulation(vec),
            rope,
            execution,
        )


def _run_double(block: DoubleBlock, shared: Shared, past: KeysValues | None, x: mx.array) -> mx.array:
    """The joined stream after a double block."""
    img, txt = x[:, shared.text :], x[:, : shared.text]
    img, txt = block(img, txt, shared.img_mod, shared.txt_mod, shared.rope, past, shared.execution)
    return mx.concatenate([txt, img], axis=1)


def _run_single(
    block: SingleBlock, shared: Shared, past: KeysValues | None, wanted: slice | None, x: mx.array
) -> mx.array:
    """The joined stream after a single block, or what is wanted of it."""
    return block(x, shared.single_mod, shared.rope, past, shared.execution, wanted)
