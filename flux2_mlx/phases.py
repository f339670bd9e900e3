"""The phases of a run after the text is encoded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .errors import InputError, RangeError
from .images import to_pil, to_unit
from .layers import check_finite
from .metering import end_with_process
from .references import Edit, to_pixels
from .request import OnProgress, Progress, Request, Step
from .sampling import Conditioning, Painting, Text, denoise
from .scheduler import noise_levels
from .transformer import Flux2Transformer, image_ids, rope_table, text_ids
from .vae import VAE

# References lie this far apart on the T axis; the image that is made is at 0.
_T_STEP = 10
# No image is a thousand times as bright as white; what a decoder gives beyond that is damage, though it is finite.
_MOST_INTENSITY = 1000


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
        check_finite(rows[-1], "VAE")
        ids.append(image_ids(latents.shape[1] // 2, latents.shape[2] // 2, t=_T_STEP * number))
        on_progress(Progress("vae_encoder", number, len(edit.references)))
    canvas = edit.canvas
    mask = None if canvas is None or canvas.tokens is None else mx.array(canvas.tokens.reshape(1, -1, 1))
    return EncodedEdit(mx.concatenate(rows, axis=1), np.concatenate(ids), None if canvas is None else rows[0], mask)


def denoise_images(
    transformer: Flux2Transformer,
    request: Request,
    batches: list[Sequence[int]],
    noise: dict[int, mx.array],
    conditioning: Callable[[Sequence[int]], Conditioning],
    encoded: EncodedEdit | None,
    dtype: mx.Dtype,
    on_step: Callable[[int, Step, Sequence[int]], mx.array | None],
) -> Iterator[dict[int, mx.array]]:
    """The tokens `[L, C]` of the images of each pass when it is done.

    Args:
        transformer: the network.
        request: the settings.
        batches: the images of each pass.
        noise: of each image, float32 `[L, C]`.
        conditioning: gives that of some images.
        encoded: the pictures of the run.
        dtype: what the transformer computes in.
        on_step: hears how many steps are done, of the last one, and its images; it may return tokens to go on from.
    """
    length = len(noise[batches[0][0]])
    sigmas = noise_levels(request.schedule_steps, length, request.sigmas, request.shift_steps)[-request.steps - 1 :]
    done = 0
    for images in batches:
        batch, painting = mx.stack([noise.pop(image) for image in images]), None
        if encoded is not None and encoded.source is not None:
            painting = Painting(encoded.source, batch, encoded.mask)
            batch = painting.at(float(sigmas[0]))
        steps = denoise(transformer, batch, conditioning(images), sigmas, dtype, painting)
        step = next(steps)
        while step is not None:
            done += 1
            end_with_process()
            batch, replaced = step.tokens, on_step(done, step, images)
            batch = batch if replaced is None else _replacement(replaced, batch.shape)
            try:
                step = steps.send(batch)
            except StopIteration:
                step = None
        yield dict(zip(images, batch, strict=True))


def _replacement(tokens: Any, shape: tuple[int, ...]) -> mx.array:
    """Tokens to go on from that a callback has returned; InputError if they can't be those of this pass."""
    try:
        tokens = mx.array(tokens).astype(mx.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"a callback returned {type(tokens).__name__} for latents; give an array {shape}") from error
    if tokens.shape != shape or not mx.isfinite(tokens).all().item():
        raise InputError(f"a callback returned latents {tokens.shape}; give finite numbers of the shape {shape}")
    return tokens


def condition(
    transformer: Flux2Transformer,
    request: Request,
    grid: tuple[int, int],
    embeds: dict[int, mx.array],
    negatives: dict[int, mx.array],
    encoded: EncodedEdit | None,
    dtype: mx.Dtype,
    *,
    kv_cache: bool,
) -> Callable[[Sequence[int]], Conditioning]:
    """All that no step changes, worked out once: a function from images to their conditioning.

    Args:
        transformer: the network.
        request: the settings.
        grid: height and width in tokens.
        embeds: text states `[Lt, F]` of each prompt that is needed, by its number.
        negatives: the same of the negative prompts, for classifier-free guidance; none without.
        encoded: the pictures of the run.
        dtype: what the transformer computes in.
        kv_cache: whether the model was trained to see references through their keys and values only.
    """
    config = transformer.config
    distinct = {id(states): states for states in (*embeds.values(), *negatives.values())}  # prompts may be the same
    projected = {key: transformer.txt_in(states) for key, states in distinct.items()}
    guidance = mx.array([request.guidance]) if config.guidance_embeds else None
    ids, references, past = [image_ids(*grid)], None, None
    if encoded is not None and kv_cache:
        past = transformer.read(encoded.references.astype(dtype), rope_table(encoded.ids, config), guidance)
    elif encoded is not None:
        ids.append(encoded.ids)
        references = encoded.references

    lengths = {len(states) for states in distinct.values()}  # all prompts have one, all negative ones have one
    ropes = {length: rope_table(np.concatenate([text_ids(length), *ids]), config) for length in lengths}

    def text(states: dict[int, mx.array], images: Sequence[int]) -> Text:
        rows = [states[image // request.images_per_prompt] for image in images]
        return Text(mx.stack([projected[id(row)] for row in rows]), ropes[len(rows[0])])

    def of(images: Sequence[int]) -> Conditioning:
        negative = text(negatives, images) if negatives else None
        return Conditioning(text(embeds, images), negative, request.guidance, guidance, references, past)

    return of


def decode_image(vae: VAE, tokens: mx.array, grid: tuple[int, int], dtype: mx.Dtype) -> np.ndarray:
    """Decoder output `[1, H, W, 3]` about −1..1 of an image's tokens `[L, C]`, float32.

    Raises:
        RangeError: it is no image, as some weights of the VAE or the tokens are far from what they should be.
    """
    return decode_latents(vae, vae.from_tokens(tokens[None], *grid).astype(dtype))


def decode_latents(vae: VAE, latents: mx.array) -> np.ndarray:
    """The same of un-normalised latents `[1, H/8, W/8, c]` in the VAE's dtype."""
    pixels = vae.decode(latents)
    check_finite(pixels, "VAE")
    pixels = np.array(pixels.astype(mx.float32))
    if np.abs(pixels).max() > _MOST_INTENSITY:
        raise RangeError(
            f"the VAE gave pixels of {np.abs(pixels).max():.3g} where −1 to 1 is black to white; `flux2-mlx models "
            "verify` tells whether the weights are damaged"
        )
    return pixels


def latents_of(vae: VAE, tokens: mx.array, grid: tuple[int, int]) -> np.ndarray:
    """Un-normalised latents `[1, H/8, W/8, c]` of an image's tokens `[L, C]`, float32."""
    latents = vae.from_tokens(tokens[None], *grid).astype(mx.float32)
    check_finite(latents, "VAE")
    return np.array(latents)


def finished_image(pixels: np.ndarray, edit: Edit) -> Image.Image:
    """The image of decoder output `[1, H, W, 3]`, put into the picture that it paints over, if there is one."""
    return edit.finished(to_pil(to_unit(pixels))[0])
