"""Pipelines of the built-in model, and the memory that is taken."""

import gc

import mlx.core as mx

from flux2_mlx import Flux2Pipeline


def demo(**options) -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", **({"dtype": "float32", "prompt_cache": False} | options))


def taken() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()
