"""How much memory a run needs phase by phase, and what fits. Pure: what networks take is asked of their costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add
from typing import Any

import mlx.core as mx

from .components import EVERY_RUN, in_phase
from .config import Variant
from .loading import Footprint
from .transformer import PLAIN, Execution
from .vae import STRIP_BYTES

# Small images share a pass up to this many image tokens, those of one of 1024×1024. Larger passes need more memory and
# are no faster: on a CPU an image costs the same from 512 tokens on, as parts of `TOKENS_PER_PART` stay in its cache.
_TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Workload:
    """What a run makes.

    Attributes:
        width, height: pixels of an image.
        length: tokens of a prompt.
        references: width and height in pixels of each picture that the model sees.
        prompts, images: how many there are; prompts that are the same count once.
        previews, previewing: whether the VAE makes images between the steps, and bytes that another way of it takes.
        negatives: how many negative prompts there are, which only classifier-free guidance reads.
        on_canvas: whether the first reference is what is painted over, which has the size of the image.
        caches: how many step caches there are of each image.
    """

    width: int
    height: int
    length: int
    references: tuple[tuple[int, int], ...] = ()
    prompts: int = 1
    images: int = 1
    previews: bool = False
    negatives: int = 1
    on_canvas: bool = False
    caches: int = 0
    previewing: int = 0

    def image_tokens(self, token_size: int) -> int:
        """Tokens of one image, each of `token_size`×`token_size` pixels."""
        return (self.width // token_size) * (self.height // token_size)

    def reference_tokens(self, token_size: int) -> int:
        """Tokens of all references."""
        return sum(width * height for width, height in self.references) // token_size**2


@dataclass(frozen=True)
class Writing:
    """What a language model does at a time: it reads `tokens`, of text and of images with so many `pixels` each, and
    writes up to `answer` more."""

    tokens: int
    answer: int
    pixels: tuple[int, ...] = ()


@dataclass(frozen=True)
class PhasePlan:
    """What a phase of a run is expected to hold in memory, in bytes.

    Attributes:
        weights: of networks, adapters, and all else that stays as it is.
        activations: what is computed, at its peak.
        resident: how many blocks of the network stay in memory, the first ones.
        streamed: weights of the other blocks, which are read from disk at every pass.
    """

    name: str
    weights: int
    activations: int
    resident: int = 0
    streamed: int = 0

    @property
    def peak_memory(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True)
class Plan:
    """What a run is expected to hold in memory.

    Attributes:
        phases: one after the other. Each has only its own networks in memory, but for what the next two say.
        limit: bytes that there are.
        beside: whether images are decoded while others are denoised, with the networks of both in memory.
        longest: operations that the device is given at one time, at most. It can't be interrupted in them.
        kept: the networks that stay in memory after their phases, which the weights of all phases include.
        execution: how a pass of the transformer is computed.
        strip_bytes: what the VAE may allocate for one strip.
        work: what the run makes.
    """

    phases: tuple[PhasePlan, ...]
    limit: int
    beside: bool = False
    longest: int = 0
    kept: tuple[str, ...] = ()
    execution: Execution = PLAIN
    strip_bytes: int = STRIP_BYTES
    work: Workload | Writing | None = None

    @property
    def worst(self) -> PhasePlan:
        return max(self.phases, key=lambda phase: phase.peak_memory)

    @property
    def peak_memory(self) -> int:
        return self.worst.peak_memory

    @property
    def fits(self) -> bool:
        return self.peak_memory <= self.limit

    def phase(self, name: str) -> PhasePlan:
        return next(phase for phase in self.phases if phase.name == name)

    def only(self, name: str) -> "Plan":
        """The plan of one phase by itself."""
        return replace(self, phases=(self.phase(name),))

    def networks(self, phase: str) -> tuple[str, ...]:
        """The names of the networks that are in memory for a phase."""
        return EVERY_RUN if self.beside and phase in EVERY_RUN else in_phase(phase)

    def keeping(self, weights: Mapping[str, int], there: Sequence[str] = ()) -> "Plan":
        """The plan where networks stay in memory after their phases, as many as fit beside every phase.

        Args:
            weights: bytes of networks that may stay, those first that are worth most. One that is streamed can't.
            there: the names of those that are in memory now. Others stay only if this run has use for them.
        """
        wanted = {name for phase in self.phases for name in self.networks(phase.name)}.union(there)
        streamed = {name for phase in self.phases if phase.streamed for name in self.networks(phase.name)}
        kept: dict[str, int] = {}
        for name, nbytes in weights.items():
            more = kept | {name: nbytes}
            if name in wanted - streamed and self._fits_with(more):
                kept = more
        phases = [replace(phase, weights=phase.weights + self._besides(phase, kept)) for phase in self.phases]
        return replace(self, phases=tuple(phases), kept=tuple(kept))

    def _fits_with(self, kept: Mapping[str, int]) -> bool:
        return all(phase.peak_memory + self._besides(phase, kept) <= self.limit for phase in self.phases)

    def _besides(self, phase: PhasePlan, kept: Mapping[str, int]) -> int:
        """Bytes of what is kept besides the networks of a phase."""
        return sum(nbytes for name, nbytes in kept.items() if name not in self.networks(phase.name))


@dataclass(frozen=True)
class WritingNeeds:
    """What writing text takes, whatever the limit. As for `Needs`, but the costs are a `TextCost` of the language model
    and a `VisionCost` of its eyes."""

    networks: Mapping[str, Footprint]
    costs: Mapping[str, Any]
    work: Writing
    always: int = 0

    def plan(self, limit: int) -> Plan:
        """What it holds where as much as fits into `limit` bytes stays in memory."""
        longest = self.costs["language_model"].longest_read(self.work.tokens)
        activations = {}
        if self.work.pixels:
            longest = max(longest, self.costs["vision"].longest(max(self.work.pixels)))
            activations["vision"] = self._seeing
        activations["language_model"] = self._writing
        return replace(_in_turn(self.networks, activations, self.always, limit), longest=longest, work=self.work)

    @property
    def _features(self) -> int:
        return self.costs["vision"].features(sum(self.work.pixels)) if self.work.pixels else 0

    @property
    def _seeing(self) -> int:
        model = _weights(self.networks, "vision")
        return self.costs["vision"].seeing(max(self.work.pixels), model.widened) + self._features

    @property
    def _writing(self) -> int:
        text = self.costs["language_model"]
        model = _weights(self.networks, "language_model")
        reading = max(text.reading(self.work.tokens, model.widened), model.loading)
        features = self._features + (text.embeddings(self.work.tokens) if self.work.pixels else 0)
        return text.cache(self.work.tokens + self.work.answer) + reading + text.logits() + features


@dataclass(frozen=True)
class Needs:
    """What a run that makes images takes, whatever the limit.

    Args:
        variant: the model.
        networks: the weights of each network in memory.
        costs: what each one takes besides: a `TextCost`, a `TransformerCost` and a `VAECost`.
        work: what is made.
        always: bytes that are in memory at every phase besides, such as those of adapters.
    """

    variant: Variant
    networks: Mapping[str, Footprint]
    costs: Mapping[str, Any]
    work: Workload
    always: int = 0

    def plan(self, limit: int) -> Plan:
        """What the run holds where as much as fits into `limit` bytes stays in memory.

        Where there is more to denoise after an image is finished, that one is decoded at once if the VAE fits beside
        the transformer without blocks of that having to be streamed for its sake. The fastest way of computing is taken
        that nothing else is given up for, and the VAE's strips are as large as they can be while it takes no more for
        its activations than the transformer does.
        """
        cost = self.costs["transformer"]
        ways = [replace(self, costs={**self.costs, "transformer": way})._plan_of_way(limit) for way in cost.ways]
        possible = [way for way in ways if not way.phase("transformer").streamed or way.execution.blocks == 1]
        best = max(possible, key=lambda way: (way.fits, way.beside, -way.phase("transformer").streamed))
        in_strips = (replace(self, costs={**self.costs, "vae": way})._in_strips(best) for way in self.costs["vae"].ways)
        return next(filter(None, in_strips), best)

    def _in_strips(self, planned: Plan) -> Plan | None:
        """The plan with these strips of the VAE; None if they take more than the transformer does."""
        taken = {"vae": self._decoding_beside if planned.beside else self._decoding}
        if self.work.references:
            taken["vae_encoder"] = self._seeing
        if max(taken.values()) > planned.phase("transformer").activations:
            return None
        phases = [replace(phase, activations=taken.get(phase.name, phase.activations)) for phase in planned.phases]
        return replace(planned, phases=tuple(phases), strip_bytes=self.costs["vae"].strip_bytes)

    def _plan_of_way(self, limit: int) -> Plan:
        activations = {"text_encoder": self._encoding}
        if self.work.references:
            activations["vae_encoder"] = self._seeing
        activations |= {"transformer": self._denoising, "vae": self._decoding}
        alone = replace(_in_turn(self.networks, activations, self.always, limit), **self._of_passes)
        if not self.work.previews and len(self._passes) == 1:
            return alone
        activations["vae"] = self._decoding_beside
        beside = replace(_side_by_side(self.networks, activations, self.always, limit), **self._of_passes)
        streams = beside.phase("transformer").streamed > 0 and not alone.phase("transformer").streamed
        return beside if self.work.previews or (beside.fits and not streams) else alone

    @property
    def _encoding(self) -> int:
        encoder = self.networks["text_encoder"]
        encoding = self.costs["text_encoder"].encoding(self.work.length, encoder.widened)
        # What loading takes besides is given back before anything is computed.
        return max(encoding + (self._texts - 1) * self._states, encoder.loading)

    @property
    def _seeing(self) -> int:
        encoding = [self.costs["vae"].encoding(height, width) for width, height in set(self.work.references)]
        return max(encoding) + self._texts * self._states + self._pictures

    @property
    def _denoising(self) -> int:
        peak = max(sum(self._passing), self._passing[0] + self.work.previewing, self.networks["transformer"].loading)
        return peak + self._held + 2 * self._latents

    @property
    def _decoding(self) -> int:
        return self._decoded + self._pictures + self._latents

    @property
    def _decoding_beside(self) -> int:
        return self._passing[0] + self._decoded + self._held + 2 * self._latents

    @property
    def _of_passes(self) -> dict[str, Any]:
        """What is made, and how; and the longest operation of transformer and text encoder. The VAE's are shorter."""
        cost = self.costs["transformer"]
        longest = cost.longest(self.work.length, self._image + self._references, self._per_pass)
        longest = max(longest, self.costs["text_encoder"].longest(self.work.length))
        return {"longest": longest, "execution": cost.execution, "work": self.work}

    @cached_property
    def _decoded(self) -> int:
        return self.costs["vae"].decoding(self.work.height, self.work.width)

    @cached_property
    def _passing(self) -> tuple[int, int]:
        """What stays from the first pass of a run to its last, and the peak of a pass above that and the weights."""
        sizes = self.work.length, self._image, self._references, self._per_pass, self.networks["transformer"].widened
        return self.costs["transformer"].denoising(*sizes, kv_cache=self.variant.kv_cache, caches=self.work.caches)

    @property
    def _held(self) -> int:
        """Texts before and after their projection, pictures, and the rotations of all positions."""
        texts = self._texts * (self._states + self.costs["transformer"].projected(self.work.length))
        positions = self.work.length + self._image + self._references
        return texts + self._pictures + self.costs["transformer"].rotations(positions)

    @property
    def _texts(self) -> int:
        return self.work.prompts + self.work.negatives * self.variant.uses_cfg

    @property
    def _states(self) -> int:
        return self.costs["transformer"].states(self.work.length)

    @property
    def _pictures(self) -> int:
        return self._references * self._token

    @property
    def _latents(self) -> int:
        """The noise of all images, which is as large as what becomes of it."""
        return self.work.images * self._image * self._token

    @property
    def _token(self) -> int:
        return self.variant.vae.token_channels * mx.float32.size

    @property
    def _image(self) -> int:
        return self.work.image_tokens(self.variant.vae.token_size)

    @property
    def _references(self) -> int:
        return self.work.reference_tokens(self.variant.vae.token_size)

    @property
    def _passes(self) -> list[Sequence[int]]:
        return passes(range(self.work.images), self._image + self._references)

    @property
    def _per_pass(self) -> int:
        return len(self._passes[0])


