"""Packed weights: what all formats of them have in common."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType

import mlx.core as mx

from flux2_mlx.copying import FileVersion, Range
from flux2_mlx.weights import Files, TensorInfo, Tensors, evaluated

Shapes = Mapping[str, tuple[int, ...]]
NO_SHAPES: Shapes = MappingProxyType({})


@dataclass(frozen=True)
class Packed:
    """How a weight is made from what is stored of it.

    Attributes:
        kind: the format, as users know it, such as `fp8`.
        sources: the names of the stored tensors that it takes.
        info: what it is then, in float32.
        unpack: makes it from the arrays of `sources`, exactly as the format defines it.
        unused: names of stored tensors that belong to it and are not needed, such as scales of activations.
    """

    kind: str
    sources: tuple[str, ...]
    info: TensorInfo
    unpack: Callable[..., mx.array]
    unused: tuple[str, ...] = ()


class Unpacked:
    """Tensors with plain weights in place of `packed` ones, by the names of the weights."""

    def __init__(self, tensors: Tensors, packed: Mapping[str, Packed]):
        self._tensors = tensors
        self._packed = packed
        taken = {name for weight in packed.values() for name in (*weight.sources, *weight.unused)}
        left = {name: info for name, info in tensors.infos.items() if name not in taken}
        self.infos: Mapping[str, TensorInfo] = left | {name: weight.info for name, weight in packed.items()}

    @property
    def kinds(self) -> dict[str, str]:
        """The format of each packed weight, by its name."""
        return {name: weight.kind for name, weight in self._packed.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Stored bytes of each packed weight, by its name; what several share counts for the first one."""
        counted: set[str] = set()
        sizes = {}
        for name, weight in self._packed.items():
            stored = {*weight.sources, *weight.unused} - counted
            sizes[name] = sum(self._tensors.infos[x].nbytes for x in stored)
            counted |= stored
        return sizes

    def range_of(self, name: str) -> Range | None:
        """Where the bytes of a tensor are that is stored plainly in a file."""
        return self._tensors.range_of(name) if name not in self._packed and isinstance(self._tensors, Files) else None

    @property
    def versions(self) -> list[FileVersion]:
        """The files whose headers were read."""
        return self._tensors.versions if isinstance(self._tensors, Files) else []

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        names = list(names)
        stored = self._tensors.read(source for name in names for source in self._sources(name))
        for name in names:
            yield self._made(name, islice(stored, len(self._sources(name))))

    def _made(self, name: str, stored: Iterable[mx.array]) -> mx.array:
        """A tensor, made from its `stored` ones, of which none is kept."""
        weight = self._packed.get(name)
        return next(iter(stored)) if weight is None else weight.unpack(*evaluated(stored))

    def _sources(self, name: str) -> tuple[str, ...]:
        return self._packed[name].sources if name in self._packed else (name,)
