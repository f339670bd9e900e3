"""An adapter's file as its header tells it: what it is, which model it is for, and what becomes of each tensor."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import file_digest, sha256
from io import BufferedReader
from pathlib import Path
from typing import cast

from flux2_mlx.adapters import Adapter, Layers, Placed
from flux2_mlx.config import VARIANTS, Config
from flux2_mlx.errors import CheckpointError
from flux2_mlx.json_files import open_model_file
from flux2_mlx.weights import Files, TensorInfo, Tensors, evaluated, raise_problems
from flux2_mlx.wording import some

from ..formats import Packed, Unpacked, fp8
from ..geometry import choose, titles
from ..naming import check_size
from ..others import other_model
from ..strangers import FLUX1, adapter
from .changes import changes, outlined, scale
from .folder import CONFIG_ASIDE, CONFIG_MISSING, PEFT_MODEL, config_beside, find_file, names_beside
from .keys import LORA, Module, check_run, is_of_training, modules, whole
from .places import TEXT, TRANSFORMER, Place, layer_shapes, place
from .presets import Preset, preset
from .settings import ALPHA, DIFFUSERS, Settings, Strength, settings
from .shapes import Factors

_MAGNITUDE = ".dora_scale"
_UNSCALED = {"diff_b", "magnitude"}  # what alpha does not scale
_SHORT = 16  # digits of a hash
_MAX_TENSORS = 10_000  # several times what all layers of the largest model take, in the most factors
_NO_LAYER = "no layer that can be adapted"
_TRAINING = "training only"
_UNREAD = "a layer of the text encoder whose states no image is made of"


@dataclass(frozen=True)
class AdapterFile:
    """What a file of an adapter is. Nothing but its header has been read.

    Attributes:
        path: the file.
        said: what it says of itself.
        modules: those that change a layer of FLUX.2, by their names there.
        places: which layer of ours each of them is.
        unknown: all other tensors.
        files: the tensors as they are stored.
        packed: how those of 8 bits are made, by their names.
        has_config: whether `said` is what PEFT's config beside it says.
        is_config_aside: whether there is such a config that is not taken, as it may be about another file.
    """

    path: Path
    said: Settings
    modules: Mapping[str, Module]
    places: Mapping[str, Place]
    unknown: tuple[str, ...]
    files: Files
    packed: Mapping[str, Packed]
    has_config: bool = False
    is_config_aside: bool = False

    @cached_property
    def tensors(self) -> Tensors:
        """The tensors as numbers that are computed with."""
        return Unpacked(self.files, self.packed) if self.packed else self.files

    @property
    def kinds(self) -> tuple[str, ...]:
        """`LoRA`, `LoKr`, `LoHa`, `full difference`, and `DoRA` where magnitudes are changed too; mostly one."""
        kinds = dict.fromkeys(module.kind for module in self.modules.values() if module.kind)
        return (*kinds, *(["DoRA"] if any("magnitude" in x.keys for x in self.modules.values()) else []))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those of all modules, each once, the smallest first."""
        return tuple(sorted({factors.rank for factors in self._factors.values() if factors.rank is not None}))

    @cached_property
    def naming(self) -> str:
        """Who names layers so: `diffusers`, `the original release`, or `kohya`, which has underscores for dots."""
        found = adapter(self.tensors.infos)
        return "kohya" if all("." not in x for x in self.modules) else found.naming if found else "the original release"

    @cached_property
    def models(self) -> tuple[str, ...]:
        """The models of the table that have all of its layers."""
        rows = VARIANTS.items()
        geometries = {name: {TRANSFORMER: row.transformer, TEXT: row.text} for name, row in rows}
        return tuple(name for name, configs in geometries.items() if not self._misfits(configs))

    @cached_property
    def trained_on(self) -> str | None:
        """The model of the table that its trainer names, where that is one of `models`; None: it names none."""
        hints = (*self.said.bases, *titles({}, self.path.name))
        try:
            return choose([VARIANTS[name] for name in self.models], hints, None, "").name
        except CheckpointError:
            return None

    @property
    def preset(self) -> Preset | None:
        """What it is made to be run with, by a file beside it or its model card; CheckpointError if that is wrong."""
        return preset(self.path, self.said.title)

    @cached_property
    def sha256(self) -> str:
        """The hash of the whole file."""
        with open_model_file(self.path) as file:
            return file_digest(cast("BufferedReader", file), "sha256").hexdigest()

    @cached_property
    def config_hash(self) -> str | None:
        """A short hash of what its changes are multiplied by, where the config beside it makes that other than the file
        by itself is; None: it does not. With `sha256` it tells what the adapter does. CheckpointError as `scales`."""
        if not self.has_config:
            return None
        scales = self.scales()
        try:
            alone = replace(self, said=settings(self.files.metadata, None)).scales()
        except CheckpointError:
            alone = {}
        return None if scales == alone else sha256(json.dumps(scales, sort_keys=True).encode()).hexdigest()[:_SHORT]

    def scales(self) -> dict[str, float]:
        """What the changes of each module are multiplied by, alpha over rank mostly. Only these numbers are read.

        Raises:
            CheckpointError: a config says another rank.
        """
        named = {name: module.keys["alpha"] for name, module in self.modules.items() if "alpha" in module.keys}
        alphas = dict(zip(named, evaluated(self.tensors.read(named.values())), strict=True))
        strengths = {name: self.said.strengths[where.network] for name, where in self.places.items()}
        try:
            return {name: scale(x, strengths[name], alphas.get(name)) for name, x in self._factors.items()}
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def check(self, configs: Mapping[str, Config], model: str) -> None:
        """CheckpointError unless networks of these geometries, those of `model`, have all layers, and use some."""
        if not (misfits := self._misfits(configs)):
            if not any(self._is_used(name, configs) for name in self.modules):
                raise CheckpointError(f"{self.path} changes no layer that images are made with")
            return
        others = [name for name in self.models if name != model] or ([FLUX1] if self._may_be_flux1 else [])
        if others:
            fits = " or ".join(others)
            raise CheckpointError(
                f"{self.path} is a {self._kind} for {fits}, which can't be used with {model}; give another"
            )
        raise_problems(f"{self.path} is a {self._kind} of another model than {model}", misfits)

    def fates(self, configs: Mapping[str, Config]) -> dict[str, str]:
        """What becomes of each tensor: the layer of ours that it changes, or why it is not used, in brackets."""
        fates = {key: f"({_TRAINING if is_of_training(key) else _NO_LAYER})" for key in self.tensors.infos}
        for name, module in self.modules.items():
            told = str(self.places[name]) if self._is_used(name, configs) else f"({_UNREAD})"
            fates |= dict.fromkeys(module.keys.values(), told)
        for name, one in self.packed.items():
            fates |= dict.fromkeys((*one.sources, *one.unused), fates[name])
        return fates

    def notes(self, configs: Mapping[str, Config], model: str) -> list[str]:
        """What a user should know who uses it with `model`: a sentence each, without a full stop."""
        unread = [module for name, module in self.modules.items() if not self._is_used(name, configs)]
        others = [key for key in self.unknown if not is_of_training(key)]
        belong = "belongs" if len(others) == 1 else "belong"
        notes = [f"it has {_listed(others)}, which {belong} to {_NO_LAYER}"] if others else []
        if of_training := [key for key in self.unknown if is_of_training(key)]:
            notes.append(f"it has {_listed(of_training)}, which nothing but training uses")
        if unread:
            keys = [key for module in unread for key in module.keys.values()]
            notes.append(f"it has {_listed(keys)}, of layers of the text encoder whose states no image is made of")
        if self.is_config_aside:
            notes.append(CONFIG_ASIDE)
        if self._lacks_config:
            notes.append(CONFIG_MISSING)
        whole = any(_UNSCALED & module.keys.keys() for module in self.modules.values())
        if not whole and not any(self.scales().values()):
            notes.append("it changes nothing, as its alpha is 0")
        if self.models and self._may_be_flux1:
            notes.append(f"it may be for {FLUX1}, which has layers of the same sizes")
        if self.trained_on and self.trained_on != model:
            notes.append(f"it was trained on {self.trained_on}, whose layers are those of {model}")
        return notes

    def load(self, configs: Mapping[str, Config], name: str, source: str = "", origin: str | None = None) -> Adapter:
        """Read it.

        Args:
            configs: the geometries of the networks that it is for, which `check` has seen.
            name: what the adapter is to be called.
            source: as it was asked for.
            origin: the repo and file of the Hub that it comes from, if it does.

        Raises:
            CheckpointError: values that are not finite, a config that says another rank, or a file that has changed.
        """
        layers = self._layers(self.read(self._used(configs)))
        return Adapter(name, layers, source or str(self.path), self.sha256, origin, self.config_hash)

    def outline(self, configs: Mapping[str, Config], name: str) -> Adapter:
        """What `load` would give, with arrays that are never computed: it takes no memory, but says how much would be
        taken."""
        return Adapter(name, self._layers(self._outlined(self._used(configs))))

    def _used(self, configs: Mapping[str, Config]) -> list[str]:
        return [name for name in self.modules if self._is_used(name, configs)]

    def _layers(self, modules: Iterable[tuple[str, list[Placed]]]) -> dict[str, Layers]:
        """What modules change, by network and layer."""
        layers: dict[str, dict[str, tuple[Placed, ...]]] = {}
        for module, found in modules:
            where = self.places[module]
            placed = layers.setdefault(where.network, {}).setdefault(where.layer, ())
            layers[where.network][where.layer] = (*placed, *found)
        return {**layers}

    def _outlined(self, names: Iterable[str]) -> Iterator[tuple[str, list[Placed]]]:
        for name in names:
            factors = self._factors[name]
            where = self.places[name]
            rows = where.rows(factors.outputs)
            yield name, [Placed(x, rows) for x in outlined(factors, is_swapped=where.is_swapped)]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, list[Placed]]]:
        """The changes of each of these modules, by its name, in memory; CheckpointError as `load` has it."""
        names = list(names)
        arrays = evaluated(self.tensors.read([key for name in names for key in self.modules[name].keys.values()]))
        for name in names:
            factors = self._factors[name]
            where = self.places[name]
            found = {role: next(arrays) for role in self.modules[name].keys}
            try:
                made = changes(factors, self.said.strengths[where.network], found, is_swapped=where.is_swapped)
            except CheckpointError as error:
                raise CheckpointError(f"{self.path}: {error}") from error
            rows = where.rows(factors.outputs)
            yield name, [Placed(x, rows) for x in made]

    @cached_property
    def _factors(self) -> dict[str, Factors]:
        return {name: Factors(module, self.tensors.infos) for name, module in self.modules.items()}

    @property
    def _lacks_config(self) -> bool:
        """Whether nothing says how strong a file of PEFT is, which has that beside it."""
        factors = [one for one in self._factors.values() if one.rank is not None]
        is_told = self.has_config or {DIFFUSERS, ALPHA} & self.files.metadata.keys()
        is_of_peft = PEFT_MODEL in (self.path.name, self.path.resolve().name)
        return is_of_peft and not is_told and any("alpha" not in one.module.keys for one in factors)

    @cached_property
    def _may_be_flux1(self) -> bool:
        found = adapter(self.tensors.infos)
        return found is not None and FLUX1 in found.models

    @property
    def _kind(self) -> str:
        return " and ".join(self.kinds) or "change of biases"

    def _is_used(self, name: str, configs: Mapping[str, Config]) -> bool:
        where = self.places[name]
        return where.network in configs and where.layer in layer_shapes(where.network, configs[where.network])

    def _misfits(self, configs: Mapping[str, Config]) -> list[str]:
        """A line for each module that networks of these geometries have no such layer for."""
        lines = []
        for name, where in self.places.items():
            want = where.shape(configs)
            if want is None and where.network == TEXT:  # which has been cut after the layers that are needed
                want = _first(where).shape(configs)
            elif want is None:
                lines.append(f"{name} is of no layer that it has")
            factors = self._factors[name]
            if want is not None and (factors.outputs != want[0] or factors.inputs not in (want[1], None)):
                swapped = " and its factors may be transposed" * (factors.rank == want[0] == want[1])
                lines.append(
                    f"{name} is for a layer of {[factors.outputs, factors.inputs]} instead of {list(want)}{swapped}"
                )
        return lines


