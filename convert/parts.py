"""The parts that others make a model of, as diffusers saves them: a row for each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flux2_mlx.components import COMPONENTS
from flux2_mlx.config import Geometries

from . import text, transformer, vae
from .rules import Rule, Shape, kernels_last, same

_Rules = Callable[[str, Shape], Rule]


@dataclass(frozen=True)
class PartLayout:
    """What a part of a source is saved as, and how networks are made of its tensors by their canonical names.

    Attributes:
        stem: what the names of its files of weights begin with.
        kind: the class that `model_index.json` says it is; None: its own config tells.
        configs: the geometries of the networks that are made from it, given its config, the model, the config's path
            and where what a user should know is added; CheckpointError if it is another model, or asks for what is not
            implemented.
        counts: how many blocks it has by what their names begin with, given those geometries: the key of the config
            that says so, and the number.
        rules: for each network, given its geometry, how our tensor of a name and a shape is made.
        is_dropped: whether a tensor has no place in our checkpoint, given the geometry of its network.
    """

    stem: str
    kind: str | None
    configs: Callable[[dict[str, Any], Any, Path, list[str]], Geometries]
    counts: Callable[[Geometries], dict[str, tuple[str, int]]]
    rules: dict[str, Callable[[Any], _Rules]]
    is_dropped: Callable[[str, Any], bool] = lambda name, config: False


LAYOUT = {
    "transformer": PartLayout(
        stem="diffusion_pytorch_model",
        kind="Flux2Transformer2DModel",
        configs=transformer.configs,
        counts=lambda configs: COMPONENTS["transformer"].counts(configs["transformer"]),
        rules={"transformer": lambda config: same},
    ),
    "text_encoder": PartLayout(
        stem="model",
        kind=None,
        configs=text.configs,
        counts=text.counts,
        rules={
            "text_encoder": lambda config: text.rule_for,
            "language_model": lambda config: partial(text.later_rule_for, first=config.num_hidden_layers),
            "vision": lambda config: kernels_last,
        },
        is_dropped=text.is_dropped,
    ),
    "vae": PartLayout(
        stem="diffusion_pytorch_model",
        kind="AutoencoderKLFlux2",
        configs=vae.configs,
        counts=lambda configs: COMPONENTS["vae"].counts(configs["vae"]),
        rules={"vae": lambda config: kernels_last},
        is_dropped=vae.is_dropped,
    ),
}
