"""Which parts of a model the tensors of a source are, by their names, and how canonical tensors are made of them."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, takewhile
from typing import Any

import mlx.core as mx

from flux2_mlx.checkpoint import Component
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import FLOATS, TensorInfo, mismatches, raise_problems
from flux2_mlx.wording import told

from .dialects import AFTER, DIALECTS, DIFFUSERS_VAE, MLX_VAE, Dialect, Spelling, filled, matrix, templated, unpermute
from .formats import unreadable
from .parts import LAYOUT
from .rules import Rule, Shape, copy, moved
from .strangers import adapter_tensors, refusal

# Several times what any model of this family has, its quantized forms included.
MAX_TENSORS = 50_000
_MAX_NAME = 500
_GIVE = "give a transformer, a text encoder, a VAE or the whole model"
TEKKEN = "tekken_model"  # a tensor whose bytes are the tokenizer
_EMA = "model_ema."
_EXTRAS = (TEKKEN, "logit_scale", "decay", "num_updates")  # the last two of an average over training
_ANGLES = "rotary_emb.inv_freq"  # of positions, which the geometry gives
_WRAPPERS = r"(?:model_ema\.|module\.|_orig_mod\.|net\.)*"  # of training, of several devices, and of torch.compile
_PREFIXES = {part: re.compile(f"{_WRAPPERS}(?:{layout.prefix.pattern})?{_WRAPPERS}") for part, layout in LAYOUT.items()}
_UNDERSTOOD = {
    part: {
        template: [
            number for number, other in enumerate(DIALECTS) if other.part == part and template in other.canonical
        ]
        for dialect in DIALECTS
        if dialect.part == part
        for template in dialect.canonical
    }
    for part in LAYOUT
}


@dataclass(frozen=True)
class Reading:
    """A part of a model as it was found: `sources` are all tensors of it, by their full names."""

    dialect: Dialect
    prefix: str
    sources: dict[str, TensorInfo]

    @property
    def part(self) -> str:
        return self.dialect.part

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Dtype and shape of each canonical tensor that the sources make; sources that make none are `unknown`."""
        names = dict.fromkeys(filter(None, map(self.canonical, self.sources)))
        return {name: self._info(name) for name in names}

    @property
    def unknown(self) -> list[str]:
        """The tensors that have no place in the canonical naming."""
        return [name for name in self.sources if self.canonical(name) is None]

    @property
    def mixed(self) -> str | None:
        """What is said of a part that has some tensors in another naming or after another prefix; None: it has none."""
        known = next((name for name in self.sources if self.canonical(name)), "")
        for name in self.unknown:
            for other, prefix in ((DIALECTS[number], prefix) for number, prefix, _ in _candidates(name)):
                if other.part == self.part and other is not self.dialect:
                    return f"mixes namings: {known:.80} as of {self.dialect.name}, {name:.80} as of {other.name}"
                if other is self.dialect and self.prefix + name[len(prefix) :] not in self.sources:
                    where = f"after {prefix}" if prefix else "without a prefix"
                    return f"mixes prefixes: {known:.80}, and {name:.80} {where}"
        return None

    def rule(self, canonical: str, head_dim: int = 128) -> Rule:
        """How the canonical tensor is made of those of the source, which need not be there.

        Args:
            canonical: its name.
            head_dim: features of a head of the text encoder.
        """
        spelling, (first, *others) = self._spelled(canonical)
        if spelling.rule is unpermute:
            return unpermute(first, head_dim)
        if spelling.rule is matrix and first in self.sources and len(self.sources[first].shape) != 4:
            return copy(first)
        return spelling.rule(first, *others)

    def composed(self, rule: Rule, head_dim: int = 128) -> Rule:
        """`rule`, which reads one canonical tensor, turned into one that reads the source's tensors."""
        (canonical,) = rule.sources
        inner = self.rule(canonical, head_dim)
        return Rule(
            inner.sources,
            lambda *arrays: rule.apply(inner.apply(*arrays)),
            lambda shape: inner.source_shape(rule.source_shape(shape)),
            moved(inner, rule),
        )

    def rules_for(self, network: str, config: Any) -> Callable[[str, Shape], Rule]:
        """A function from the name and shape of a tensor of ours to the rule that makes it of the source's.

        Args:
            network: one of those that are made of the part.
            config: its geometry.
        """
        canonical = LAYOUT[self.part].rules[network](config)
        head_dim = getattr(config, "head_dim", 128)
        return lambda name, shape: self.composed(canonical(name, shape), head_dim)

    def check(self, configs: Mapping[str, Any], what: str) -> None:
        """Compare all tensors with those that networks of these geometries are made of.

        Raises:
            CheckpointError: some are missing, left over, of another shape or of a dtype that is not read; `what` is
                said to be wrong.
        """
        shapes = self.shapes(configs)
        expected = {name: TensorInfo(self._read_as(name), shape) for name, shape in shapes.items()}
        problems = mismatches(expected, self._kept(configs))
        if problems and (mixed := self.mixed):
            problems = [f"it {mixed}; fetch the file again, or give one that names all alike"]
        raise_problems(what, problems)

    def shapes(self, configs: Mapping[str, Any]) -> dict[str, Shape]:
        """The shapes of the source's tensors that networks of these geometries are made of, by their full names."""
        shapes: dict[str, Shape] = {}
        for network, config in configs.items():
            rule_for = self.rules_for(network, config)
            for name, tensor in Component(network, config, None, ()).infos.items():
                rule = rule_for(name, tensor.shape)
                shapes |= dict.fromkeys(rule.sources, rule.source_shape(tensor.shape))
        return shapes

    def _read_as(self, name: str) -> str:
        """The dtype that a tensor should have: its own, if that is read."""
        own = self.sources[name].dtype if name in self.sources else ""
        return own if own in FLOATS.values() else FLOATS[mx.bfloat16]

    def _kept(self, configs: Mapping[str, Any]) -> dict[str, TensorInfo]:
        """The tensors that have a place in our checkpoint, or no place at all, given the geometries of the networks."""
        is_dropped = LAYOUT[self.part].is_dropped
        config = configs[self.part]
        names = {name: self.canonical(name) for name in self.sources}
        return {
            name: self.sources[name]
            for name, canonical in names.items()
            if canonical is None or not is_dropped(canonical, config)
        }

    def canonical(self, name: str) -> str | None:
        """The canonical tensor that a tensor of the source makes, alone or with others; None if it makes none."""
        if not name.startswith(self.prefix):
            return None
        template, numbers = templated(name[len(self.prefix) :])
        ours = self.dialect.canonical.get(template)
        return None if ours is None else filled(ours, self._flipped(template, numbers))

    def _spelled(self, canonical: str) -> tuple[Spelling, tuple[str, ...]]:
        """How the source spells a canonical name, and the full names of its tensors. If none of them is there, the
        usual spelling."""
        template, numbers = templated(canonical)
        spellings = self.dialect.table.get(template, (Spelling((template,)),))
        full = [tuple(self._full(theirs, numbers) for theirs in spelling.templates) for spelling in spellings]
        found = (pair for pair in zip(spellings, full, strict=True) if not self.sources.keys().isdisjoint(pair[1]))
        return next(found, (spellings[0], full[0]))

    def _full(self, template: str, numbers: list[int]) -> str:
        return self.prefix + filled(template, self._flipped(template, numbers))

    def _flipped(self, template: str, numbers: list[int]) -> list[int]:
        return [self._last_level - numbers[0], *numbers[1:]] if self.dialect.is_flipped(template) else numbers

    @cached_property
    def _last_level(self) -> int:
        """The number of the last level of the VAE's decoder."""
        templates = (templated(name.removeprefix(self.prefix)) for name in self.sources)
        return max((numbers[0] for template, numbers in templates if self.dialect.is_flipped(template)), default=0)

    def _info(self, canonical: str) -> TensorInfo:
        rule = self.rule(canonical)
        source = next(self.sources[name] for name in rule.sources if name in self.sources)
        if len(rule.sources) > 1:
            return TensorInfo(source.dtype, (*(len(rule.sources) * n for n in source.shape[:1]), *source.shape[1:]))
        after = AFTER.get(self._spelled(canonical)[0].rule)
        return source if after is None else replace(source, shape=after(source.shape))


