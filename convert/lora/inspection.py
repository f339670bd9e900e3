"""What is known of an adapter from its header and the few numbers that its changes are multiplied by."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from flux2_mlx.config import VARIANTS, Config
from flux2_mlx.errors import CheckpointError

from .adapter_file import AdapterFile
from .places import TEXT, TRANSFORMER
from .presets import Preset
from .shapes import Factors

_MAX_TEXT = 500


@dataclass(frozen=True)
class InspectedModule:
    """A module of the trainer's model: the `layer` of ours that it changes, or in brackets why it is not used; what
    kind of change that is, of what rank and alpha (None: of none), and what the change is multiplied by."""

    name: str
    layer: str
    kind: str
    rank: int | None
    alpha: float | None
    scale: float


@dataclass(frozen=True)
class Inspection:
    """What an adapter is.

    Attributes:
        source: as it was asked for.
        kinds: `LoRA` and the like; see `AdapterFile.kinds`.
        models: those of the table that it fits; `trained_on`: the one that its trainer names, or None.
        title, trainer, trigger_words: what it says of itself.
        preset: what it is made to be run with, or None.
        naming: who names layers so.
        nbytes: of its tensors, and `dtypes` how many there are of each dtype.
        layers: how many of each network it changes.
        modules: in the order of the file.
        unused: tensors that belong to no layer.
        notes: what a user should know.
        metadata: all texts of the header, cut where they are long.
    """

    source: str
    kinds: tuple[str, ...]
    models: tuple[str, ...]
    trained_on: str | None
    title: str | None
    trainer: str | None
    trigger_words: tuple[str, ...]
    preset: Preset | None
    naming: str
    nbytes: int
    dtypes: Mapping[str, int]
    layers: Mapping[str, int]
    modules: tuple[InspectedModule, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]
    metadata: Mapping[str, str]


def inspect(found: AdapterFile, source: str) -> Inspection:
    """What an adapter is that was asked for as `source`."""
    model = found.trained_on or next(iter(found.models), None)
    configs: dict[str, Config] = {}
    if model:
        configs = {TRANSFORMER: VARIANTS[model].transformer, TEXT: VARIANTS[model].text}
    used = {(where.network, where.layer) for where in found.places.values()}
    infos = found.files.infos
    return Inspection(
        source,
        found.kinds,
        found.models,
        found.trained_on,
        found.said.title,
        found.said.trainer,
        found.said.trigger_words,
        _preset(found),
        found.naming,
        sum(info.nbytes for info in infos.values()),
        dict(Counter(info.dtype for info in infos.values())),
        dict(Counter(network for network, _ in used)),
        _modules(found, configs),
        found.unknown,
        tuple(found.notes(configs, model) if model else _misfit(found)),
        {key: text[:_MAX_TEXT] for key, text in found.files.metadata.items()},
    )


def _preset(found: AdapterFile) -> Preset | None:
    try:
        return found.preset
    except CheckpointError:  # the file beside it may be about something else
        return None


def _modules(found: AdapterFile, configs: Mapping[str, Config]) -> tuple[InspectedModule, ...]:
    scales = found.scales()
    fates = found.fates(configs) if configs else {}
    rows = []
    for name, module in found.modules.items():
        rank = Factors(module, found.tensors.infos).rank
        where = found.places[name]
        is_root = found.said.strengths[where.network].is_root and "alpha" not in module.keys
        alpha = None if rank is None else scales[name] * (math.sqrt(rank) if is_root else rank)
        kind = f"{'DoRA on ' if 'magnitude' in module.keys else ''}{module.kind or 'bias'}"
        layer = fates.get(next(iter(module.keys.values())), str(where))
        rows.append(InspectedModule(name, layer, kind, rank, alpha, scales[name]))
    return tuple(rows)


def _misfit(found: AdapterFile) -> list[str]:
    """What is to be said of one that fits no model of the table."""
    return [f"it has {len(found.places)} layers of FLUX.2, but no model of the table has all of them in these sizes"]
