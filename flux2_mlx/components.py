"""The networks of a model, a row each. What is true of one of them stands in its row; other code asks the rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .config import Config, TextConfig, TransformerConfig, VAEConfig, Variant, VisionConfig
from .text import LaterLayers, PixtralVision, TextCost, TextEncoder, VisionCost
from .transformer import Flux2Transformer, TransformerCost
from .vae import VAE, VAECost


@dataclass(frozen=True)
class Network:
    """What is known of a network without its files.

    Attributes:
        config: the class of its geometry.
        module: the class of the network itself.
        cost: the class of what it takes beside its weights, for a geometry and the dtype that it computes in.
        field: the geometry's name in a `Variant`.
        part: the network of a source that it is made from.
        counts: how many blocks a geometry has, by the start of their names: the key of the config that says so, and
            the number.
        group: the network that is named for how it is quantized; None: never quantized.
        phases: the phases of runs that it is in memory for.
        streamed: its lists of blocks that can be streamed, in the order that they are run in.
        paints: whether images are made with it. The others write text, which needs neither transformer nor VAE.
        every_run: whether images are never made without it. Without the text encoder they are, of encoded prompts.
        has_headroom: whether it has room for large values under float16. Hidden states of language models and
            activations of image decoders are known to overflow that inside a layer, so these, which run once, keep the
            range of bfloat16.
    """

    config: type[Config]
    module: Callable[[Any], nn.Module]
    cost: Callable[[Any, mx.Dtype], Any]
    field: str
    part: str
    counts: Callable[[Any], dict[str, tuple[str, int]]]
    group: str | None
    phases: tuple[str, ...]
    streamed: tuple[str, ...] = ()
    paints: bool = False
    every_run: bool = False
    has_headroom: bool = False


COMPONENTS = {
    "transformer": Network(
        TransformerConfig,
        Flux2Transformer,
        TransformerCost,
        field="transformer",
        part="transformer",
        counts=lambda config: {
            "double_blocks.": ("num_layers", config.num_layers),
            "single_blocks.": ("num_single_layers", config.num_single_layers),
        },
        group="transformer",
        phases=("transformer",),
        streamed=("double_blocks", "single_blocks"),
        paints=True,
        every_run=True,
        has_headroom=True,
    ),
    "text_encoder": Network(
        TextConfig,
        TextEncoder,
        TextCost,
        field="text",
        part="text_encoder",
        counts=lambda config: {"layers.": ("num_hidden_layers", config.num_hidden_layers)},
        group="text_encoder",
        phases=("text_encoder", "language_model"),
        streamed=("layers",),
        paints=True,
    ),
    "language_model": Network(
        TextConfig,
        LaterLayers,
        TextCost,
        field="text",
        part="text_encoder",
        counts=lambda config: {"layers.": ("num_later_layers", config.num_later_layers)},
        group="text_encoder",
        phases=("language_model",),
        streamed=("layers",),
    ),
    "vision": Network(
        VisionConfig,
        PixtralVision,
        VisionCost,
        field="vision",
        part="text_encoder",
        counts=lambda config: {"vision_tower.transformer.layers.": ("num_hidden_layers", config.num_hidden_layers)},
        group="text_encoder",
        phases=("vision_tower",),
    ),
    "vae": Network(
        VAEConfig,
        VAE,
        VAECost,
        field="vae",
        part="vae",
        counts=lambda config: {
            "encoder.down_blocks.": ("the length of block_out_channels", len(config.block_out_channels)),
            "encoder.down_blocks.0.resnets.": ("layers_per_block", config.layers_per_block),
        },
        group=None,  # 168 MB, mostly convolutions, and its rounding errors would be seen as colour noise
        phases=("vae_encoder", "vae"),
        paints=True,
        every_run=True,
    ),
}
PARTS = tuple(dict.fromkeys(network.part for network in COMPONENTS.values()))
WRITING_PARTS = tuple(dict.fromkeys(network.part for network in COMPONENTS.values() if not network.paints))
GROUPS = tuple(name for name, network in COMPONENTS.items() if network.group == name)
PAINTING = tuple(name for name, network in COMPONENTS.items() if network.paints)
EVERY_RUN = tuple(name for name, network in COMPONENTS.items() if network.every_run)


def in_phase(phase: str) -> tuple[str, ...]:
    """The networks that are in memory for a phase of a run."""
    return tuple(name for name, network in COMPONENTS.items() if phase in network.phases)


def network_dtype(name: str, dtype: mx.Dtype) -> mx.Dtype:
    """What the network `name` computes in where activations are asked for in `dtype`."""
    return mx.bfloat16 if dtype == mx.float16 and not COMPONENTS[name].has_headroom else dtype


def by_group(quant: str, text_quant: str) -> dict[str, str]:
    """How the networks are stored, by the one that each group of them is named for."""
    return dict(zip(GROUPS, (quant, text_quant), strict=True))


def quantizations(quant: str, text_quant: str) -> dict[str, str]:
    """How each network is stored where the transformer is as `quant` and the text encoder as `text_quant` says."""
    groups = by_group(quant, text_quant) | {None: "bf16"}
    return {name: groups[network.group] for name, network in COMPONENTS.items()}


def geometries(variant: Variant) -> dict[str, Config]:
    """The geometry of each network that a variant has."""
    configs = {name: getattr(variant, network.field) for name, network in COMPONENTS.items()}
    return {name: config for name, config in configs.items() if config is not None and _has_blocks(name, config)}


def _has_blocks(name: str, config: Config) -> bool:
    return any(count for _, count in COMPONENTS[name].counts(config).values())


def by_field(configs: dict[str, Config]) -> dict[str, Any]:
    """Geometries by their names in a `Variant`. What the text encoder and the language model share is the encoder's."""
    fields: dict[str, Any] = {}
    for name, network in COMPONENTS.items():
        if name in configs:
            fields.setdefault(network.field, configs[name])
    return fields