def _weights(networks: Mapping[str, Footprint], phase: str) -> Footprint:
    """The weights in memory for a phase."""
    return reduce(add, (networks[name] for name in in_phase(phase)))


def _in_turn(networks: Mapping[str, Footprint], activations: Mapping[str, int], always: int, limit: int) -> Plan:
    """The plan of phases that give their weights back; `activations` are bytes by the names of these phases."""
    phases = (_phase(name, _weights(networks, name), needed, always, limit) for name, needed in activations.items())
    return Plan(tuple(phases), limit)


def _side_by_side(networks: Mapping[str, Footprint], activations: Mapping[str, int], always: int, limit: int) -> Plan:
    """The plan where the networks of every run stay in memory together for their phases, which are the last ones."""
    before = {name: needed for name, needed in activations.items() if name not in EVERY_RUN}
    together = {name: activations[name] for name in EVERY_RUN}
    transformer, *others = (networks[name] for name in EVERY_RUN)
    both = replace(transformer, rest=transformer.rest + sum(network.all for network in others))
    worst = _phase("transformer", both, max(together.values()), always, limit)
    phases = [replace(worst, name=name, activations=needed) for name, needed in together.items()]
    phases[1:] = [replace(phase, streamed=0) for phase in phases[1:]]
    return Plan((*_in_turn(networks, before, always, limit).phases, *phases), limit, beside=True)


def _phase(name: str, network: Footprint, activations: int, always: int, limit: int) -> PhasePlan:
    resident = network.resident(limit - always - activations)
    weights = always + network.held(resident)
    return PhasePlan(name, weights, activations, resident, streamed=sum(network.blocks[resident:]))


def passes(images: Sequence[int], tokens: int) -> list[Sequence[int]]:
    """`images` divided into those that go through the transformer together, given how many tokens each one is,
    references included."""
    per_pass = max(1, _TOKENS_PER_PASS // tokens)
    return [images[start : start + per_pass] for start in range(0, len(images), per_pass)]
