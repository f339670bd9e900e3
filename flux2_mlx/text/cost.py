"""What the language models that read and write prompts, and their eyes, take beside their weights."""

from dataclasses import dataclass

import mlx.core as mx

from ..config import TextConfig, VisionConfig
from ..device import on_gpu, rows_to_unpack
from ..layers import attention_operations, score_bytes

# What a language model's layer holds at its peak, fitted to peaks: python scripts/bench_memory.py measure klein-4b bf16
# --work FOLDER
_STREAMS = 6  # arrays as wide as the stream, while it attends
_QUERIES = 4.9  # as wide as the queries
_KEYS = 2  # as wide as the keys
_FLOAT32_BYTES = 18  # of a query in float32, for norms and rotation
_MASKS = 3  # who sees whom, as it is made of the triangle and the padding, a byte each
_MLP_STREAMS = 4  # arrays as wide as the stream, while its MLP computes
_MLP_ARRAYS = 3  # as wide as the MLP: the gate, its product, and what that is multiplied by
# Fitted to peaks: python -m pytest -s tests/test_upsampling_memory.py -k near_what_writing_takes
_VISION_BYTES = 92  # of the vision tower, for a patch and channel while it attends
_VISION_MLP_STREAMS = 3  # arrays as wide as its stream, while its MLP computes
_LOGITS_ARRAYS = 6  # of logits in float32, as mlx-lm normalises them and a token is sampled
# mlx-lm's own numbers of tokens.
_CACHE_STEP = 256  # what `KVCache` grows by (its `step`)
_TOKENS_READ_TOGETHER = 2048  # what `generate_step` reads of a prompt at one time (its `prefill_step_size`)


@dataclass(frozen=True)
class TextCost:
    """Costs of a language model of such a geometry, computing in `dtype`; its weights may be `packed`."""

    config: TextConfig
    dtype: mx.Dtype
    packed: bool = False

    def encoding(self, tokens: int, widened: int = 0) -> int:
        """Peak of encoding so many tokens, padding included, above the weights, of which `widened` bytes are widened at
        one time."""
        return self._passing(tokens, widened) + self._unpacked(tokens)

    def _unpacked(self, tokens: int) -> int:
        """Bytes of all weights of a layer, if they are unpacked."""
        if not (self.packed and on_gpu() and tokens >= rows_to_unpack()):
            return 0
        config = self.config
        heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
        return self.dtype.size * config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)

    def _passing(self, tokens: int, widened: int) -> int:
        """The same without what is unpacked."""
        config = self.config
        itemsize = self.dtype.size
        D, heads = config.hidden_size, config.num_attention_heads
        queries, keys = heads * config.head_dim, config.num_key_value_heads * config.head_dim
        arrays = itemsize * (_STREAMS * D + _QUERIES * queries + _KEYS * keys)
        masks = _MASKS * tokens**2
        scores = score_bytes(heads, tokens, config.head_dim, itemsize)
        attending = tokens * (arrays + _FLOAT32_BYTES * queries) + scores + masks
        mlp = tokens * itemsize * (_MLP_STREAMS * D + _MLP_ARRAYS * config.intermediate_size)
        return int(max(attending, mlp + widened))

    def reading(self, tokens: int, widened: int) -> int:
        """Peak of reading a prompt before text is written, above the weights; arguments as for `encoding`."""
        return self._passing(min(tokens, _TOKENS_READ_TOGETHER), widened)

    def cache(self, tokens: int) -> int:
        """Bytes of a key and a value of so many tokens in every layer, the later ones included."""
        config = self.config
        room = _CACHE_STEP * -(-tokens // _CACHE_STEP)
        pair = 2 * config.num_key_value_heads * config.head_dim * self.dtype.size
        return room * pair * (config.num_hidden_layers + config.num_later_layers)

    def embeddings(self, tokens: int) -> int:
        """Bytes of the embeddings of so many tokens, as they are made and as they are kept."""
        return 2 * tokens * self.config.hidden_size * self.dtype.size

    def logits(self) -> int:
        """Bytes of the logits of one token, and of what becomes of them."""
        return _LOGITS_ARRAYS * self.config.vocab_size * mx.float32.size

    def operations(self, tokens: int) -> int:
        """Operations of all products and attention of encoding so many tokens."""
        config = self.config
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
        return config.num_hidden_layers * (2 * tokens * layer + 4 * tokens**2 * queries)

    def longest(self, tokens: int) -> int:
        """Operations of the longest product or attention of encoding so many tokens."""
        return self._longest(tokens, tokens)

    def longest_read(self, tokens: int) -> int:
        """Operations of the longest product or attention of reading a prompt before text is written."""
        return self._longest(min(tokens, _TOKENS_READ_TOGETHER), tokens)

    def _longest(self, tokens: int, keys: int) -> int:
        config = self.config
        heads = config.num_attention_heads
        return max(
            2 * tokens * config.hidden_size * max(config.intermediate_size, heads * config.head_dim),
            attention_operations(heads, tokens, keys, config.head_dim, self.dtype.size),
        )


@dataclass(frozen=True)
class VisionCost:
    """Costs of a vision tower of such a geometry, computing in `dtype`; its weights may be `packed`."""

    config: VisionConfig
    dtype: mx.Dtype
    packed: bool = False

    def seeing(self, pixels: int, widened: int) -> int:
        """Peak of looking at an image of so many pixels, above the weights."""
        config = self.config
        patches = pixels // config.patch_size**2
        itemsize = self.dtype.size
        D, heads = config.hidden_size, config.num_attention_heads
        attending = patches * D * _VISION_BYTES + score_bytes(heads, patches, config.head_dim, itemsize)
        mlp = patches * itemsize * (_VISION_MLP_STREAMS * D + _MLP_ARRAYS * config.intermediate_size)
        return max(attending, mlp + widened)

    def longest(self, pixels: int) -> int:
        """Operations of the longest product or attention of looking at an image of so many pixels."""
        config = self.config
        patches = pixels // config.patch_size**2
        widest = max(config.intermediate_size, config.hidden_size, config.text_hidden_size)
        return max(
            2 * patches * config.hidden_size * widest,
            attention_operations(config.num_attention_heads, patches, patches, config.head_dim, self.dtype.size),
        )

    def features(self, pixels: int) -> int:
        """Bytes of what the language model is given of images of so many pixels."""
        return pixels // self.config.cell_size**2 * self.config.text_hidden_size * self.dtype.size
