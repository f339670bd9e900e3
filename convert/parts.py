"""The parts that others make a model of, as diffusers saves them: a row for each of `PARTS`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flux2_mlx.components import COMPONENTS, PARTS
from flux2_mlx.config import Geometries

from . import text, transformer, vae
from .rules import Rule, Shape, kernels_last, same
from .shapes import Infos

_Rules = Callable[[str, Shape], Rule]
TOKENIZER_PART = "tokenizer"
MODEL_PARTS = (*PARTS, TOKENIZER_PART)  # what a model needs


def _own_counts(configs: Geometries) -> dict[str, tuple[str, int]]:
    """How many blocks the networks of these geometries have, which are called in the source as they are here."""
    counts = [COMPONENTS[name].counts(config) for name, config in configs.items()]
    return {prefix: count for one in counts for prefix, count in one.items()}


@dataclass(frozen=True)
class PartLayout:
    """What a part of a source is saved as, and how networks are made of its tensors by their canonical names.

    Attributes:
        stem: what the names of its files of weights begin with.
        kind: the class that `model_index.json` says it is; None: its own config tells.
        prefix: what others put before the names of its tensors, where they save it with other parts or alone.
        groups: its layers whose precision is told together, by what their canonical names begin with.
        configs: the geometries of the networks that are made from it, given its config, the model, the config's path
            and where what a user should know is added; CheckpointError if it is another model, or asks for what is not
            implemented.
        measured: the same of tensors by their canonical names, where there is no config; CheckpointError if they are of
            no model in the table.
        obeyed: the `measured` geometries with what is said of the part besides, at the path of that; CheckpointError
            if it is not what the tensors are, or asks for what is not implemented.
        rules: for each network, given its geometry, how our tensor of a name and a shape is made.
        counts: how many blocks it has by what their names begin with, given those geometries: the key of the config
            that says so, and the number.
        is_dropped: whether a tensor has no place in our checkpoint, given the geometry of its network.
    """

    stem: str
    kind: str | None
    prefix: re.Pattern[str]
    groups: Mapping[str, str]
    configs: Callable[[dict[str, Any], Any, Path, list[str]], Geometries]
    measured: Callable[[Infos], Geometries]
    rules: dict[str, Callable[[Any], _Rules]]
    obeyed: Callable[[Geometries, dict[str, Any], Path], Geometries] = lambda configs, settings, path: configs
    counts: Callable[[Geometries], dict[str, tuple[str, int]]] = _own_counts
    is_dropped: Callable[[str, Any], bool] = lambda name, config: False


LAYOUT = {
    "transformer": PartLayout(
        stem="diffusion_pytorch_model",
        kind="Flux2Transformer2DModel",
        prefix=re.compile(r"model\.diffusion_model\.|diffusion_model\.|transformer\.|model\.|(?:pipe\.)?dit\."),
        groups={
            "double_blocks.": "double blocks",
            "single_blocks.": "single blocks",
            "double_stream_modulation_": "modulation",
            "single_stream_modulation.": "modulation",
            "final_layer.": "final layer",
            "": "embedders",
        },
        configs=transformer.configs,
        measured=transformer.measured,
        rules={"transformer": lambda config: same},
    ),
    "text_encoder": PartLayout(
        stem="model",
        kind=None,
        prefix=re.compile(
            r"(?:text_encoders\.)?(?:qwen3_4b|qwen3_8b|mistral3_24b)\.(?:transformer\.)?|text_encoder\.|"
            r"cond_stage_model\."
        ),
        groups={"model.layers.": "layers", "model.embed_tokens.": "embedding", "lm_head.": "head", "": "vision"},
        configs=text.configs,
        measured=text.measured,
        rules={
            "text_encoder": lambda config: text.rule_for,
            "language_model": lambda config: partial(text.later_rule_for, first=config.num_hidden_layers),
            "vision": lambda config: kernels_last,
        },
        obeyed=text.obeyed,
        counts=text.counts,
        is_dropped=text.is_dropped,
    ),
    "vae": PartLayout(
        stem="diffusion_pytorch_model",
        kind="AutoencoderKLFlux2",
        prefix=re.compile(r"vae\.|first_stage_model\."),
        groups={"": "convolutions and attention"},
        configs=vae.configs,
        measured=vae.measured,
        rules={"vae": lambda config: kernels_last},
        is_dropped=vae.is_dropped,
    ),
}
