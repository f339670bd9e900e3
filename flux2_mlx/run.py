"""One run: from prompts and pictures to images, phase by phase."""

import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .config import Variant
from .device import MOST_DISPATCH, dispatch_seconds
from .embedding_cache import CachedEncoder, EmbeddingCache
from .images import to_unit
from .layers import cast, check_finite
from .memory import Plan, passes
from .metering import Meter
from .networks import Networks
from .noise import initial_noise
from .output import Flux2Output
from .phases import (
    EncodedEdit,
    condition,
    decode_image,
    denoise_images,
    encode_images,
    finished_image,
    latents_of,
)
from .references import Edit
from .request import OnProgress, Progress, Request, Step
from .unfinished import Waiting
from .vae import VAE

_log = logging.getLogger(__name__)
Tokens = dict[int, mx.array]  # `[L, C]` of images by their places in the run, or of prompts by their numbers
Given = tuple[mx.array | None, mx.array | None]  # encoded prompts and negative ones `[prompts, tokens, features]`


@dataclass
class Run:
    """What the phases of a run share. Build it where the run has its `turn`, as memory is measured from there on.

    An image is decoded when its denoising ends, if the plan has the VAE beside the transformer. Else all are decoded
    after the transformer has made room; until then `unfinished` keeps their tokens. A run that is cut short still
    decodes what is denoised, and what cuts it short takes the images along (see `make`).

    Args:
        networks: what computes.
        variant: the model's row of the table.
        request: the settings.
        planned: what the run may take.
        edit: the pictures.
        prompt_cache: keeps encoded prompts.
        unfinished: keeps what is denoised and not yet decoded.
        output_type: `pil`, `np` or `latent`.
        on_progress: hears of everything.
        output: is filled in.
    """

    networks: Networks
    variant: Variant
    request: Request
    planned: Plan
    edit: Edit = field(default_factory=Edit)
    prompt_cache: EmbeddingCache | None = None
    unfinished: Waiting | None = None
    output_type: str = "pil"
    on_progress: OnProgress = lambda progress: None
    output: Flux2Output = field(default_factory=Flux2Output)

    def __post_init__(self):
        self._meter = Meter(self.output.timings, self.planned, self.networks.reading)
        self._components = self.networks.checkpoint.components
        self._images: dict[int, Any] = {}
        self._vae: VAE | None = None

    def make(
        self,
        latents: mx.array | None = None,
        prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
    ) -> Flux2Output:
        """The images of the request.

        If some are finished when an exception ends the run, that has them as its `partial_output`.

        Args:
            latents: noise in place of that of the seeds, `[B, 4c, h, w]`.
            prompt_embeds: encoded prompts in place of the request's, `[prompts, tokens, features]`.
            negative_prompt_embeds: the same for the negative prompts.
        """
        try:
            self._make(latents, (prompt_embeds, negative_prompt_embeds))
        except BaseException as error:
            if self._images:
                error.partial_output = self.output
                error.add_note(f"{len(self._images)} finished images are in the exception's partial_output")
            raise
        finally:
            if self._images:
                self.output.seeds = [self.request.seeds[place] for place in sorted(self._images)]
                self.output.images = self._joined()
        return self.output

    def _make(self, latents: mx.array | None, given: Given) -> None:
        waiting = {} if self.unfinished is None else self.unfinished.kept()
        missing = [image for image in range(len(self.request.seeds)) if image not in waiting]
        try:
            if missing:
                self._make_tokens(missing, latents, given, waiting)
            self._finish(waiting)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # or the transformer would stay in memory
            self._finish(waiting)
            raise

    def encode(self, prompts: Sequence[str]) -> dict[str, mx.array]:
        """Text states `[L, C]` of each prompt, in a phase of their own."""
        with self._meter.phase("text_encoder"):
            return self._encode(prompts)

    def _make_tokens(self, images: list[int], latents: mx.array | None, given: Given, waiting: Tokens) -> None:
        """Denoise `images`; those that can't be decoded beside the transformer are added to `waiting`."""
        with self._meter.phase("text_encoder"):
            embeds, negatives = self._text_states(images, given)
        encoded = None
        if self.edit.references:
            self._warn()
            with self._meter.phase("vae_encoder"):
                encoded = self._encoded()
        self._warn_of_long_operations()
        with self._meter.phase("transformer"):
            self._denoise(images, latents, embeds, negatives, encoded, waiting)
            self._vae = None

    def _text_states(self, images: list[int], given: Given) -> tuple[Tokens, Tokens]:
        """States `[L, C]` of the prompts that `images` need, and of their negative ones if there are any, by number."""
        numbers = list(dict.fromkeys(image // self.request.images_per_prompt for image in images))
        kinds = list(zip((self.request.prompts, self.request.negative_prompts), given, strict=True))
        prompts = [texts[number] for texts, embeds in kinds if texts and embeds is None for number in numbers]
        states = self._encode(prompts) if prompts else {}

        def of(texts: Sequence[str], embeds: mx.array | None) -> Tokens:
            if embeds is not None:
                return {number: cast(embeds[number], self.networks.dtype) for number in numbers}
            return {number: states[texts[number]] for number in numbers if texts}

        return of(*kinds[0]), of(*kinds[1])

    def _encode(self, prompts: Sequence[str]) -> dict[str, mx.array]:
        distinct, length = list(dict.fromkeys(prompts)), self.request.max_sequence_length
        self.on_progress(Progress("text_encoder", 0, len(distinct)))
        checkpoint, dtype = self.networks.checkpoint, self.networks.dtype_of("text_encoder")
        load = partial(self.networks.load, "text_encoder", self.planned)
        encoder = CachedEncoder(checkpoint, self.networks.text_quant, dtype, self.prompt_cache, load)
        states = {}
        for done, prompt in enumerate(distinct, 1):
            count = checkpoint.tokenizer.count(prompt)
            if count > length:
                _log.warning("the prompt takes %d tokens, the model sees the first %d: %.40s…", count, length, prompt)
            encoded = encoder(*checkpoint.tokenizer([prompt], length))
            check_finite(encoded, "text encoder")
            states[prompt] = cast(encoded, self.networks.dtype)
            del encoded
            mx.eval(states[prompt])  # or both dtypes would stay in memory
            self.on_progress(Progress("text_encoder", done, len(distinct)))
        return states

    def _warn(self) -> None:
        if self.edit.canvas is not None and self.edit.canvas.keeps_nothing:
            _log.warning("the mask is white all over, so nothing of the image is kept")
        height, width = self._grid
        count, limit = height * width + sum(self.edit.token_counts(self._token_size)), self.variant.max_image_tokens
        if count > limit:
            _log.warning(
                "the image and its references are %d tokens, %s is recommended for %d; use fewer or smaller images",
                count,
                self.variant.name,
                limit,
            )

    def _warn_of_long_operations(self) -> None:
        seconds = dispatch_seconds(self.planned.longest)
        if seconds is not None and seconds > MOST_DISPATCH:
            _log.warning(
                "an operation takes this GPU about %.1f s, and macOS may stop it; let the display sleep, or choose a "
                "smaller image or fewer references",
                seconds,
            )

    def _encoded(self) -> EncodedEdit:
        self.on_progress(Progress("vae_encoder", 0, len(self.edit.references)))
        dtype = self.networks.dtype_of("vae")
        return encode_images(self.networks.load("vae"), self.edit, dtype, self.on_progress)

    def _denoise(
        self,
        images: list[int],
        latents: mx.array | None,
        embeds: Tokens,
        negatives: Tokens,
        encoded: EncodedEdit | None,
        waiting: Tokens,
    ) -> None:
        noise = self._noise(images, latents)
        sources = 0 if encoded is None else len(encoded.ids)
        batches = passes(images, len(noise[images[0]]) + sources)
        total = self.request.steps * len(batches)
        self.on_progress(Progress("transformer", 0, total))
        transformer, dtype = self.networks.load("transformer", self.planned), self.networks.dtype
        kv_cache = self.variant.kv_cache
        conditioning = condition(
            transformer, self.request, self._grid, embeds, negatives, encoded, dtype, kv_cache=kv_cache
        )

        def on_step(done: int, step: Step, batch: Sequence[int]) -> mx.array | None:
            preview = partial(self._preview, step) if self.planned.beside else None
            return self.on_progress(Progress("transformer", done, total, step, batch, preview=preview))

        for tokens in denoise_images(transformer, self.request, batches, noise, conditioning, encoded, dtype, on_step):
            waiting.update(tokens)
            if self.planned.beside:
                self._finish(waiting)
            elif self.unfinished is not None and len(images) > 1:
                self.unfinished.keep(tokens)

    def _noise(self, images: list[int], latents: mx.array | None) -> Tokens:
        """Noise tokens `[L, C]` of each image, float32."""
        channels = self._components["transformer"].config.in_channels
        if latents is None:
            noise = mx.array(initial_noise([self.request.seeds[image] for image in images], channels, *self._grid))
        else:
            noise = latents[mx.array(images)].astype(mx.float32)
        tokens = noise.reshape(len(images), channels, -1).transpose(0, 2, 1)
        return dict(zip(images, tokens, strict=True))

    def _preview(self, step: Step) -> list[Image.Image]:
        with self._meter.phase("vae"):
            return [self._decoded(tokens, self._decoder()) for tokens in step.estimate]

    def _decoder(self) -> VAE:
        if self._vae is None:
            self._vae = self.networks.load("vae")
        return self._vae

    def _decoded(self, tokens: mx.array, vae: VAE) -> Image.Image:
        pixels = decode_image(vae, tokens, self._grid, self.networks.dtype_of("vae"))
        return finished_image(pixels, self.edit)

    def _finish(self, waiting: Tokens) -> None:
        """Make images of tokens, which are taken away one after the other. One that fails is no obstacle to others."""
        if not waiting:
            return
        failure = None
        with self._meter.phase("vae"):
            self.on_progress(Progress("vae", len(self._images), len(self.request.seeds)))
            vae = self._decoder()
            for place in sorted(waiting):
                try:
                    self._finish_one(place, waiting[place], vae)
                except Exception as error:
                    failure = failure or error
                del waiting[place]
        if failure is not None:
            raise failure

    def _finish_one(self, place: int, tokens: mx.array, vae: VAE) -> None:
        image = None
        if self.output_type == "latent":
            self._images[place] = latents_of(vae, tokens, self._grid)
        elif self.output_type == "np":
            self._images[place] = decode_image(vae, tokens, self._grid, self.networks.dtype_of("vae"))
        else:
            # Eight bits at once, or many images would take their size in float32.
            self._images[place] = image = self._decoded(tokens, vae)
        self.on_progress(Progress("vae", len(self._images), len(self.request.seeds), images=(place,), image=image))
        if self.unfinished is not None:
            self.unfinished.drop(place)

    def _joined(self) -> Any:
        images = [self._images[place] for place in sorted(self._images)]
        if self.output_type == "pil":
            return images
        pixels = np.concatenate(images)
        return pixels.transpose(0, 3, 1, 2) if self.output_type == "latent" else to_unit(pixels)

    @property
    def _token_size(self) -> int:
        return self._components["vae"].config.token_size

    @property
    def _grid(self) -> tuple[int, int]:
        """Height and width of the image in tokens."""
        return self.request.height // self._token_size, self.request.width // self._token_size
