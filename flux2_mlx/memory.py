"""How much memory a run needs phase by phase, and what fits."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import mlx.core as mx

from .config import TextConfig, TransformerConfig, Variant, VisionConfig
from .device import device_memory, on_gpu
from .layers import attention_operations, score_bytes
from .streaming import Footprint
from .transformer import TOKENS_PER_PART
from .vae import activation_bytes as vae_activation_bytes

# Small images share a pass up to this many image tokens, those of one 1024×1024 image. Larger passes would need
# more memory and be no faster.
_TOKENS_PER_PASS = 4096
# Bytes for each token and channel of the tokens that a block projects at one time, measured: in the activations'
# dtype, and in float32 for norms and rotation.
_PROJECTED_ARRAYS, _FLOAT32_BYTES = 3, 75
# Arrays as wide as the stream: what is kept of projected tokens until all can attend; what there is while they do; and
# what a projection holds while it widens its weights.
_KEPT_ARRAYS, _ATTENDING_ARRAYS, _WIDENING_ARRAYS = 6, 8, 11
# Arrays as wide as the stream, the queries, and the keys while a layer of the text encoder attends, and bytes of a
# query in float32 for norms and rotation; then arrays as wide as the stream and the MLP. Measured as well.
_TEXT_ARRAYS, _TEXT_QUERIES, _TEXT_KEYS, _TEXT_FLOAT32_BYTES = 6, 4.9, 2, 18
_TEXT_MLP_STREAM, _TEXT_MLP_ARRAYS = 4, 3
_TEXT_MASKS = 3  # who sees whom, as it is made, a byte each
# The same of the vision tower: bytes of a patch and channel while it attends, and arrays around the MLP. And of the
# logits, arrays in float32.
_VISION_BYTES, _VISION_MLP_STREAM, _LOGITS_ARRAYS = 92, 3, 6
# mlx-lm's: tokens that caches of keys and values grow by, and tokens of a prompt that are read at one time.
_CACHE_STEP, _TOKENS_READ_TOGETHER = 256, 2048
# The share of a phase's activations up to which MLX may allocate ahead of what it computes. It looks before it
# allocates, so that one more array comes on top.
_AHEAD = 0.9


@dataclass(frozen=True)
class Workload:
    """What a run makes: `images` of `width`×`height` pixels from `prompts` texts of `length` tokens, with `references`
    of so many (width, height) pixels, and `previews` of it between the steps. Models with classifier-free guidance have
    `negatives` texts besides."""

    width: int
    height: int
    length: int
    references: tuple[tuple[int, int], ...] = ()
    prompts: int = 1
    images: int = 1
    previews: bool = False
    negatives: int = 1

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
    together, but for the transformer and the VAE where images are decoded `beside` the denoising of others.

    `longest` is how many operations the device is given at one time, which it can't be interrupted in.
    """

    phases: tuple[PhasePlan, ...]
    limit: int
    beside: bool = False
    longest: int = 0

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


def plan(variant: Variant, networks: dict[str, Footprint], work: Workload, dtype: mx.Dtype, limit: int) -> Plan:
    """What a run takes if as much as fits into `limit` bytes stays in memory.

    Where there is more to denoise after an image is finished, it is decoded at once if the VAE fits beside the
    transformer without blocks of that having to be streamed for its sake.

    Args:
        variant: the model.
        networks: the weights of `text_encoder`, `transformer` and `vae` in memory.
        work: what is made.
        dtype: of the activations.
        limit: bytes that there are.
    """
    texts, size = work.prompts + work.negatives * variant.uses_cfg, variant.vae.token_size
    states = work.length * variant.text.output_size * dtype.size
    token_bytes = variant.vae.token_channels * mx.float32.size
    latents, pictures = work.image_tokens(size) * token_bytes, work.reference_tokens(size) * token_bytes
    encoder, transformer = networks["text_encoder"], networks["transformer"]
    encoding = text_activation_bytes(variant.text, work.length, dtype.size, encoder.widened)
    # What loading takes besides is given back before anything is computed.
    activations = {"text_encoder": max(encoding + (texts - 1) * states, encoder.loading)}
    if work.references:
        held = texts * states + pictures
        encode = [vae_activation_bytes(variant.vae, height, width, dtype)[0] for width, height in set(work.references)]
        activations["vae_encoder"] = max(encode) + held
    # Texts before and after their projection, and the rotations of all positions.
    positions = work.length + work.image_tokens(size) + work.reference_tokens(size)
    rope = positions * 2 * variant.transformer.attention_head_dim * mx.float32.size
    held = texts * (states + work.length * variant.transformer.hidden_size * dtype.size) + pictures + rope
    past, passing = _denoising_bytes(variant, transformer, work, dtype.size)
    decode = vae_activation_bytes(variant.vae, work.height, work.width, dtype)[1]
    # Noise, and what becomes of it.
    activations["transformer"] = max(past + passing, transformer.loading) + held + 2 * work.images * latents
    longest = _longest(variant, work, dtype.size)
    alone = _plan(networks, activations | {"vae": decode + pictures + work.images * latents}, limit)
    alone = replace(alone, longest=longest)
    if not work.previews and len(_passes(variant, work)) == 1:
        return alone
    activations["vae"] = past + decode + held + 2 * work.images * latents
    beside = replace(_plan_beside(networks, activations, limit), longest=longest)
    streams = beside.phase("transformer").streamed > 0 and not alone.phase("transformer").streamed
    return beside if work.previews or (beside.fits and not streams) else alone


