"""How much memory a run needs phase by phase, and what fits. Pure: what networks take is asked of their costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx

from .components import in_phase
from .config import Variant

if TYPE_CHECKING:
    from .text import TextCost, VisionCost
    from .transformer import TransformerCost
    from .vae import VAECost

# Small images share a pass up to this many image tokens, those of one 1024×1024 image. Larger passes would need
# more memory and be no faster.
_TOKENS_PER_PASS = 4096
_BESIDE = "transformer", "vae"


@dataclass(frozen=True)
class Footprint:
    """Bytes of a network's weights in memory: of each block in order, and of the rest, which always stays.

    `reading` is what a streamed block takes besides while it is cast from how it is stored, `widened` what the weights
    take that are widened at one time, and `loading` what a weight takes besides while it is cast or quantized at
    loading.
    """

    rest: int
    blocks: tuple[int, ...] = ()
    reading: int = 0
    widened: int = 0
    loading: int = 0

    def __add__(self, other: "Footprint") -> "Footprint":
        """Two networks in memory together, the other's blocks being run after this one's."""
        pairs = (self.reading, other.reading), (self.widened, other.widened), (self.loading, other.loading)
        return Footprint(self.rest + other.rest, self.blocks + other.blocks, *map(max, pairs))

    @property
    def all(self) -> int:
        return self.rest + sum(self.blocks)

    def held(self, resident: int) -> int:
        """Bytes in memory if so many blocks stay and the others are streamed: one at work, the next one being read."""
        streamed = self.blocks[resident:]
        if not streamed:
            return self.all
        return self.rest + sum(self.blocks[:resident]) + min(2 * max(streamed), sum(streamed)) + self.reading

    def resident(self, budget: int) -> int:
        """How many blocks can stay within `budget` bytes; 0 also if not even the least fits."""
        fitting = [count for count in range(len(self.blocks) + 1) if self.held(count) <= budget]
        return max(fitting, default=0)


@dataclass(frozen=True)
class Costs:
    """What the networks that paint take beside their weights."""

    text_encoder: "TextCost"
    transformer: "TransformerCost"
    vae: "VAECost"


@dataclass(frozen=True)
class Workload:
    """What a run makes: `images` of `width`×`height` pixels from `prompts` texts of `length` tokens, with `references`
    of so many (width, height) pixels, and `previews` of it between the steps. Models with classifier-free guidance have
    `negatives` texts besides. `on_canvas` says that the first reference is what is painted over, of the image's size.
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

    def image_tokens(self, size: int) -> int:
        """Tokens of one image, each of `size`×`size` pixels."""
        return (self.width // size) * (self.height // size)

    def reference_tokens(self, size: int) -> int:
        """Tokens of all references."""
        return sum(width * height for width, height in self.references) // size**2


@dataclass(frozen=True)
class Writing:
    """What a language model does at a time: it reads `tokens`, those of images of so many `pixels` included, and writes
    up to `answer` more."""

    tokens: int
    answer: int
    pixels: tuple[int, ...] = ()


@dataclass(frozen=True)
class PhasePlan:
    """What a phase is expected to hold, in bytes. The first `resident` blocks stay in memory; `streamed` bytes of the
    others are read from disk at every pass."""

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
    """The phases of a run and the memory that there is, in bytes. Networks of different phases are not in memory
    together, but for the transformer and the VAE where images are decoded `beside` the denoising of others, and for
    those that are `kept` after their phases, which the weights of the other phases include.

    `longest` is how many operations the device is given at one time, which it can't be interrupted in.
    """

    phases: tuple[PhasePlan, ...]
    limit: int
    beside: bool = False
    longest: int = 0
    kept: tuple[str, ...] = ()

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

    def besides(self, nbytes: int, limit: int) -> "Plan":
        """This plan with `nbytes` more in memory all the time, and a `limit` that is for these as well."""
        phases = (replace(phase, weights=phase.weights + nbytes) for phase in self.phases)
        return replace(self, phases=tuple(phases), limit=limit)

    def networks(self, name: str) -> tuple[str, ...]:
        """The names of the networks that are in memory for a phase."""
        return _BESIDE if self.beside and name in _BESIDE else in_phase(name)

    def keeping(self, weights: Mapping[str, int]) -> "Plan":
        """The plan where networks stay in memory after their phases, as many as fit beside every phase.

        Args:
            weights: bytes of networks by their names, those first that are worth most. One that is streamed can't stay.
        """
        streamed = {name for phase in self.phases if phase.streamed for name in self.networks(phase.name)}
        kept: dict[str, int] = {}
        for name, nbytes in weights.items():
            more = kept | {name: nbytes}
            if name not in streamed and all(
                phase.peak_memory + self._besides(phase, more) <= self.limit for phase in self.phases
            ):
                kept = more
        phases = [replace(phase, weights=phase.weights + self._besides(phase, kept)) for phase in self.phases]
        return replace(self, phases=tuple(phases), kept=tuple(kept))

    def _besides(self, phase: PhasePlan, kept: Mapping[str, int]) -> int:
        """Bytes of what is kept besides the networks of a phase."""
        return sum(nbytes for name, nbytes in kept.items() if name not in self.networks(phase.name))


def plan(variant: Variant, networks: Mapping[str, Footprint], costs: Costs, work: Workload, limit: int) -> Plan:
    """What a run takes if as much as fits into `limit` bytes stays in memory.

    Where there is more to denoise after an image is finished, it is decoded at once if the VAE fits beside the
    transformer without blocks of that having to be streamed for its sake.

    Args:
        variant: the model.
        networks: the weights of `text_encoder`, `transformer` and `vae` in memory.
        costs: what these take besides.
        work: what is made.
        limit: bytes that there are.
    """
    needs = _Needs(variant, networks, costs, work)
    activations = {"text_encoder": needs.encoding}
    if work.references:
        activations["vae_encoder"] = needs.seeing
    activations |= {"transformer": needs.denoising, "vae": needs.decoding}
    alone = replace(_plan(networks, activations, limit), longest=needs.longest)
    if not work.previews and len(_passes(variant, work)) == 1:
        return alone
    activations["vae"] = needs.decoding_beside
    beside = replace(_plan_beside(networks, activations, limit), longest=needs.longest)
    streams = beside.phase("transformer").streamed > 0 and not alone.phase("transformer").streamed
    return beside if work.previews or (beside.fits and not streams) else alone


def writing_plan(
    networks: Mapping[str, Footprint], text: "TextCost", vision: "VisionCost | None", work: Writing, limit: int
) -> Plan:
    """The plan of text that a language model writes.

    Args:
        networks: the weights of `language_model` in memory, and those of `vision_tower`.
        text: what the language model takes besides.
        vision: what its vision tower takes besides, if images are looked at.
        work: what is read and written.
        limit: bytes that there are.
    """
    features = 0
    embeddings = 0
    activations = {}
    longest = text.longest_read(work.tokens)
    if vision is not None:
        longest = max(longest, vision.longest(max(work.pixels)))
        features = vision.features(sum(work.pixels))
        embeddings = text.embeddings(work.tokens)
        activations["vision_tower"] = vision.seeing(max(work.pixels), networks["vision_tower"].widened) + features
    model = networks["language_model"]
    reading = max(text.reading(work.tokens, model.widened), model.loading)
    cache = text.cache(work.tokens + work.answer)
    activations["language_model"] = cache + reading + text.logits() + features + embeddings
    return replace(_plan(networks, activations, limit), longest=longest)


@dataclass(frozen=True)
class _Needs:
    """Bytes that the phases of a run take beside the weights of their networks."""

    variant: Variant
    networks: Mapping[str, Footprint]
    costs: Costs
    work: Workload

    @property
    def encoding(self) -> int:
        encoder = self.networks["text_encoder"]
        encoding = self.costs.text_encoder.encoding(self.work.length, encoder.widened)
        # What loading takes besides is given back before anything is computed.
        return max(encoding + (self._texts - 1) * self._states, encoder.loading)

    @property
    def seeing(self) -> int:
        """The bytes of encoding the pictures, beside the encoded texts."""
        encoding = [self.costs.vae.encoding(height, width) for width, height in set(self.work.references)]
        return max(encoding) + self._texts * self._states + self._pictures

    @property
    def denoising(self) -> int:
        past, passing = self._passing
        return max(past + passing, self.networks["transformer"].loading) + self._held + 2 * self._latents

    @property
    def decoding(self) -> int:
        return self._decoded + self._pictures + self._latents

    @property
    def decoding_beside(self) -> int:
        """The bytes of decoding an image while others are denoised."""
        return self._passing[0] + self._decoded + self._held + 2 * self._latents

    @property
    def longest(self) -> int:
        """Operations of the longest product or attention of the text encoder and the transformer; the VAE's are
        shorter."""
        text = self.work.length
        others = self._image + self._references
        return max(self.costs.transformer.longest(text, others, self._together), self.costs.text_encoder.longest(text))

    @cached_property
    def _decoded(self) -> int:
        return self.costs.vae.decoding(self.work.height, self.work.width)

    @cached_property
    def _passing(self) -> tuple[int, int]:
        """What stays from the first pass of a run to its last, and the peak of a pass above that and the weights."""
        widened = self.networks["transformer"].widened
        kv_cache = self.variant.kv_cache
        tokens = self.work.length, self._image, self._references
        return self.costs.transformer.denoising(*tokens, self._together, widened, kv_cache=kv_cache)

    @property
    def _held(self) -> int:
        """Texts before and after their projection, pictures, and the rotations of all positions."""
        texts = self._texts * (self._states + self.costs.transformer.projected(self.work.length))
        positions = self.work.length + self._image + self._references
        return texts + self._pictures + self.costs.transformer.rotations(positions)

    @property
    def _texts(self) -> int:
        return self.work.prompts + self.work.negatives * self.variant.uses_cfg

    @property
    def _states(self) -> int:
        return self.costs.transformer.states(self.work.length)

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
    def _together(self) -> int:
        return len(_passes(self.variant, self.work)[0])


def _plan(networks: Mapping[str, Footprint], activations: Mapping[str, int], limit: int) -> Plan:
    return Plan(tuple(_phase(name, networks, needed, limit) for name, needed in activations.items()), limit)


def _plan_beside(networks: Mapping[str, Footprint], activations: Mapping[str, int], limit: int) -> Plan:
    """The plan where the transformer stays in memory with the VAE for both their phases."""
    before = {name: needed for name, needed in activations.items() if name not in _BESIDE}
    both = replace(networks["transformer"], rest=networks["transformer"].rest + networks["vae"].all)
    resident = both.resident(limit - max(activations["transformer"], activations["vae"]))
    streamed = {"transformer": sum(both.blocks[resident:]), "vae": 0}
    phases = [PhasePlan(x, both.held(resident), activations[x], resident, streamed[x]) for x in _BESIDE]
    return Plan((*_plan(networks, before, limit).phases, *phases), limit, beside=True)


def _phase(name: str, networks: Mapping[str, Footprint], activations: int, limit: int) -> PhasePlan:
    network = networks["vae" if name == "vae_encoder" else name]
    resident = network.resident(limit - activations)
    return PhasePlan(name, network.held(resident), activations, resident, sum(network.blocks[resident:]))


def _passes(variant: Variant, work: Workload) -> list[Sequence[int]]:
    size = variant.vae.token_size
    return passes(range(work.images), work.image_tokens(size) + work.reference_tokens(size))


def passes(images: Sequence[int], tokens: int) -> list[Sequence[int]]:
    """`images` divided into those that go through the transformer together, given how many tokens each one is,
    references included."""
    per_pass = max(1, _TOKENS_PER_PASS // tokens)
    return [images[start : start + per_pass] for start in range(0, len(images), per_pass)]
