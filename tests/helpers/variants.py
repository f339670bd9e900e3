"""Pipelines whose models are said to be others."""

from dataclasses import replace
from typing import Any

from flux2_mlx import Flux2Pipeline


def change_variant(pipe: Flux2Pipeline, **changes: Any) -> Flux2Pipeline:
    """`pipe`, with other facts about the model whose weights it has."""
    checkpoint = replace(pipe.checkpoint, variant=replace(pipe.variant, **changes))
    pipe.networks = replace(pipe.networks, checkpoint=checkpoint)
    return pipe
