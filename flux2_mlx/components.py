"""The components of a model, a row each. What is true of one of them stands in its row; other code asks the rows."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from .config import Config, TextConfig, TransformerConfig, VAEConfig, Variant, VisionConfig
from .text import LaterLayers, PixtralVision, TextCost, TextEncoder, VisionCost
from .transformer import Flux2Transformer, TransformerCost
from .vae import VAECost, autoencoder
from .wording import told


@dataclass(frozen=True)
class ComponentKind:
    """What is known of a component, one of the networks of a model, without its files.

    Attributes:
        config: the class of its geometry.
        module: the class of the network itself, which takes a geometry.
        cost: what it takes beside its weights, for a geometry, the dtype that it computes in, and whether weights are
            packed.
        geometry: the name of its geometry in a `Variant`.
        part: the component whose folder in a source has its weights.
        counts: how many blocks a geometry has, by the start of their names: the key of the config that says so, and
            the number.
        group: the component whose quantization is asked for and which this one is stored like; None: it is never
            quantized.
        phases: the phases of runs that it is in memory for.
        labels: what a user is told is going on in a phase, where that is not the phase's name.
        streamed: its lists of blocks that can be streamed, in the order that they are run in.
        looked_up: its matrices that only rows are taken of. They are no linear layers, so adapters don't go there.
        worst_last: whether few bits of its last blocks change more than those of its first.
        paints: whether images are made with it. The others write text, which needs neither transformer nor VAE.
        is_main: whether a model is what this component of it is: it tells which model that is, and is never another's.
        every_run: whether no image is made without it. Encoded prompts make the text encoder unnecessary.
        has_headroom: whether it has room for large values under float16. Hidden states of language models and
            activations of image decoders are known to overflow that inside a layer, so these, which run once, keep the
            range of bfloat16.
    """

    config: type[Config]
    module: Callable[[Any], nn.Module]
    cost: Callable[[Any, mx.Dtype, bool], Any]
    geometry: str
    part: str
    counts: Callable[[Any], dict[str, tuple[str, int]]]
    group: str | None
    phases: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    streamed: tuple[str, ...] = ()
    looked_up: tuple[str, ...] = ()
    worst_last: bool = False
    paints: bool = False
    is_main: bool = False
    every_run: bool = False
    has_headroom: bool = False


COMPONENTS = {
    "transformer": ComponentKind(
        TransformerConfig,
        Flux2Transformer,
        TransformerCost,
        geometry="transformer",
        part="transformer",
        counts=lambda config: {
            "double_blocks.": ("num_layers", config.num_layers),
            "single_blocks.": ("num_single_layers", config.num_single_layers),
        },
        group="transformer",
        phases=("transformer",),
        labels={"transformer": "denoising"},
        streamed=("double_blocks", "single_blocks"),
        worst_last=True,
        paints=True,
        is_main=True,
        every_run=True,
        has_headroom=True,
    ),
    "text_encoder": ComponentKind(
        TextConfig,
        TextEncoder,
        TextCost,
        geometry="text",
        part="text_encoder",
        counts=lambda config: {"layers.": ("num_hidden_layers", config.num_hidden_layers)},
        group="text_encoder",
        phases=("text_encoder", "language_model"),
        streamed=("layers",),
        looked_up=("embed_tokens",),
        paints=True,
    ),
    "language_model": ComponentKind(
        TextConfig,
        LaterLayers,
        TextCost,
        geometry="text",
        part="text_encoder",
        counts=lambda config: {"layers.": ("num_later_layers", config.num_later_layers)},
        group="text_encoder",
        phases=("language_model",),
        streamed=("layers",),
    ),
    "vision": ComponentKind(
        VisionConfig,
        PixtralVision,
        VisionCost,
        geometry="vision",
        part="text_encoder",
        counts=lambda config: {"vision_tower.transformer.layers.": ("num_hidden_layers", config.num_hidden_layers)},
        group="text_encoder",
        phases=("vision",),
    ),
    "vae": ComponentKind(
        VAEConfig,
        autoencoder,
        lambda config, dtype, _: VAECost(config, dtype),
        geometry="vae",
        part="vae",
        counts=lambda config: {
            "encoder.down_blocks.": ("the length of block_out_channels", len(config.block_out_channels)),
            "encoder.down_blocks.0.resnets.": ("layers_per_block", config.layers_per_block),
        },
        group=None,  # 168 MB, mostly convolutions, and its rounding errors would be seen as colour noise
        phases=("vae_encoder", "vae"),
        labels={"vae_encoder": "references", "vae": "decoding"},
        paints=True,
        every_run=True,
    ),
}
# Each is saved as a folder in a source: those of a whole model, and those that suffice to write text.
PARTS = tuple(dict.fromkeys(kind.part for kind in COMPONENTS.values()))
WRITING_PARTS = tuple(dict.fromkeys(kind.part for kind in COMPONENTS.values() if not kind.paints))
(MAIN,) = (name for name, kind in COMPONENTS.items() if kind.is_main)
(MAIN_PART,) = (kind.part for kind in COMPONENTS.values() if kind.is_main)
GROUPS = tuple(name for name, kind in COMPONENTS.items() if kind.group == name)
PAINTING = tuple(name for name, kind in COMPONENTS.items() if kind.paints)
EVERY_RUN = tuple(name for name, kind in COMPONENTS.items() if kind.every_run)
_LABELS = {phase: label for kind in COMPONENTS.values() for phase, label in kind.labels.items()}
_Quant = TypeVar("_Quant", str, str | None)


def can_paint(names: Collection[str]) -> bool:
    """Whether images can be made with the networks of these names, and not only text be written."""
    return all(name in names for name in PAINTING)


def in_phase(phase: str) -> tuple[str, ...]:
    """The networks that are in memory for a phase of a run."""
    return tuple(name for name, kind in COMPONENTS.items() if phase in kind.phases)


def label(phase: str) -> str:
    """What a user is told is going on in a phase of a run."""
    return _LABELS.get(phase, told([phase]))


def network_dtype(name: str, dtype: mx.Dtype) -> mx.Dtype:
    """What the network `name` computes in where activations are asked for in `dtype`."""
    return mx.bfloat16 if dtype == mx.float16 and not COMPONENTS[name].has_headroom else dtype


def by_group(quant: _Quant, text_quant: _Quant) -> dict[str, _Quant]:
    """How the components are stored, by the one that each group of them is stored like."""
    return dict(zip(GROUPS, (quant, text_quant), strict=True))


def quantizations(quant: str, text_quant: str) -> dict[str, str]:
    """How each component is stored where the transformer is as `quant` and the text encoder as `text_quant` says."""
    groups = by_group(quant, text_quant)
    return {name: groups[kind.group] if kind.group else "bf16" for name, kind in COMPONENTS.items()}


def geometries(variant: Variant) -> dict[str, Config]:
    """The geometry of each component that a variant has."""
    configs = {name: getattr(variant, kind.geometry) for name, kind in COMPONENTS.items()}
    return {name: config for name, config in configs.items() if config is not None and _has_blocks(name, config)}


def _has_blocks(name: str, config: Config) -> bool:
    return any(count for _, count in COMPONENTS[name].counts(config).values())


def by_field(configs: dict[str, Config]) -> dict[str, Any]:
    """Geometries by their names in a `Variant`. What the text encoder and the language model share is the encoder's."""
    fields: dict[str, Any] = {}
    for name, kind in COMPONENTS.items():
        if name in configs:
            fields.setdefault(kind.geometry, configs[name])
    return fields