def read_adapter(
    source: Path,
    weight_name: str | None = None,
    bases: Sequence[str] = (),
    beside: Callable[[Path], Collection[str]] = names_beside,
) -> AdapterFile:
    """What the adapter in a file, or in a folder that holds one, is. Nothing but headers is read.

    Args:
        source: a safetensors file, or a folder as PEFT and diffusers save adapters.
        weight_name: the file's name in the folder, where it holds several.
        bases: what it was trained on, as far as its model card says it.
        beside: gives the names of all files that are in the file's folder where it comes from.

    Raises:
        CheckpointError: there is none, it is damaged, or it is none for FLUX.2; what it is is said if it is known.
    """
    path = find_file(source, weight_name)
    files = Files([path])
    check_size(files.infos, str(path))
    if len(files.infos) > _MAX_TENSORS:
        raise CheckpointError(f"{path} holds {len(files.infos)} tensors, more than any adapter has")
    config, is_aside = config_beside(path, files.metadata, beside(path))
    try:
        packed = _packed(files)
        infos = Unpacked(files, packed).infos
        found, others = modules(infos)
        check_run(others)
        places = {name: where for name in found if (where := place(name))}
        _check_model(infos, found, places)
        _check_understood(others, places)
        said = settings(files.metadata, config)
        said = replace(said, bases=(*said.bases, *bases))
        factors = [Factors(found[name], infos) for name in places]
        for one in factors:
            one.module.check()
            one.check()
            _check_config(one.module, said.strengths[places[one.module.name].network])
        _check_once(places)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    unplaced = [key for name in found if name not in places for key in found[name].keys.values()]
    known = {name: found[name] for name in places}
    unknown = (*unplaced, *others)
    return AdapterFile(path, said, known, places, unknown, files, packed, config is not None, is_aside)


