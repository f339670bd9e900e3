"""Adapters folded into the weights of a model that is converted."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_mlx.adapters import Placed, folded
from flux2_mlx.config import Config
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import Tensors

from .adapter_file import AdapterFile

_WEIGHT = ".weight"
_BIASES = {"bias", "diff_b"}


@dataclass(frozen=True)
class Fold:
    """An adapter that is to be folded in, the `scale` of what it changes, and the `source` that it was asked for as."""

    found: AdapterFile
    scale: float
    source: str

    def check(self, configs: Mapping[str, Config], model: str) -> None:
        """CheckpointError unless it is for networks of these geometries, those of `model`, and changes weights only."""
        self.found.check(configs, model)
        if wrong := next((name for name, x in self.found.modules.items() if _BIASES & x.keys.keys()), None):
            raise CheckpointError(
                f"{self.found.path} changes the bias of {wrong}, and layers of FLUX.2 have none to fold it into; use "
                "the adapter when images are made"
            )

    @property
    def stamp(self) -> dict[str, Any]:
        """What the checkpoint says of it."""
        return {"source": self.source, "sha256": self.found.sha256, "scale": self.scale}


class Folds:
    """Adapters in memory, as `folds` say it, for networks of these geometries."""

    def __init__(self, folds: Sequence[Fold], configs: Mapping[str, Config]):
        self._adapters = [(x.found.load(configs, Path(x.source).name), x.scale) for x in folds]

    def into(self, network: str, tensors: Tensors) -> Tensors:
        """The weights of a network with what the adapters change; themselves where that is nothing."""
        changes: dict[str, list[tuple[Sequence[Placed], float]]] = {}
        for adapter, scale in self._adapters:
            for layer, placed in adapter.layers.get(network, {}).items():
                changes.setdefault(f"{layer}{_WEIGHT}", []).append((placed, scale))
        return _Folded(tensors, changes) if changes else tensors

    def change(self, network: str) -> bool:
        """Whether an adapter changes anything of a network."""
        return any(adapter.layers.get(network) for adapter, _ in self._adapters)


class _Folded:
    """Tensors with changes, each in the dtype that it had."""

    def __init__(self, tensors: Tensors, changes: Mapping[str, Sequence[tuple[Sequence[Placed], float]]]):
        self._tensors, self._changes, self.infos = tensors, changes, tensors.infos

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        names = list(names)
        for name, array in zip(names, self._tensors.read(names), strict=True):
            yield _changed(array, self._changes[name]) if name in self._changes else array


def _changed(weight: mx.array, changes: Sequence[tuple[Sequence[Placed], float]]) -> mx.array:
    """All adapters start from the model's own weight, as they do beside a layer."""
    base = weight.astype(mx.float32)
    whole = base
    for placed, scale in changes:
        whole = whole + (folded(base, placed, scale) - base)
    return whole.astype(weight.dtype)


def folded_source(source: Mapping[str, Any], folds: Sequence[Fold]) -> dict[str, Any]:
    """What a checkpoint says of its source, with the adapters and the fingerprint that it has with them."""
    stamps = [fold.stamp for fold in folds]
    if not stamps:
        return dict(source)
    text = json.dumps([source.get("fingerprint"), stamps], sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return {**source, "fingerprint": fingerprint, "adapters": [*source.get("adapters", []), *stamps]}
