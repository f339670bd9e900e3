"""Adapters (LoRA and its kin) of a pipeline, loaded and chosen as diffusers spells it."""

import logging
import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, Self

import mlx.core as mx
import numpy as np

from .adapters import MOST_SCALE, Adapter
from .arguments import checked_number, kinds, named, texts
from .branches import AtWork
from .device import begin_computing
from .errors import InputError
from .metering import turn
from .networks import Networks
from .progress_bar import acquisition_bars, announce
from .request import MAX_STEPS, check_count

if TYPE_CHECKING:
    from .store import FoundAdapter

FoundUse = tuple["FoundAdapter", float, tuple[int, int] | None]  # and its scale and steps
Weight = float | Mapping[str, float | None] | None
_log = logging.getLogger(__name__)


class LoraMethods:
    """Adapters run beside the layers, whose weights stay as they are. All that are at work add up."""

    networks: Networks
    _loaded: dict[str, AtWork]
    _chosen: list[AtWork]  # those at work, or that would be if adapters were not disabled

    @named
    def load_lora_weights(
        self,
        source: str | os.PathLike[str],
        weight_name: str | None = None,
        adapter_name: str | None = None,
        scale: float = 1.0,
        steps: tuple[int, int] | None = None,
        *,
        subfolder: str | None = None,
        progress: bool = True,
    ) -> None:
        """Load an adapter and have it at work, beside those that are. One of the Hub is fetched first, if its header
        says that it is for this model.

        Args:
            source: a safetensors file, a folder as trainers save adapters, `owner/name` or `owner/name:file` of the
                Hub, or an address there.
            weight_name: the file's name in the folder or repo, where that holds several.
            adapter_name: what it is called from here on; None: `default_0`, and so on.
            scale: of what it changes; negative: the opposite.
            steps: the first and the last step of a run that it works in, counted from 1; None: in all. What it changes
                of the text encoder, if anything, is at work in any case.
            subfolder: the folder within the folder or repo that it is in.
            progress: show what is fetched.

        Raises:
            InputError: a setting is wrong, or the name is taken. CheckpointError: it is damaged, or for another model.
            DownloadError: it can't be fetched.
        """
        from .store import find_adapter

        if not isinstance(source, str | os.PathLike):
            raise InputError(f"an adapter is named by a text or a path, not by {type(source).__name__}")
        kinds(weight_name=(weight_name, str), adapter_name=(adapter_name, str), subfolder=(subfolder, str))
        self._free_name(adapter_name)
        _checked(scale, steps)
        check_count(len(self._chosen) + 1)
        with find_adapter(source, weight_name, subfolder) as found, acquisition_bars(disable=not progress) as show:
            for note in found.check(self.networks.checkpoint):
                _log.warning("%s: %s", found.source, note)
            if progress and found.download:
                announce(found.download)
            found.fetch(show)
            self._use([(self._free_name(adapter_name), found, scale, steps)])

    def use_adapters(self, adapters: Sequence[FoundUse]) -> None:
        """Have adapters at work besides, each with its scale and steps, that were fetched after their `check`.

        Raises:
            InputError: a scale or steps are wrong, or they are too many. CheckpointError: one is damaged.
        """
        check_count(len(self._chosen) + len(adapters))
        free = (name for number in count() if (name := f"default_{number}") not in self._loaded)
        self._use([(next(free), *use) for use in adapters])

    def _use(self, named: "Sequence[tuple[str, FoundAdapter, float, tuple[int, int] | None]]") -> None:
        """Have all of them at work, or none; each comes with its name."""
        with turn():
            begin_computing()
            checkpoint = self.networks.checkpoint
            dtype_of = self.networks.dtype_of
            loaded = {
                name: AtWork(found.load(checkpoint, name).cast(dtype_of), *_checked(*use))
                for name, found, *use in named
            }
            self._choose([*self._chosen, *loaded.values()])
            self._loaded |= loaded

    def expecting(self, adapters: Sequence[FoundUse]) -> Self:
        """A pipeline like this, to check and plan runs, with adapters at work that need not be here yet.

        Args:
            adapters: each with its scale and steps, after its `check`.

        Raises:
            InputError: a scale or steps are wrong, or they are too many.
        """
        check_count(len(self.networks.adapters) + len(adapters))
        outlines = [
            AtWork(found.outline(self.networks.checkpoint, found.source).cast(self.networks.dtype_of), *_checked(*use))
            for found, *use in adapters
        ]
        pipe = copy(self)
        pipe.networks = self.networks.with_adapters([*self.networks.adapters, *outlines])
        return pipe

    def _scaled(self, factor: Any) -> Self:
        """A pipeline like this with what adapters change times a factor. It shares all that is in memory."""
        scale = checked_number("scale", factor, -MOST_SCALE, MOST_SCALE)
        if scale == 1:
            return self
        for one in self.networks.adapters:
            product = f"the product of scale {scale:g} and the scale {one.scale:g} of {one.title}"
            checked_number(product, scale * one.scale, -MOST_SCALE, MOST_SCALE)
        pipe = copy(self)
        pipe.networks = self.networks.with_scale(scale)
        return pipe

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: Weight | Sequence[Weight] | np.ndarray = None,
    ) -> None:
        """Have these of the loaded adapters at work and no others, each in the steps that it was loaded for.

        Args:
            adapter_names: one, or several.
            adapter_weights: the scale of each, or one for all; None: 1. A scale may be given by the network that is
                changed, as `{"transformer": 0.5}`, where it is the same for all networks that an adapter changes.

        Raises:
            InputError: there is no such adapter, they are too many, there are more or fewer weights, or one is wrong.
        """
        names = self._known("adapter_names", adapter_names)
        check_count(len(names))
        parts = [*self.networks.checkpoint.components]
        loaded = [self._loaded[name] for name in names]
        weights = _weights(adapter_weights, len(names))
        chosen = [replace(one, scale=_scale(one.adapter, x, parts)) for one, x in zip(loaded, weights, strict=True)]
        with turn():
            self._choose(chosen)

    def get_active_adapters(self) -> list[str]:
        """The names of the adapters at work, or of those that `enable_lora` would have at work."""
        return [one.adapter.name for one in self._chosen]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of all loaded adapters, by the network that they change."""
        networks = self.networks.checkpoint.components
        changing = {part: [x for x, one in self._loaded.items() if one.adapter.layers.get(part)] for part in networks}
        return {part: names for part, names in changing.items() if names}

    def disable_lora(self) -> None:
        """Have no adapter at work until `enable_lora`, or until others are loaded or chosen."""
        with turn():
            self.networks = self.networks.with_adapters([])

    def enable_lora(self) -> None:
        """Have the adapters at work again that were so before `disable_lora`."""
        with turn():
            self._choose(self._chosen)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters, whose memory is given back.

        Args:
            adapter_names: one, or several.

        Raises:
            InputError: there is no such adapter.
        """
        names = self._known("adapter_names", adapter_names)
        with turn():
            for name in names:
                del self._loaded[name]
            self._chosen = [one for one in self._chosen if one.adapter.name in self._loaded]
            if self.networks.adapters:
                self._choose(self._chosen)

    def unload_lora_weights(self) -> None:
        """Forget all adapters, whose memory is given back. Images are what they were before, bit for bit."""
        with turn():
            self._loaded.clear()
            self._choose([])

    def _choose(self, adapters: Sequence[AtWork]) -> None:
        """Have these at work, in memory."""
        self.networks = self.networks.with_adapters(adapters)
        self.networks.read_adapters()
        self._chosen = [*adapters]

    def _known(self, argument: str, given: str | Sequence[str]) -> list[str]:
        """Names of loaded adapters; InputError if one is none, or given twice."""
        names = texts(argument, given)
        for name in names:
            if name not in self._loaded or names.count(name) > 1:
                way = f"choose each once from {', '.join(self._loaded)}" if self._loaded else "none is loaded"
                raise InputError(f"{argument} has {name!r:.80}; {way}")
        return names

    def _free_name(self, wanted: str | None) -> str:
        """The name of the next adapter: `wanted`, or else a free one; InputError if that is taken."""
        if wanted in self._loaded:
            raise InputError(f"there is an adapter {wanted!r:.80} already; give another adapter_name")
        return wanted or next(name for number in count() if (name := f"default_{number}") not in self._loaded)


