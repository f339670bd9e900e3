"""The phases of a run after the text is encoded, what a caller hears of them, and what they took."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .images import to_pil, to_unit
from .memory import Plan, limits
from .references import Edit, to_pixels
from .sampling import Conditioning, Painting, Request, Step, denoise
from .scheduler import noise_levels
from .streaming import Reading
from .transformer import Flux2Transformer, image_ids, rope_table, text_ids
from .vae import VAE

# References lie this far apart on the T axis; the image that is made is at 0.
_T_STEP = 10
# MLX counts memory, and limits it, for the process as a whole.
_TURN = threading.RLock()


@dataclass(frozen=True)
class Phase:
    """What one phase of a run took: seconds, and peak memory in bytes.

    `read` are the bytes of weights that were streamed from disk, `streamed` those of each pass, and `overlap` is the
    share of the reading, 0 to 1, that the computation did not wait for.
    """

    name: str
    seconds: float
    peak_memory: int
    read: int = 0
    streamed: int = 0
    overlap: float | None = None


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of a phase. After a denoising step `step` is set, and when an image is finished `image`;
    `images` are the places that it is about among the images of the run."""

    phase: str
    done: int
    total: int
    step: Step | None = None
    images: range = range(0)
    image: Image.Image | None = None


@dataclass
class Flux2Output:
    """What a run gives: `images` as asked for, and the seed of each. `timings` has a `Phase` for each phase;
    `peak_memory` is in bytes."""

    images: Any = None
    seeds: list[int] = field(default_factory=list)
    timings: list[Phase] = field(default_factory=list)

    @property
    def peak_memory(self) -> int:
        return max((phase.peak_memory for phase in self.timings), default=0)


@contextmanager
def measured(name: str, timings: list[Phase], planned: Plan, reading: Reading, others: int) -> Iterator[None]:
    """Add what a phase took to `timings`, keep it within what is `planned`, and give its memory back at the end.

    `others` are the bytes in memory that do not belong to the run. Runs of several threads take turns.
    """
    with _TURN:
        mx.clear_cache()
        mx.reset_peak_memory()
        start, before = time.perf_counter(), replace(reading)
        with limits(planned, name, others):
            yield
        read, seconds = reading.since(before), time.perf_counter() - start
        streamed = planned.phase(name).streamed if read.nbytes else 0
        timings.append(Phase(name, seconds, mx.get_peak_memory(), read.nbytes, streamed, read.overlap))
        gc.collect()
        mx.clear_cache()


def measuring(timings: list[Phase], planned: Plan, reading: Reading) -> Callable[[str], AbstractContextManager[None]]:
    """`measured` for the phases of a run that starts now: what is in memory already does not belong to it."""
    return partial(measured, timings=timings, planned=planned, reading=reading, others=mx.get_active_memory())


OnProgress = Callable[[Progress], mx.array | None]


@dataclass(frozen=True)
class EncodedEdit:
    """The pictures of a run as tokens, float32: all `references` in one row `[1, Lr, C]` at positions `ids` `[Lr, 4]`,
    and the canvas `source` `[1, L, C]` with its `mask` `[1, L, 1]`."""

    references: mx.array
    ids: np.ndarray
    source: mx.array | None = None
    mask: mx.array | None = None


