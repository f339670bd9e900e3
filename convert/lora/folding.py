"""Adapters folded into the weights of a model that is converted."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_mlx.adapters import MOST_SCALE, Placed, folded
from flux2_mlx.config import Config
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.weights import Tensors

from ..folder import derived_source
from .adapter_file import AdapterFile

_WEIGHT = ".weight"
_BIASES = {"bias", "diff_b"}
_Change = tuple[str, Sequence[Placed], float]  # of an adapter of this name, and its scale


@dataclass(frozen=True)
class Fold:
    """An adapter that is to be folded in, the `scale` of what it changes, and the `source` that it was asked for as.

    Where no more than its header is here, `fetch` brings it and gives what it is then.
    """

    found: AdapterFile
    scale: float
    source: str
    fetch: Callable[[], AdapterFile] | None = None

    def __post_init__(self) -> None:
        if not -MOST_SCALE <= self.scale <= MOST_SCALE:
            limits = f"{-MOST_SCALE} to {MOST_SCALE}"
            raise InputError(f"the scale of {self.source} must be {limits}, got {self.scale:g}")

    def check(self, configs: Mapping[str, Config], model: str) -> None:
        """CheckpointError unless it is for networks of these geometries, those of `model`, and changes weights only."""
        self.found.check(configs, model)
        if wrong := next((name for name, x in self.found.modules.items() if _BIASES & x.keys.keys()), None):
            raise CheckpointError(
                f"{self.found.path} changes the bias of {wrong}, and layers of FLUX.2 have none to fold it into; use "
                "the adapter when images are made"
            )

    @cached_property
    def fetched(self) -> AdapterFile:
        """The adapter with its values."""
        return self.found if self.fetch is None else self.fetch()

    @property
    def stamp(self) -> dict[str, Any]:
        """What the checkpoint says of it."""
        told = {"source": self.source, "sha256": self.fetched.sha256, "scale": self.scale}
        return told if self.fetched.config_hash is None else told | {"config": self.fetched.config_hash}


def check_folds(folds: Sequence[Fold], configs: Mapping[str, Config], model: str) -> None:
    """Check all (see `Fold.check`), and only then bring those that are not here."""
    for fold in folds:
        fold.check(configs, model)
    for fold in folds:
        _ = fold.fetched


class Folds:
    """Adapters in memory, as `folds` say it, for networks of these geometries; `versions` are their files as they were
    when they were opened."""

    def __init__(self, folds: Sequence[Fold], configs: Mapping[str, Config]):
        self.versions = [file for x in folds for file in x.fetched.files.versions]
        self._adapters = [(x.fetched.load(configs, Path(x.source).name), x.scale) for x in folds]

    def into(self, network: str, tensors: Tensors) -> Tensors:
        """The weights of a network with what the adapters change; themselves where that is nothing."""
        changes: dict[str, list[_Change]] = {}
        for adapter, scale in self._adapters:
            for layer, placed in adapter.layers.get(network, {}).items():
                changes.setdefault(f"{layer}{_WEIGHT}", []).append((adapter.name, placed, scale))
        return _Folded(tensors, changes) if changes else tensors

    def change(self, network: str) -> bool:
        """Whether an adapter changes anything of a network."""
        return any(adapter.layers.get(network) for adapter, _ in self._adapters)


class _Folded:
    """Tensors with changes, each in the dtype that it had; CheckpointError if one is too large then."""

    def __init__(self, tensors: Tensors, changes: Mapping[str, Sequence[_Change]]):
        self._tensors = tensors
        self._changes = changes
        self.infos = tensors.infos

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        names = list(names)
        for name, array in zip(names, self._tensors.read(names), strict=True):
            yield _changed(name, array, self._changes[name]) if name in self._changes else array


def _changed(name: str, weight: mx.array, changes: Sequence[_Change]) -> mx.array:
    """All adapters start from the model's own weight, as they do beside a layer."""
    base = weight.astype(mx.float32)
    whole = base
    for _, placed, scale in changes:
        whole = whole + (folded(base, placed, scale) - base)
    if not mx.isfinite(whole.astype(mx.bfloat16)).all().item():
        adapters = ", ".join(f"{adapter} × {scale:g}" for adapter, _, scale in changes)
        layer = name.removesuffix(_WEIGHT)
        raise CheckpointError(f"{layer} with {adapters} has values that are not finite numbers; give a smaller scale")
    return whole.astype(weight.dtype)


def folded_source(source: Mapping[str, Any], folds: Sequence[Fold]) -> dict[str, Any]:
    """What a checkpoint says of its source, with the adapters and the fingerprint that it has with them."""
    stamps = [fold.stamp for fold in folds]
    if not stamps:
        return dict(source)
    return derived_source(source, stamps) | {"adapters": [*source.get("adapters", []), *stamps]}