def read(infos: Mapping[str, TensorInfo], what: str) -> dict[str, Reading]:
    """The parts of a model that these tensors are of, each with its dialect.

    Every tensor is put into one of the parts, even if it has no place there, unless it is known to be no weight.

    Args:
        infos: the tensors of one file, or of all that belong together.
        what: the source, for errors.

    Raises:
        CheckpointError: they are of no FLUX.2 model; what they are is said if it is known.
    """
    check_size(infos, what)
    if mixed := adapted(infos):
        raise CheckpointError(f"{what} holds {' and '.join(mixed)}")
    if known := refusal(infos):
        raise CheckpointError(f"{what} is {known}")
    if how := unreadable(infos, {}):
        raise CheckpointError(f"{what} is {how}")
    names = [name for name in infos if not is_extra(name)]
    found = _recognised(names)
    _check_average(names, found, what)
    if not found:
        _check_prefix(names, what)
        first = ", ".join(f"{name:.60}" for name in sorted(names)[:3])
        raise CheckpointError(f"{what} holds no FLUX.2 model, but {first or 'no tensors'}; {_GIVE}")
    sources: dict[str, dict[str, TensorInfo]] = {part: {} for part in found}
    for name in names:
        sources[_home(name, found)][name] = infos[name]
    return {part: Reading(_ordered(*key, infos), key[1], sources[part]) for part, key in found.items()}


