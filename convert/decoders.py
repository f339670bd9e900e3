"""Decoders of FLUX.2's latents in files of others: that of an autoencoder in any of its namings, or TAEF2."""

import re
from collections.abc import Callable
from pathlib import Path

from flux2_mlx.checkpoint import Component
from flux2_mlx.components import geometries
from flux2_mlx.config import VARIANTS, VAEConfig
from flux2_mlx.decoders import Decoder, decodes
from flux2_mlx.errors import CheckpointError
from flux2_mlx.vae import TinyVAEConfig
from flux2_mlx.weights import FLOATS, TensorInfo, Tensors, mismatches, raise_problems

from . import formats
from .configs import Stated
from .geometry import understood
from .rules import Converted, Finite, Placed, Rule, Shape, kernels_last
from .shapes import Infos, shape_of
from .sources import parts_of, the_part
from .weight_files import loose_files

# The layers of TAEF2's decoder by their numbers in `taesd.py`, whose first one has no weights, and what is in a block
# by the numbers there, among which activations count.
_LAYERS = {
    "conv_in": 1,
    **{f"blocks.{level}.{block}": 3 + 5 * level + block for level in range(3) for block in range(3)},
    **{f"up.{level}": 7 + 5 * level for level in range(3)},
    "block_out": 18,
    "conv_out": 19,
}
_WITHIN = {
    **{f"conv.{number}": f"conv.{2 * number}" for number in range(3)},
    "pool.widen": "pool.0",
    "pool.norm": "pool.1",
    "pool.narrow": "pool.3",
}
_OURS = re.compile(r"decoder\.(blocks\.\d\.\d|block_out|up\.\d|conv_in|conv_out)\.(?:(\w+\.\w+)\.)?(\w+)")
# What precedes the numbers of layers, and how much lower they are then: the decoder alone, or both as diffusers' class.
_SPELLINGS = {"": 0, "decoder.layers.": 1}


def read_decoder(place: Path, name: str) -> Decoder:
    """The decoder in a file of weights, or in a folder with no others, of which nothing but the header is read.

    Args:
        place: where it is.
        name: what it is asked for as.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    paths = loose_files(place)
    if len(paths) > 1:  # images remember one file
        raise CheckpointError(f"{place} is {len(paths)} files, and a decoder is one; give a single file")
    stored = formats.stored(paths)
    if paths[0].suffix.lower() != formats.GGUF and (prefix := _spelling(stored.infos)) is not None:
        return _tiny(paths[0], stored, name, prefix)
    parts = parts_of(place, paths, Stated(), lambda: [geometries(row) for row in VARIANTS.values()])
    reading = the_part(parts, "vae", place).reading
    configs, problem = understood(reading, str(place), f"{place} is not the autoencoder of a FLUX.2 model")
    if problem:
        raise problem
    rules = reading.rules_for("vae", configs["vae"])
    return _decoder(paths[0], name, configs["vae"], parts["vae"].tensors, rules)


def _tiny(place: Path, tensors: Tensors, name: str, prefix: str) -> Decoder:
    """TAEF2, whose layers have this `prefix`."""

    def rule(ours: str, shape: Shape) -> Rule:
        return kernels_last(_theirs(ours, prefix), shape)

    latents = shape_of(tensors.infos, _theirs("decoder.conv_in.weight", prefix), 4)[1]
    config = TinyVAEConfig(latent_channels=latents)
    own = {name: info for name, info in tensors.infos.items() if name.startswith(prefix)}
    shapes = {_theirs(ours, prefix): rule(ours, x.shape).source_shape(x.shape) for ours, x in _infos(config).items()}
    dtypes = {name: info.dtype for name, info in own.items() if info.dtype in FLOATS.values()}
    expected = {name: TensorInfo(dtypes.get(name, "F16"), shape) for name, shape in shapes.items()}
    raise_problems(f"{place} is not TAEF2's decoder", mismatches(expected, own))
    return _decoder(place, name, config, tensors, rule)


def _decoder(
    place: Path, name: str, config: VAEConfig, tensors: Tensors, rule_for: Callable[[str, Shape], Rule]
) -> Decoder:
    infos = _infos(config)
    rules = {ours: rule_for(ours, info.shape) for ours, info in infos.items()}
    converted = Placed(Converted(tensors, rules, infos), place)
    checked = Finite(converted, lambda tensor: f"{place} is damaged: {tensor} has values that are no finite numbers")
    return Decoder(name, place, config, checked)


def _infos(config: VAEConfig) -> dict[str, TensorInfo]:
    """The tensors of the decoder of an autoencoder of ours."""
    return {name: info for name, info in Component("vae", config, None, ()).infos.items() if decodes(name)}


def _theirs(ours: str, prefix: str) -> str:
    """The name of a tensor of TAEF2, given ours."""
    layer, within, end = _OURS.fullmatch(ours).groups()  # type: ignore[union-attr]  # all that `_infos` gives match
    number = _LAYERS[layer] - _SPELLINGS[prefix]
    return f"{prefix}{number}.{_WITHIN[within]}.{end}" if within else f"{prefix}{number}.{end}"


def _spelling(infos: Infos) -> str | None:
    """What precedes the layers of TAEF2; None: it is another network."""
    return next((x for x in _SPELLINGS if _theirs("decoder.blocks.0.0.pool.widen.weight", x) in infos), None)
