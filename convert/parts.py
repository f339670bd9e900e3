"""What others call the networks and their tensors: the layout of diffusers, a row for each part of a source."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flux2_mlx.config import Config

from . import text, transformer, vae
from .rules import Rule, Shape

_Rules = Callable[[str, Shape], Rule]


@dataclass(frozen=True)
class PartLayout:
    """How a part of a source is named.

    Attributes:
        stem: what the names of its files of weights begin with.
        kind: the class that `model_index.json` says it is; None: its own config tells.
        configs: the geometries of the networks that are made from it, given its config, the model and the config's
            path; CheckpointError if it is another model, or asks for what is not implemented.
        counts: how many blocks the source has by what the names of their tensors begin with, given those geometries:
            the key of the config that says so, and the number.
        rules: for each network, given its geometry, how our tensor of a name and a shape is made.
        is_dropped: whether a tensor of the part has no place in our checkpoint, given the geometry of its network.
        canonical: the name that the rules have for a tensor.
    """

    stem: str
    kind: str | None
    configs: Callable[[dict[str, Any], Any, Path], dict[str, Config]]
    counts: Callable[[dict[str, Any]], dict[str, tuple[str, int]]]
    rules: dict[str, Callable[[Any], _Rules]]
    is_dropped: Callable[[str, Any], bool]
    canonical: Callable[[str], str] = lambda name: name


LAYOUT = {
    "transformer": PartLayout(
        stem="diffusion_pytorch_model",
        kind="Flux2Transformer2DModel",
        configs=transformer.configs,
        counts=transformer.counts,
        rules={"transformer": lambda config: transformer.rule_for},
        is_dropped=transformer.is_dropped,
    ),
    "text_encoder": PartLayout(
        stem="model",
        kind=None,
        configs=text.configs,
        counts=text.counts,
        rules={
            "text_encoder": lambda config: text.rule_for,
            "language_model": lambda config: partial(text.later_rule_for, first=config.num_hidden_layers),
            "vision": lambda config: text.vision_rule_for,
        },
        is_dropped=text.is_dropped,
        canonical=text.canonical,
    ),
    "vae": PartLayout(
        stem="diffusion_pytorch_model",
        kind="AutoencoderKLFlux2",
        configs=vae.configs,
        counts=vae.counts,
        rules={"vae": lambda config: vae.rule_for},
        is_dropped=vae.is_dropped,
    ),
}
