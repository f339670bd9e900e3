"""Generating text with mlx-lm."""

import secrets
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from ..layers import check_finite
from .decoder import LanguageModel
from .prompts import IMAGE

_ROW_END = "[IMG_BREAK]"
_IMAGE_END = "[IMG_END]"


def image_placeholder(height: int, width: int) -> str:
    """The tokens that stand for an image of `height`×`width` cells in a Mistral prompt."""
    rows = [IMAGE * width] * height
    return _ROW_END.join(rows) + _IMAGE_END


def embed(model: LanguageModel, ids: Sequence[int], features: Sequence[mx.array], image_id: int) -> mx.array:
    """Embeddings `[L, D]` of token ids, with the `features` `[cells, D]` of images in the places of `image_id`."""
    tokens = np.array(ids)
    embeddings = model.embed_tokens(mx.array(tokens)).astype(features[0].dtype)
    embeddings[mx.array(np.flatnonzero(tokens == image_id))] = mx.concatenate(list(features))
    return embeddings


def generate(
    model: LanguageModel,
    ids: Sequence[int],
    ends: frozenset[int],
    *,
    embeddings: mx.array | None = None,
    temperature: float = 0.15,
    max_tokens: int = 512,
    seed: int | None = None,
) -> Iterator[int]:
    """Yield the ids that follow `ids`, up to one of `ends`.

    Args:
        model: the language model.
        ids: the prompt.
        ends: ids that end the answer; they are not yielded.
        embeddings: of the prompt, `[L, D]`, where it holds images.
        temperature: 0 takes the likeliest token each time.
        max_tokens: the most tokens to yield.
        seed: makes sampling repeatable.

    Raises:
        RangeError: the model's logits are not finite, so that no token can be chosen.
    """
    from mlx_lm.generate import generate_step, generation_stream

    # MLX's own sequence of random numbers is the caller's.
    key = mx.random.key(secrets.randbits(64) if seed is None else seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        if temperature == 0:
            return mx.argmax(logprobs, axis=-1)
        key, part = mx.random.split(key)
        return mx.random.categorical(logprobs * (1 / temperature), key=part)

    steps = generate_step(
        mx.array(list(ids)),
        model,
        max_tokens=max_tokens,
        sampler=sample,
        input_embeddings=embeddings,
    )
    try:
        for token, log_probabilities in steps:
            check_finite(log_probabilities, "language model")
            if int(token) in ends:
                return
            yield int(token)
    finally:
        steps.close()
        mx.synchronize(generation_stream)  # the next token is being worked out already
