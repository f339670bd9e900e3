"""The decoder-only language models that read prompts: Qwen3 and Mistral Small 3.2.

`TextEncoder` runs the layers whose hidden states the transformer needs; `LanguageModel` adds the later ones to
generate text. Source: transformers' `Qwen3Model` and `MistralModel`; attribute names are their weight names.
"""

from itertools import chain, repeat
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import TextConfig
from ..layers import Embedding, GatedMLP, Linear, attention, unpacked


class Attention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        D, head_dim = config.hidden_size, config.head_dim
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._rope_theta = config.rope_theta
        self.q_proj = Linear(D, self._heads * head_dim)
        self.k_proj = Linear(D, self._kv_heads * head_dim)
        self.v_proj = Linear(D, self._kv_heads * head_dim)
        self.o_proj = Linear(self._heads * head_dim, D)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array | None, cache: Any = None) -> mx.array:
        B, L, _ = x.shape
        q, k = self.q_proj(x).reshape(B, L, self._heads, -1), self.k_proj(x).reshape(B, L, self._kv_heads, -1)
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        v = self.v_proj(x).reshape(B, L, self._kv_heads, -1).transpose(0, 2, 1, 3)
        offset = 0 if cache is None else cache.offset
        q, k = (self._rotate(y.transpose(0, 2, 1, 3), offset) for y in (q, k))
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        return self.o_proj(attention(q, k, v, mask))

    def _rotate(self, x: mx.array, offset: int) -> mx.array:
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=self._rope_theta, scale=1.0, offset=offset)


class Layer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def __call__(self, x: mx.array, mask: mx.array | None, cache: Any = None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextEncoder(nn.Module):
    """The embedding and the layers whose states the transformer reads; no head, and a final norm only where no layer
    follows."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self._out_layers = config.out_layers
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]
        if config.final_norm:
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, ids: mx.array, attention_mask: mx.array) -> mx.array:
        """Hidden states of token ids.

        Args:
            ids: `[B, L]`, padded.
            attention_mask: boolean `[B, L]`, False on padding. Padding on the right looks at the real tokens;
                padding on the left sees nothing, and its attention adds nothing.

        Returns:
            `[B, L, output_size]`: the states of `out_layers`, side by side.
        """
        mask = mx.tri(ids.shape[1], dtype=mx.bool_) & attention_mask[:, None, None, :]
        x = self.embed_tokens(ids)
        states = []
        for number, layer in enumerate(self.layers, 1):
            x = unpacked(layer, x)(x, mask)
            mx.eval(x)
            if number in self._out_layers:
                states.append(x)
        if "norm" in self:
            states[-1] = self.norm(states[-1])
        return mx.concatenate(states, axis=-1)


class LaterLayers(nn.Module):
    """What generating text needs beyond the encoder: the remaining layers, the final norm and the head."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.layers = [Layer(config) for _ in range(config.num_later_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)


class LanguageModel(nn.Module):
    """The whole language model, in the form that mlx-lm generates with.

    Args:
        encoder: the embedding and the first layers.
        later: the others, the final norm and the head.
        by_layer: evaluate layer by layer, as layers that are streamed from disk must be: the weights of one make room
            for those of the next.
    """

    def __init__(self, encoder: TextEncoder, later: LaterLayers, by_layer: bool = False):
        super().__init__()
        self.embed_tokens = encoder.embed_tokens
        self._layers = encoder.layers, later.layers
        self._by_layer = by_layer
        self.norm = later.norm
        self._head = later.lm_head if "lm_head" in later else encoder.embed_tokens.as_linear

    def make_cache(self) -> list[Any]:
        """An empty cache of keys and values for each layer."""
        from mlx_lm.models.cache import KVCache

        return [KVCache() for layers in self._layers for _ in range(len(layers))]

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        """Logits `[B, L, vocab]` of token ids `[B, L]`, or of their embeddings `[B, L, D]` where given."""
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        L = x.shape[1]
        offset = cache[0].offset if cache else 0
        mask = mx.tri(L, offset + L, offset, dtype=mx.bool_)[None, None] if L > 1 else None
        for layer, layer_cache in zip(chain(*self._layers), cache or repeat(None), strict=cache is not None):
            x = layer(x, mask, layer_cache)
            if self._by_layer:
                mx.eval(x)
        return self._head(self.norm(x))
