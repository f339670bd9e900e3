"""Encoded prompts for the tests of their cache."""

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux2_mlx import Flux2Pipeline
from flux2_mlx.embedding_cache import EmbeddingCache, Form

OTHER = "a large green ring on a white background"
IMAGE = {"height": 32, "width": 32, "num_inference_steps": 1, "seed": 5}
KEYS = [character * 64 for character in "0123456789abcdef"]
STATES = mx.arange(1500).reshape(30, 50).astype(mx.bfloat16)  # 3000 bytes
FORM = Form(STATES.shape, STATES.dtype)
PART = ".flux2-mlx-1-0123456789abcdef.part"


def open_demo(**options) -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", **options)


def bits(states: mx.array) -> tuple:
    return states.dtype, states.shape, np.array(states.view(mx.uint8)).tobytes()


def states_of(key: str) -> mx.array:
    """What the tests keep under `key`."""
    return STATES + KEYS.index(key)


def path_of(cache: EmbeddingCache, key: str) -> Path:
    return cache.folder / f"{key}.safetensors"


def kept(cache: EmbeddingCache) -> list[str]:
    return [entry.path.stem for entry in cache.entries()]


def failing(code: int) -> Callable:
    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    return fail
