"""Qwen3 as a text encoder: intermediate hidden states, no final norm and no language-model head.

Source: transformers' `Qwen3Model`; attribute names are its weight names.
"""

import mlx.core as mx
import mlx.nn as nn

from ..config import TextConfig
from ..layers import attention, swiglu


class Attention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        D, head_dim = config.hidden_size, config.head_dim
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._rope_theta = config.rope_theta
        self.q_proj = nn.Linear(D, self._heads * head_dim, bias=False)
        self.k_proj = nn.Linear(D, self._kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(D, self._kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(self._heads * head_dim, D, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        B, L, _ = x.shape
        q = self.q_norm(self.q_proj(x).reshape(B, L, self._heads, -1)).transpose(0, 2, 1, 3)
        k = self.k_norm(self.k_proj(x).reshape(B, L, self._kv_heads, -1)).transpose(0, 2, 1, 3)
        v = self.v_proj(x).reshape(B, L, self._kv_heads, -1).transpose(0, 2, 1, 3)
        out = attention(self._rotate(q), self._rotate(k), v, mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, L, -1))

    def _rotate(self, x: mx.array) -> mx.array:
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=self._rope_theta, scale=1.0, offset=0)


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        D, M = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, M, bias=False)
        self.up_proj = nn.Linear(D, M, bias=False)
        self.down_proj = nn.Linear(M, D, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Encoder(nn.Module):
    """The embedding and the layers whose states the transformer reads."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self._out_layers = config.out_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, ids: mx.array, attention_mask: mx.array) -> mx.array:
        """Hidden states of token ids.

        Args:
            ids: `[B, L]`, padded on the right.
            attention_mask: boolean `[B, L]`, False on padding. Padding looks at the real tokens only.

        Returns:
            `[B, L, output_size]`: the states of `out_layers`, side by side.
        """
        mask = mx.tri(ids.shape[1], dtype=mx.bool_) & attention_mask[:, None, None, :]
        x = self.embed_tokens(ids)
        states = []
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, mask)
            mx.eval(x)
            if number in self._out_layers:
                states.append(x)
        return mx.concatenate(states, axis=-1)