def encode_images(vae: VAE, edit: Edit, dtype: mx.Dtype, on_progress: OnProgress) -> EncodedEdit:
    """The pictures of `edit` as tokens."""
    rows, ids = [], []
    for number, image in enumerate(edit.references, 1):
        latents = vae.encode(mx.array(to_pixels(image)).astype(dtype)).astype(mx.float32)
        rows.append(vae.to_tokens(latents))
        mx.eval(rows[-1])
        ids.append(image_ids(latents.shape[1] // 2, latents.shape[2] // 2, t=_T_STEP * number))
        on_progress(Progress("vae_encoder", number, len(edit.references)))
    canvas = edit.canvas
    mask = None if canvas is None or canvas.tokens is None else mx.array(canvas.tokens.reshape(1, -1, 1))
    return EncodedEdit(mx.concatenate(rows, axis=1), np.concatenate(ids), None if canvas is None else rows[0], mask)


def denoise_images(
    transformer: Flux2Transformer,
    request: Request,
    batches: list[range],
    noise: list[mx.array],
    conditioning: Callable[[range], Conditioning],
    encoded: EncodedEdit | None,
    dtype: mx.Dtype,
    on_progress: OnProgress,
) -> list[mx.array]:
    """Tokens of all images.

    Args:
        transformer: the network.
        request: the settings.
        batches: the images of each pass.
        noise: of each image, float32 `[L, C]`.
        conditioning: gives that of the images in a range.
        encoded: the pictures of the run.
        dtype: what the transformer computes in.
        on_progress: hears of every step and may return tokens to go on from.
    """
    sigmas = noise_levels(request.schedule_steps, len(noise[0]), request.sigmas)[-request.steps - 1 :]
    total, done, finished = request.steps * len(batches), 0, []
    for images in batches:
        batch, painting = mx.stack(noise[images.start : images.stop]), None
        if encoded is not None and encoded.source is not None:
            painting = Painting(encoded.source, batch, encoded.mask)
            batch = painting.at(float(sigmas[0]))
        steps = denoise(transformer, batch, conditioning(images), sigmas, dtype, painting)
        step = next(steps)
        while step is not None:
            done += 1
            batch, replaced = step.tokens, on_progress(Progress("transformer", done, total, step, images))
            batch = batch if replaced is None else mx.array(replaced).astype(mx.float32)
            try:
                step = steps.send(batch)
            except StopIteration:
                step = None
        finished += list(batch)
    return finished


def condition(
    transformer: Flux2Transformer,
    request: Request,
    grid: tuple[int, int],
    embeds: list[mx.array],
    negative: mx.array | None,
    encoded: EncodedEdit | None,
    dtype: mx.Dtype,
    *,
    kv_cache: bool,
) -> Callable[[range], Conditioning]:
    """All that no step changes, worked out once: a function from a range of images to their conditioning.

    Args:
        transformer: the network.
        request: the settings.
        grid: height and width in tokens.
        embeds: text states `[Lt, F]` of each prompt.
        negative: those of the empty prompt, for classifier-free guidance.
        encoded: the pictures of the run.
        dtype: what the transformer computes in.
        kv_cache: whether the model was trained to see references through their keys and values only.
    """
    config = transformer.config
    distinct = {id(states): states for states in embeds}  # prompts may be the same
    projected = {key: transformer.txt_in(states) for key, states in distinct.items()}
    negative = None if negative is None else transformer.txt_in(negative)
    ids = [text_ids(embeds[0].shape[0]), image_ids(*grid)]
    guidance = mx.array([request.guidance]) if config.guidance_embeds else None
    references = past = None
    if encoded is not None and kv_cache:
        past = transformer.read(encoded.references.astype(dtype), rope_table(encoded.ids, config), guidance)
    elif encoded is not None:
        ids.append(encoded.ids)
        references = encoded.references
    rope = rope_table(np.concatenate(ids), config)

    def of(images: range) -> Conditioning:
        text = mx.stack([projected[id(embeds[i // request.images_per_prompt])] for i in images])
        against = None if negative is None else mx.broadcast_to(negative, (len(images), *negative.shape))
        return Conditioning(text, rope, against, request.guidance, guidance, references, past)

    return of


def decode_images(
    vae: VAE, tokens: list[mx.array], grid: tuple[int, int], dtype: mx.Dtype, latent: bool
) -> Iterator[np.ndarray]:
    """Decoder output `[1, H, W, 3]` about −1..1, or un-normalised latents `[1, H/8, W/8, c]`, of one image after the
    other; float32."""
    for image_tokens in tokens:
        latents = vae.from_tokens(image_tokens[None], *grid)
        result = latents if latent else vae.decode(latents.astype(dtype))
        yield np.array(result.astype(mx.float32))


def finished_image(pixels: np.ndarray, edit: Edit) -> Image.Image:
    """The image of decoder output `[1, H, W, 3]`, put into the picture that it paints over, if there is one."""
    image = to_pil(to_unit(pixels))[0]
    return image if edit.canvas is None else edit.canvas.paste(image)
