"""What the transformer takes beside its weights: bytes of its activations, and its longest operation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx

from ..config import TransformerConfig
from ..device import on_cuda, rows_to_unpack
from ..layers import attention_operations, score_bytes
from .execution import PLAIN, Execution, executions, widest

# Arrays as wide as the stream. Kept of each token that is projected until all can attend: queries, keys, values, and
# the gated MLP of a single block, three times as wide. While all attend, these and the stream before and after it.
_KEPT_ARRAYS, _ATTENDING_ARRAYS = 6, 8
# While a projection widens its weights: what the widest one gives, 3 and twice 3, what it reads, and the stream.
_WIDENING_ARRAYS = 11
# Bytes for each channel of the tokens that a block projects at one time, in arrays of the activations' dtype and in
# float32 for norms and rotation. Fitted to peaks: python -m pytest -s tests/test_memory.py -k near_the_peak
_PROJECTED_ARRAYS = 3
_FLOAT32_BYTES = 75
# Arrays as wide as the stream that a block makes, all of which are there where nothing is waited for within it. A
# single block's: the stream with its norm and modulation 2, the projection 9, heads 3, the gated MLP 3, attention 3,
# both side by side 4, and 2 of the sum; parts are joined once more, 7, and adapters add to every projection, 10. A
# double block's are fewer.
_BLOCK_ARRAYS = 43
# What CUDA's library takes for each of at most ten products of a block besides (MLX gives it 32 MiB on these cards).
_CUDA_WORK_BYTES = 10 * 2**25


def pass_operations(config: TransformerConfig, tokens: int, seen: int = 0) -> tuple[int, int]:
    """Operations of the products of a pass with so many tokens, and of its attention, where each of them attends to
    `seen` further ones besides.

    Either kind of block multiplies each token with 4·D² for attention and 3·D·M for the MLP. What the last block leaves
    out of tokens whose velocity is not wanted, at most a hundredth, is counted.
    """
    D, M = config.hidden_size, config.mlp_hidden_size
    blocks = config.num_layers + config.num_single_layers
    return 2 * tokens * blocks * (4 * D * D + 3 * D * M), 4 * tokens * (tokens + seen) * D * blocks


def pass_products(config: TransformerConfig, text: int, image: int) -> dict[tuple[int, int, int], int]:
    """The products of a pass with so many tokens of text and of an image: rows, columns and what is summed over, each
    with how often there is such a one. Of the text the last block needs keys and values only."""
    D, M = config.hidden_size, config.mlp_hidden_size
    double = ((3 * D, D), (D, D), (2 * M, D), (D, M))
    single = ((3 * D + 2 * M, D), (D, D + M))
    shapes = [(tokens, *shape, config.num_layers) for tokens in (text, image) for shape in double]
    shapes += [(text + image, *shape, config.num_single_layers - 1) for shape in single]
    shapes += [*((image, *shape, 1) for shape in single), (text, 2 * D, D, 1)]
    counts: dict[tuple[int, int, int], int] = {}
    for *shape, count in shapes:
        rows, columns, inner = shape
        counts[rows, columns, inner] = counts.get((rows, columns, inner), 0) + count
    return counts


@dataclass(frozen=True)
class TransformerCost:
    """Costs of a transformer of such a geometry, computing in `dtype` in one of its ways; weights may be `packed`."""

    config: TransformerConfig
    dtype: mx.Dtype
    packed: bool = False
    execution: Execution = PLAIN

    @property
    def ways(self) -> "Iterator[TransformerCost]":
        """These costs in each way of computing that there is on this device, the fastest first."""
        return (replace(self, execution=execution) for execution in executions(self.config, self.packed))

    def states(self, tokens: int) -> int:
        """Bytes of the states of so many text tokens before they are projected."""
        return tokens * self.config.joint_attention_dim * self.dtype.size

    def projected(self, tokens: int) -> int:
        """Bytes of text states of so many tokens once they are as wide as the stream."""
        return tokens * self.config.hidden_size * self.dtype.size

    def rotations(self, positions: int) -> int:
        """Bytes of the table of rotations of so many positions: a cosine and a sine for each channel of a head."""
        return positions * 2 * self.config.attention_head_dim * mx.float32.size

    def keys_values(self, tokens: int) -> int:
        """Bytes of what one block keeps of so many tokens: a key and a value."""
        return 2 * tokens * self.config.hidden_size * self.dtype.size

    def denoising(
        self, text: int, image: int, references: int, images: int, widened: int, *, kv_cache: bool, caches: int = 0
    ) -> tuple[int, int]:
        """Bytes that stay from the first pass of a run to its last, and the peak of a pass above them and the weights.

        Args:
            text: tokens of a prompt.
            image: tokens of an image.
            references: tokens of all references.
            images: how many go through one pass.
            widened: bytes of the weights that are widened at one time.
            kv_cache: whether references are read once and then seen through their keys and values.
            caches: how many step caches there are for each image.
        """
        texts = self.projected(images * text) if images > 1 else 0  # side by side
        added = caches * images * image * 2 * self._array  # what the first block has added, and what the others have
        if not (kv_cache and references):
            return added, texts + self.passing(images * (text + image + references), images, widened)
        past = self.keys_values(references) * (self.config.num_layers + self.config.num_single_layers)
        tokens = images * (text + image)
        # One block at a time has the keys and values of both side by side.
        joined = self.keys_values(tokens + 2 * images * references)
        reading = self.passing(references, 1, widened)
        return added + past, max(reading, texts + self.passing(tokens, images, widened) + joined)

    def passing(self, tokens: int, images: int = 1, widened: int = 0) -> int:
        """Peak of a pass above the weights, where `tokens` are those of text and pictures of all `images`."""
        passing = self._running_ahead if self.execution.runs_ahead else self._by_parts
        return passing(tokens, images, widened)

    def _running_ahead(self, tokens: int, images: int, widened: int) -> int:
        """The peak where nothing is waited for within a block: all that the blocks which run at a time make."""
        work = _CUDA_WORK_BYTES if on_cuda() else 0
        blocks = self.execution.blocks * (tokens * _BLOCK_ARRAYS * self._array + work + self._unpacked(tokens)[1])
        return blocks + sum(self._attending(tokens, images)) + widened

    def _by_parts(self, tokens: int, images: int, widened: int) -> int:
        """The peak where tokens are projected in parts, and then all attend."""
        config = self.config
        itemsize = self.dtype.size
        array = self._array
        part = min(tokens, self.execution.part)
        scores, chunk = self._attending(tokens, images)
        attending = tokens * (_ATTENDING_ARRAYS * array + config.in_channels * mx.float32.size) + scores + chunk
        projected = part * config.hidden_size * (_PROJECTED_ARRAYS * itemsize + _FLOAT32_BYTES)
        if tokens == part and scores == images * config.num_attention_heads * (tokens // images) ** 2 * itemsize:
            projected += scores  # all is evaluated at once, attention included, unless that is in chunks
        projected = max(projected, part * _WIDENING_ARRAYS * array + widened)
        kept = tokens + (tokens // part - 1) * part * _KEPT_ARRAYS
        return max(attending, kept * array + projected + self._unpacked(tokens)[0])

    def _unpacked(self, tokens: int) -> tuple[int, int]:
        """Bytes of the weights that are unpacked at one time where a block is waited for in parts, and of all of a
        block's. A double block's are the largest: each stream has queries, keys, values, a projection, and its MLP."""
        if not (self.packed and self.execution.dense and tokens >= rows_to_unpack()):
            return 0, 0
        D, M = self.config.hidden_size, self.config.mlp_hidden_size
        most = max(D * (3 * D + 2 * M), D * D + 3 * D * M)  # what projects in a single block, or adds in a double one
        return most * self.dtype.size, 2 * (4 * D * D + 3 * D * M) * self.dtype.size

    def _attending(self, tokens: int, images: int) -> tuple[int, int]:
        """Bytes of the scores of attention, and of a chunk of queries, which is scaled before it attends and kept until
        it has."""
        heads, dim = self.config.num_attention_heads, self.config.attention_head_dim
        scores = score_bytes(images * heads, tokens // images, dim, self.dtype.size)
        return scores, min(scores * 2 * dim * images // tokens, 2 * tokens * self._array)

    @property
    def _array(self) -> int:
        """Bytes of a token in an array as wide as the stream."""
        return self.config.hidden_size * self.dtype.size

    def longest(self, text: int, others: int, images: int) -> int:
        """Operations of the longest product or attention of a pass, with `others` besides the tokens of the text."""
        config = self.config
        D = config.hidden_size
        tokens = text + others
        part = min(images * tokens, self.execution.part)
        heads = images * config.num_attention_heads
        return max(
            2 * part * D * widest(config),
            attention_operations(heads, tokens, tokens, config.attention_head_dim, self.dtype.size),
            2 * images * text * config.joint_attention_dim * D,
        )