def writing_plan(
    text: TextConfig,
    vision: VisionConfig | None,
    networks: dict[str, Footprint],
    work: Writing,
    dtype: mx.Dtype,
    limit: int,
) -> Plan:
    """The same for text that a language model writes.

    Args:
        text: the language model's geometry.
        vision: that of its vision tower, if images are looked at.
        networks: the weights of `language_model` in memory, and those of `vision_tower`.
        work: what is read and written.
        dtype: of the activations.
        limit: bytes that there are.
    """
    features, activations = 0, {}
    if vision is not None:
        features = sum(work.pixels) // vision.cell_size**2 * text.hidden_size * dtype.size
        patches, widened = max(work.pixels) // vision.patch_size**2, networks["vision_tower"].widened
        activations["vision_tower"] = vision_activation_bytes(vision, patches, dtype.size, widened) + features
    room = _CACHE_STEP * -(-(work.tokens + work.answer) // _CACHE_STEP)
    pair = 2 * text.num_key_value_heads * text.head_dim * dtype.size  # a key and a value
    cache = room * pair * (text.num_hidden_layers + text.num_later_layers)
    together, widened = min(work.tokens, _TOKENS_READ_TOGETHER), networks["language_model"].widened
    reading = max(text_activation_bytes(text, together, dtype.size, widened), networks["language_model"].loading)
    embeddings = 2 * work.tokens * text.hidden_size * dtype.size if work.pixels else 0
    logits = _LOGITS_ARRAYS * text.vocab_size * mx.float32.size
    activations["language_model"] = cache + reading + logits + features + embeddings
    return _plan(networks, activations, limit)


def _plan(networks: dict[str, Footprint], activations: dict[str, int], limit: int) -> Plan:
    return Plan(tuple(_phase(name, networks, needed, limit) for name, needed in activations.items()), limit)


def _plan_beside(networks: dict[str, Footprint], activations: dict[str, int], limit: int) -> Plan:
    """The plan where the transformer stays in memory with the VAE for both their phases."""
    before = {name: needed for name, needed in activations.items() if name not in ("transformer", "vae")}
    both = replace(networks["transformer"], rest=networks["transformer"].rest + networks["vae"].all)
    resident = both.resident(limit - max(activations["transformer"], activations["vae"]))
    streamed = {"transformer": sum(both.blocks[resident:]), "vae": 0}
    phases = [PhasePlan(x, both.held(resident), activations[x], resident, streamed[x]) for x in ("transformer", "vae")]
    return Plan((*_plan(networks, before, limit).phases, *phases), limit, beside=True)


def _phase(name: str, networks: dict[str, Footprint], activations: int, limit: int) -> PhasePlan:
    network = networks["vae" if name == "vae_encoder" else name]
    resident = network.resident(limit - activations)
    return PhasePlan(name, network.held(resident), activations, resident, sum(network.blocks[resident:]))


def _denoising_bytes(variant: Variant, network: Footprint, work: Workload, itemsize: int) -> tuple[int, int]:
    """What stays from the first pass of a run to its last, and the peak of a pass above that and the weights."""
    config, size = variant.transformer, variant.vae.token_size
    image, sources = work.image_tokens(size), work.reference_tokens(size)
    together = len(_passes(variant, work)[0])
    texts = together * work.length * config.hidden_size * itemsize if together > 1 else 0  # side by side
    if not (variant.kv_cache and sources):
        tokens = together * (work.length + image + sources)
        return 0, texts + activation_bytes(config, tokens, itemsize, network.widened, together)
    pair = 2 * config.hidden_size * itemsize  # a key and a value
    past = sources * pair * (config.num_layers + config.num_single_layers)
    tokens = together * (work.length + image)
    # One block at a time has the keys and values of both side by side.
    joined = (tokens + 2 * together * sources) * pair
    reading = activation_bytes(config, sources, itemsize, network.widened)
    writing = texts + activation_bytes(config, tokens, itemsize, network.widened, together) + joined
    return past, max(reading, writing)


def _longest(variant: Variant, work: Workload, itemsize: int) -> int:
    """Operations of the longest product or attention of the text encoder and the transformer; the VAE's are shorter."""
    text, config, size = variant.text, variant.transformer, variant.vae.token_size
    images = len(_passes(variant, work)[0])
    tokens = work.length + work.image_tokens(size) + work.reference_tokens(size)
    part, D = min(images * tokens, TOKENS_PER_PART), config.hidden_size
    widest = 3 * D + 2 * config.mlp_hidden_size
    heads = images * config.num_attention_heads
    return max(
        2 * part * D * widest,
        attention_operations(heads, tokens, tokens, config.attention_head_dim, itemsize),
        2 * work.length * text.hidden_size * max(text.intermediate_size, text.num_attention_heads * text.head_dim),
        attention_operations(text.num_attention_heads, work.length, work.length, text.head_dim, itemsize),
        2 * images * work.length * config.joint_attention_dim * D,
    )


def _passes(variant: Variant, work: Workload) -> list[Sequence[int]]:
    size = variant.vae.token_size
    return passes(range(work.images), work.image_tokens(size) + work.reference_tokens(size))


def passes(images: Sequence[int], tokens: int) -> list[Sequence[int]]:
    """Those of `images` that go through the transformer together, given how many tokens each one is, references
    included."""
    per_pass = max(1, _TOKENS_PER_PASS // tokens)
    return [images[start : start + per_pass] for start in range(0, len(images), per_pass)]


def text_activation_bytes(config: TextConfig, tokens: int, itemsize: int, widened: int = 0) -> int:
    """Peak of encoding one prompt of so many tokens, padding included, above the encoder's weights."""
    D, heads = config.hidden_size, config.num_attention_heads
    queries, keys = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    arrays = itemsize * (_TEXT_ARRAYS * D + _TEXT_QUERIES * queries + _TEXT_KEYS * keys)
    masks, scores = _TEXT_MASKS * tokens**2, score_bytes(heads, tokens, config.head_dim, itemsize)
    attending = tokens * (arrays + _TEXT_FLOAT32_BYTES * queries) + scores + masks
    mlp = tokens * itemsize * (_TEXT_MLP_STREAM * D + _TEXT_MLP_ARRAYS * config.intermediate_size)
    return int(max(attending, mlp + widened))


def vision_activation_bytes(config: VisionConfig, patches: int, itemsize: int, widened: int = 0) -> int:
    """Peak of looking at an image of so many patches, above the weights."""
    D = config.hidden_size
    attending = patches * D * _VISION_BYTES + score_bytes(
        config.num_attention_heads, patches, config.head_dim, itemsize
    )
    mlp = patches * itemsize * (_VISION_MLP_STREAM * D + _TEXT_MLP_ARRAYS * config.intermediate_size)
    return max(attending, mlp + widened)


def activation_bytes(config: TransformerConfig, tokens: int, itemsize: int, widened: int = 0, images: int = 1) -> int:
    """Peak of a denoising pass above the transformer's weights.

    Args:
        config: the geometry.
        tokens: of text, image and references, of all images of the pass.
        itemsize: bytes of an activation.
        widened: bytes that weights take where they are widened.
        images: of the pass.
    """
    array, part = itemsize * config.hidden_size, min(tokens, TOKENS_PER_PART)
    scores = score_bytes(images * config.num_attention_heads, tokens // images, config.attention_head_dim, itemsize)
    # A chunk of queries is scaled before it attends, and kept until it has.
    chunk = min(scores * 2 * config.attention_head_dim * images // tokens, 2 * tokens * array)
    attending = tokens * (_ATTENDING_ARRAYS * array + config.in_channels * mx.float32.size) + scores + chunk
    projected = part * config.hidden_size * (_PROJECTED_ARRAYS * itemsize + _FLOAT32_BYTES)
    if tokens == part and scores == images * config.num_attention_heads * (tokens // images) ** 2 * itemsize:
        projected += scores  # all is evaluated at once, attention included, unless that is in chunks
    projected = max(projected, part * _WIDENING_ARRAYS * array + widened)
    kept = tokens + (tokens // part - 1) * part * _KEPT_ARRAYS
    return max(attending, kept * array + projected)


@contextmanager
def limits(planned: Plan, name: str, others: int) -> Iterator[None]:
    """MLX's own limits as the plan has them for a phase; the former ones are back afterwards.

    Memory: before MLX allocates beyond it, freed buffers are given back and running work is waited for. Cache: freed
    buffers are kept within what the phase leaves. A GPU, which takes long for new ones, keeps up to the activations of
    a phase that leaves less: its buffers together stay within the memory limit, as freed ones are given back first.
    Wired: on Metal, what the phase needs is never paged out.

    Args:
        planned: the plan of the run.
        name: that of the phase.
        others: bytes that are in memory besides the run.
    """
    phase = planned.phase(name)
    peak, ahead = phase.peak_memory, int(_AHEAD * phase.activations)
    with ExitStack() as former:  # each is back even if another can't be
        former.callback(mx.set_memory_limit, mx.set_memory_limit(others + phase.weights + ahead))
        if on_gpu():  # or it may be more than a Mac's GPU can have wired
            former.callback(mx.set_wired_limit, mx.set_wired_limit(min(peak, device_memory())))
        cache = mx.set_cache_limit(0)
        former.callback(mx.set_cache_limit, cache)
        kept = phase.activations if on_gpu() else 0
        mx.set_cache_limit(min(cache, max(kept, planned.limit - peak)))
        yield
        mx.synchronize()
