"""Adapters (LoRA and its kin) of a pipeline, loaded and chosen as diffusers spells it."""

import logging
import os
from collections.abc import Sequence
from itertools import count
from typing import Any

from .arguments import checked_number, kinds, named, texts
from .branches import AtWork
from .device import begin_computing
from .errors import InputError
from .metering import turn
from .networks import Networks
from .request import MAX_STEPS
from .store import open_adapter

_MOST = 1000.0  # times what an adapter changes
_log = logging.getLogger(__name__)


class LoraMethods:
    """Adapters run beside the layers, whose weights stay as they are. All that are at work add up."""

    networks: Networks
    _loaded: dict[str, AtWork]

    @named
    def load_lora_weights(
        self,
        source: str | os.PathLike[str],
        weight_name: str | None = None,
        adapter_name: str | None = None,
        scale: float = 1.0,
        steps: tuple[int, int] | None = None,
    ) -> None:
        """Load an adapter and have it at work, beside those that are.

        Args:
            source: a safetensors file, or a folder as trainers save adapters.
            weight_name: the file's name in the folder, where that holds several.
            adapter_name: what it is called from here on; None: `default_0`, and so on.
            scale: of what it changes; negative: the opposite.
            steps: the first and the last step of a run that it works in, counted from 1; None: in all. What it changes
                of the text encoder, if anything, is at work in any case.

        Raises:
            InputError: a setting is wrong, or the name is taken. CheckpointError: it is damaged, or for another model.
        """
        if not isinstance(source, str | os.PathLike):
            raise InputError(f"an adapter is named by a text or a path, not by {type(source).__name__}")
        kinds(weight_name=(weight_name, str), adapter_name=(adapter_name, str))
        name = self._free_name(adapter_name)
        scale, steps = checked_number("scale", scale, -_MOST, _MOST), _checked_steps(steps)
        found, checkpoint = open_adapter(source, weight_name), self.networks.checkpoint
        configs = {part: component.config for part, component in checkpoint.components.items()}
        found.check(configs, checkpoint.variant.name)
        for note in found.notes(configs, checkpoint.variant.name):
            _log.warning("%s: %s", os.fspath(source), note)
        with turn():
            begin_computing()
            adapter = found.load(configs, name, os.fspath(source)).cast(self.networks.dtype_of)
            self._loaded[name] = AtWork(adapter, scale, steps)
            self.networks = self.networks.with_adapters([*self.networks.adapters, self._loaded[name]])

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Have these of the loaded adapters at work and no others, each in the steps that it was loaded for.

        Args:
            adapter_names: one, or several.
            adapter_weights: the scale of each, or one for all; None: 1.

        Raises:
            InputError: there is no such adapter, or there are more or fewer weights.
        """
        names = texts("adapter_names", adapter_names)
        weights = 1.0 if adapter_weights is None else adapter_weights
        scales = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
        if len(scales) != len(names):
            raise InputError(f"{len(names)} adapters have {len(scales)} weights; give one for each, or one for all")
        for name in names:
            if name not in self._loaded or names.count(name) > 1:
                raise InputError(f"adapter_names has {name!r:.80}; choose each once from {', '.join(self._loaded)}")
        scales = [checked_number("adapter_weights", scale, -_MOST, _MOST) for scale in scales]
        chosen = [
            AtWork(self._loaded[name].adapter, scale, self._loaded[name].steps)
            for name, scale in zip(names, scales, strict=True)
        ]
        with turn():
            self.networks = self.networks.with_adapters(chosen)

    def get_active_adapters(self) -> list[str]:
        """The names of those at work."""
        return [one.adapter.name for one in self.networks.adapters]

    def unload_lora_weights(self) -> None:
        """Forget all adapters, whose memory is given back. Images are what they were before, bit for bit."""
        with turn():
            self._loaded.clear()
            self.networks = self.networks.with_adapters([])

    def _free_name(self, wanted: str | None) -> str:
        """What the next adapter is called; InputError if that is taken."""
        if wanted in self._loaded:
            raise InputError(f"there is an adapter {wanted!r:.80} already; give another adapter_name")
        return wanted or next(name for number in count() if (name := f"default_{number}") not in self._loaded)


def _checked_steps(steps: Any) -> tuple[int, int] | None:
    """`steps` itself; InputError if it is no first and last step."""
    if steps is None:
        return None
    whole = isinstance(steps, Sequence) and len(steps) == 2 and all(type(step) is int for step in steps)
    if not whole or not 1 <= steps[0] <= steps[1] <= MAX_STEPS:
        raise InputError(f"steps must be a first and a last one from 1 to {MAX_STEPS}, got {steps!r:.40}")
    return steps[0], steps[1]