def _checked(scale: Any, steps: Any) -> tuple[float, tuple[int, int] | None]:
    """A scale and steps; InputError if they are none."""
    return checked_number("scale", scale, -MOST_SCALE, MOST_SCALE), _checked_steps(steps)


def _weights(given: Any, count: int) -> list[Any]:
    """What is given as the scale of each of so many adapters, or of all."""
    values = given.tolist() if isinstance(given, np.ndarray | mx.array) else given
    weights = list(values) if isinstance(values, list | tuple) else [values] * count
    if len(weights) != count:
        adapters = "1 adapter has" if count == 1 else f"{count} adapters have"
        raise InputError(f"{adapters} {len(weights)} weights; give one for each, or one for all")
    return weights


def _scale(adapter: Adapter, given: Any, parts: Sequence[str]) -> float:
    """The scale of an adapter of a model with these parts."""
    if not isinstance(given, Mapping):
        return _number(given)
    if unknown := [part for part in given if part not in parts]:
        raise InputError(f"adapter_weights has {unknown[0]!r:.40}, which is none of {', '.join(parts)}")
    scales = {part: _number(weight) for part, weight in given.items()}
    changed = {part: scales.get(part, 1.0) for part, layers in adapter.layers.items() if layers}
    if len({*changed.values()}) > 1:
        told = " and ".join(f"{part} by {scale:g}" for part, scale in changed.items())
        raise InputError(f"adapter_weights would have {adapter.name:.80} change {told}; give one scale for both")
    return next(iter(changed.values()), 1.0)


def _number(weight: Any) -> float:
    if isinstance(weight, str | bytes):
        raise InputError(f"adapter_weights must be numbers, got {weight!r:.60}")
    return checked_number("adapter_weights", 1.0 if weight is None else weight, -MOST_SCALE, MOST_SCALE)


def _checked_steps(steps: Any) -> tuple[int, int] | None:
    """`steps` itself; InputError if it is no first and last step."""
    if steps is None:
        return None
    whole = isinstance(steps, Sequence) and len(steps) == 2 and all(type(step) is int for step in steps)
    if not whole or not 1 <= steps[0] <= steps[1] <= MAX_STEPS:
        raise InputError(f"steps must be a first and a last one from 1 to {MAX_STEPS}, got {steps!r:.40}")
    return steps[0], steps[1]