def _packed(files: Files) -> dict[str, Packed]:
    """How factors of 8 bits become numbers; CheckpointError if one of them lacks its scale."""
    if all(info.dtype not in fp8.LARGEST for info in files.infos.values()):
        return {}
    # The magnitudes of DoRA are called scales, which would have all factors need one.
    infos = {name: info for name, info in files.infos.items() if not name.endswith(_MAGNITUDE)}
    return fp8.packed(infos, files.metadata)


def _check_model(infos: Mapping[str, TensorInfo], found: Mapping[str, Module], places: Mapping[str, Place]) -> None:
    """CheckpointError if modules are of another model, or none is of FLUX.2."""
    if other := other_model(infos if not found else [name for name in found if name not in places]):
        raise CheckpointError(f"it is an adapter for {other}; give one for FLUX.2")
    if not places:
        first = ", ".join(f"{name:.80}" for name in sorted(infos)[:3])
        raise CheckpointError(f"it holds no change of a layer of FLUX.2, but {first or 'no tensors'}; give an adapter")


def _check_understood(others: Iterable[str], places: Mapping[str, Place]) -> None:
    """CheckpointError if a tensor is a layer's whole weight, or its meaning is not known and its layer is changed."""
    for key in others:
        if is_of_training(key):
            continue
        if (module := whole(key)) and place(module):
            raise CheckpointError(
                f"{key:.200} holds a whole weight of {module:.80} (modules_to_save), which is not read; "
                "save the adapter without modules_to_save"
            )
        if any(key[: dot.start()] in places for dot in re.finditer(r"\.", key)):
            raise CheckpointError(f"{key} is not understood, and belongs to a layer that is changed")


def _check_config(module: Module, strength: Strength) -> None:
    """CheckpointError if a LoRA lacks what the config says that all have."""
    if module.kind == LORA and (missing := sorted(strength.roles - module.keys.keys())):
        raise CheckpointError(
            f"{module.name} has no {' and '.join(missing)}, which its config says all have; fetch the adapter again"
        )


def _check_once(places: Mapping[str, Place]) -> None:
    """CheckpointError if two modules change the same outputs."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name, where in places.items():
        for other in layers.setdefault((where.network, where.layer), []):
            if where.overlaps(places[other]):
                raise CheckpointError(f"{other} and {name} are the same layer in two spellings; remove one of them")
        layers[where.network, where.layer].append(name)


def _first(where: Place) -> Place:
    """The same of the first layer."""
    _, _, rest = where.layer.split(".", 2)
    return Place(where.network, f"layers.0.{rest}")


def _listed(names: Iterable[str]) -> str:
    return some([f"{name:.80}" for name in names], 3)