def adapted(infos: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """What is said of a model among whose tensors are some of an adapter, and of these; None if it is none."""
    own = adapter_tensors(infos)
    found = _recognised(sorted(infos.keys() - {*own})) if own else {}
    if not found or 2 * len(own) > len(infos):  # an adapter may have a few whole layers
        return None
    advice = "which are not applied here; save it without them, and give the adapter in a file of its own"
    ordered = [part for part in LAYOUT if part in found]
    return f"the {told(ordered)} of a FLUX.2 model", f"{len(own)} tensors of an adapter, {min(own):.60} first, {advice}"


def _check_average(names: list[str], found: Mapping[str, tuple[Dialect, str]], what: str) -> None:
    """CheckpointError if there is an average over training beside other weights, or in names that do not tell it."""
    averaged = [name for name in names if name.startswith(_EMA)]
    if averaged and len(averaged) < len(names):
        raise CheckpointError(f"{what} holds weights twice, the second time after {_EMA}; give a file of one of them")
    if averaged and not found:
        raise CheckpointError(
            f"{what} holds {averaged[0]:.60}, whose name after {_EMA} is of no FLUX.2 model; save it by its own names"
        )


def _check_prefix(names: list[str], what: str) -> None:
    """CheckpointError if names are understood without what all of them begin with, which may tell that they are no
    weights, such as an optimizer's state."""
    ends = zip(*(name.split(".") for name in (min(names, default=""), max(names, default=""))), strict=False)
    for prefix in accumulate(f"{one}." for one, _ in takewhile(lambda pair: pair[0] == pair[1], ends)):
        if found := _recognised([name[len(prefix) :] for name in names]):
            raise CheckpointError(
                f"{what} holds the {told(found)} of a FLUX.2 model after {prefix[:60]!r}, which no known tool writes; "
                "if these are its weights, save them without that"
            )


def check_size(infos: Mapping[str, TensorInfo], what: str) -> None:
    """CheckpointError if there are more tensors, or longer names, than any FLUX.2 model has."""
    if len(infos) > MAX_TENSORS:
        raise CheckpointError(f"{what} holds {len(infos)} tensors, more than any FLUX.2 model has")
    if (length := max(map(len, infos), default=0)) > _MAX_NAME:
        raise CheckpointError(f"{what} holds a tensor with a name of {length} characters; no FLUX.2 model does")


def is_extra(name: str) -> bool:
    """Whether a tensor is known to lie beside a model's weights without being one of them."""
    prefix, _, last = name.rpartition(".")
    is_top = not prefix or any(start.fullmatch(f"{prefix}.") for start in _PREFIXES.values())
    return (last in _EXTRAS and is_top) or name.endswith(_ANGLES)


def _recognised(names: list[str]) -> dict[str, tuple[Dialect, str]]:
    """For each part that is there the dialect and the prefix that most of its names have."""
    counts: Counter[tuple[int, str]] = Counter()
    proven: set[tuple[int, str]] = set()
    for name in names:
        for number, prefix, template in _candidates(name):
            counts[number, prefix] += 1
            if template in DIALECTS[number].proof:
                proven.add((number, prefix))
    found: dict[str, tuple[Dialect, str]] = {}
    for number, prefix in sorted(proven, key=lambda key: (-counts[key], key)):
        found.setdefault(DIALECTS[number].part, (DIALECTS[number], prefix))
    return found


def _ordered(dialect: Dialect, prefix: str, infos: Mapping[str, TensorInfo]) -> Dialect:
    """The dialect itself or, of a VAE in diffusers' names whose convolutions have their inputs last, MLX's."""
    info = infos.get(f"{prefix}decoder.conv_in.weight")
    is_last = info is not None and len(info.shape) == 4 and info.shape[1:3] == (3, 3) and info.shape[3] != 3
    return MLX_VAE if dialect is DIFFUSERS_VAE and is_last else dialect


def _candidates(name: str) -> Iterator[tuple[int, str, str]]:
    """The numbers of the dialects in which a name may be, each with its prefix and template."""
    for part, start in _PREFIXES.items():
        match = start.match(name)
        for prefix in {"", match[0] if match else ""}:
            template, _ = templated(name[len(prefix) :])
            for number in _UNDERSTOOD[part].get(template, ()):
                yield number, prefix, template


def _home(name: str, found: Mapping[str, tuple[Dialect, str]]) -> str:
    """The part that a name belongs to: where it is understood, or else where its prefix leads, or the first."""

    def fit(part: str) -> tuple[bool, bool, int]:
        dialect, prefix = found[part]
        starts = name.startswith(prefix)
        known = starts and templated(name[len(prefix) :])[0] in dialect.canonical
        return known, starts, len(prefix)

    return max(found, key=fit)
