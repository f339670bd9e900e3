"""One run: from prompts and pictures to images, phase by phase."""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from traceback import walk_tb
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .branches import range_errors
from .cached_encoder import CachedEncoder
from .device import failures, foreign
from .embedding_cache import EmbeddingCache
from .images import to_pil, to_unit
from .latents import EncodedEdit, decode_latents, decode_tokens, encode_picture, latents_of
from .layers import cast, check_finite
from .memory import passes
from .metering import Phases, end_with_process, warn_of_long_operations
from .networks import Networks
from .noise import initial_noise
from .output import Flux2Output
from .previews import Shown, by_vae
from .references import Edit, to_pixels
from .request import OnProgress, Preview, Progress, Request, Step
from .sampling import Conditions, Denoiser, Painting, beside, by_step, denoise, guided, read
from .scheduler import noise_levels
from .step_cache import StepCaches
from .transformer import Flux2Transformer, image_ids
from .unfinished import Waiting
from .vae import VAE

_log = logging.getLogger(__name__)
Texts = dict[int, mx.array]  # states `[L, F]` of prompts by their numbers


@dataclass
class Run:
    """A run that makes images.

    An image is decoded when its denoising ends, if the plan has the VAE beside the transformer. Else all are decoded
    after the transformer has made room; until then `unfinished` keeps their tokens. A run that is cut short still
    decodes what is denoised, and what cuts it short takes the images along (see `make`).

    Args:
        networks: what computes.
        phases: what each phase may take; see `running`.
        request: the settings.
        edit: the pictures.
        prompt_cache: keeps encoded prompts.
        unfinished: keeps what is denoised and not yet decoded.
        views: gives `preview` and `sketch` of a step (see `Progress`), given its estimate and the VAE's preview.
        output_type: `pil`, `np` or `latent`.
        on_progress: hears of everything.
        output: is filled in. Its timings are what `phases` fills in.
    """

    networks: Networks
    phases: Phases
    request: Request
    edit: Edit = field(default_factory=Edit)
    prompt_cache: EmbeddingCache | None = None
    unfinished: Waiting | None = None
    views: Callable[[mx.array, Preview | None], Shown] = by_vae
    output_type: str = "pil"
    on_progress: OnProgress = lambda progress: None
    output: Flux2Output = field(default_factory=Flux2Output)
    # Tokens `[L, C]` of images that wait for their decoding, what they have become, and what decodes them.
    _denoised: dict[int, mx.array] = field(default_factory=dict, init=False)
    _images: dict[int, Any] = field(default_factory=dict, init=False)
    _vae: VAE | None = field(default=None, init=False)

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
            negative_prompt_embeds: encoded negative prompts in place of the request's, of that form too.
        """
        try:
            # Here, or another exception would leave without the images.
            with failures(), range_errors(self.networks.adapters):
                self._make(latents, prompt_embeds, negative_prompt_embeds)
        except BaseException as error:
            if self._images:
                error.partial_output = self.output  # type: ignore[attr-defined]  # whatever ends the run
                error.add_note(f"{len(self._images)} finished images are in the exception's partial_output")
            raise
        finally:
            if self._images:
                self.output.seeds = [self.request.seeds[place] for place in sorted(self._images)]
                self.output.images = self._joined()
        return self.output

    def encode(self, prompts: Sequence[str]) -> dict[str, mx.array]:
        """Text states `[L, F]` of each prompt, in a phase of their own."""
        with range_errors(self.networks.adapters), self.phases.enter("text_encoder"):
            return self._encode(prompts)

    def decode(self, latents: mx.array) -> np.ndarray:
        """Images `[B, H, W, 3]` in 0..1 of un-normalised latents `[B, H/8, W/8, c]`, in a phase of their own."""
        with self.phases.enter("vae"):
            vae, dtype, strips = self._decoder(), self.networks.dtype_of("vae"), self.phases.strip_bytes
            return np.concatenate([to_unit(decode_latents(vae, x[None].astype(dtype), strips)) for x in latents])

    def preview(self, tokens: mx.array) -> list[Image.Image]:
        """Images of the tokens `[B, L, C]` of a step, in a phase of their own, which may interrupt another."""
        with failures(), self.phases.enter("vae"):
            return [self._decoded(image, self._decoder()) for image in tokens]

    def _make(self, latents: mx.array | None, *embeds: mx.array | None) -> None:
        if self.unfinished is not None:
            self._denoised = self.unfinished.kept()
        missing = [image for image in range(len(self.request.seeds)) if image not in self._denoised]
        try:
            if missing:
                self._make_tokens(missing, latents, *embeds)
            self._finish()
        except BaseException as error:
            _empty(error)
            self._finish()
            raise

    def _make_tokens(self, images: list[int], latents: mx.array | None, *embeds: mx.array | None) -> None:
        """Denoise `images`, and decode them if that can be done beside the transformer."""
        with self.phases.enter("text_encoder"):
            texts, negatives = self._texts(images, *embeds)
        encoded = None
        if self.edit.references:
            self._warn_of_pictures()
            with self.phases.enter("vae_encoder"):
                encoded = self._encoded()
        warn_of_long_operations(self.phases.longest, "a smaller image or fewer references")
        with self.phases.enter("transformer"):
            self._denoise(images, latents, texts, negatives, encoded)
            self._vae = None

    def _texts(
        self, images: list[int], prompt_embeds: mx.array | None, negative_prompt_embeds: mx.array | None
    ) -> tuple[Texts, Texts]:
        """States of the prompts that `images` need, and of their negative ones if there are any."""
        numbers = list(dict.fromkeys(map(self._number, images)))
        prompts = self.request.prompts if prompt_embeds is None else ()
        negatives = self.request.negative_prompts if negative_prompt_embeds is None else ()
        needed = [texts[number] for texts in (prompts, negatives) if texts for number in numbers]
        states = self._encode(needed) if needed else {}

        def of(texts: Sequence[str], embeds: mx.array | None) -> Texts:
            if embeds is not None:
                return {number: cast(embeds[number], self.networks.dtype) for number in numbers}
            return {number: states[texts[number]] for number in numbers if texts}

        return of(prompts, prompt_embeds), of(negatives, negative_prompt_embeds)

    def _encode(self, prompts: Sequence[str]) -> dict[str, mx.array]:
        distinct = list(dict.fromkeys(prompts))
        self._tell(Progress("text_encoder", 0, len(distinct)))
        encoder = CachedEncoder(
            self.networks.checkpoint,
            self.networks.text_quant,
            self.networks.dtype_of("text_encoder"),
            self.prompt_cache,
            lambda: self.networks.load("text_encoder", self.phases.planned("text_encoder")),
        )
        states = {}
        for done, prompt in enumerate(distinct, 1):
            states[prompt] = self._encoded_prompt(encoder, prompt)
            self._tell(Progress("text_encoder", done, len(distinct)))
        return states

    def _encoded_prompt(self, encoder: CachedEncoder, prompt: str) -> mx.array:
        tokenizer = self.networks.checkpoint.tokenizer
        length = self.request.max_sequence_length
        ids = tokenizer.ids(prompt)
        if len(ids) > length:
            _log.warning("the prompt takes %d tokens, the model sees the first %d: %.40s…", len(ids), length, prompt)
        encoded = encoder(*tokenizer.padded([ids], length))
        check_finite(encoded, "text encoder")
        states = cast(encoded, self.networks.dtype)
        mx.eval(states)  # or both dtypes would stay in memory
        return states

    def _warn_of_pictures(self) -> None:
        if self.edit.canvas is not None and self.edit.canvas.keeps_nothing:
            _log.warning("the mask is white all over, so nothing of the image is kept")
        height, width = self._grid
        count = height * width + sum(self.edit.token_counts(self._token_size))
        limit = self.networks.checkpoint.variant.max_image_tokens
        if count > limit:
            _log.warning(
                "the image and its references are %d tokens, %s is recommended for %d; use fewer or smaller images",
                count,
                self.networks.checkpoint.variant.name,
                limit,
            )

    def _encoded(self) -> EncodedEdit:
        count = len(self.edit.references)
        self._tell(Progress("vae_encoder", 0, count))
        vae, dtype, strips = self.networks.load("vae"), self.networks.dtype_of("vae"), self.phases.strip_bytes
        pictures = []
        for number, image in enumerate(self.edit.references, 1):
            pictures.append(encode_picture(vae, to_pixels(image), number, dtype, strips))
            self._tell(Progress("vae_encoder", number, count))
        canvas = self.edit.canvas
        return EncodedEdit.of(pictures, canvas is not None, None if canvas is None else canvas.tokens)

    def _denoise(
        self,
        images: list[int],
        latents: mx.array | None,
        texts: Texts,
        negatives: Texts,
        encoded: EncodedEdit | None,
    ) -> None:
        height, width = self._grid
        batches = passes(images, height * width + (0 if encoded is None else len(encoded.references.ids)))
        total = self.request.steps * len(batches)
        self._tell(Progress("transformer", 0, total))
        networks = self.networks.of_run()
        transformer = networks.load("transformer", self.phases.planned("transformer"))
        adapters = networks.checkpoint.components["transformer"].adapters
        make = partial(self._conditions, transformer, [*texts.values(), *negatives.values()], encoded)
        make_once = cache(make)
        for done, batch in enumerate(batches):
            if adapters is not None and adapters.has_steps:
                denoiser = by_step(partial(self._denoiser, make, batch, texts, negatives, encoded), adapters.at)
            else:
                denoiser = self._denoiser(make_once, batch, texts, negatives, encoded)
            steps = self._steps(batch, denoiser, latents, encoded)
            tokens = dict(zip(batch, self._stepped(steps, batch, done * self.request.steps, total), strict=True))
            self._denoised |= tokens
            if self.phases.beside:
                self._finish()
            elif self.unfinished is not None and len(images) > 1:
                self.unfinished.keep(tokens)

    def _conditions(
        self, transformer: Flux2Transformer, texts: Sequence[mx.array], encoded: EncodedEdit | None
    ) -> Conditions:
        dtype = self.networks.dtype
        guidance = mx.array([self.request.guidance]) if transformer.config.guidance_embeds else None
        past = along = None
        if encoded is not None and self.networks.checkpoint.variant.kv_cache:
            past = read(transformer, encoded.references, dtype, guidance, self.phases.execution)
        elif encoded is not None:
            along = encoded.references.ids
        caches = StepCaches(self.request.step_cache, self.output.passes, self.networks.reading)
        of_run = partial(Conditions, transformer, dtype, image_ids(*self._grid), texts, cached=caches.of)
        return of_run(guidance=guidance, past=past, along=along, execution=self.phases.execution)

    def _denoiser(
        self,
        make: Callable[[], Conditions],
        images: Sequence[int],
        texts: Texts,
        negatives: Texts,
        encoded: EncodedEdit | None,
    ) -> Denoiser:
        """The denoiser of the steps of `images`, guided away from `negatives` if there are any."""
        conditions = make()

        def of(texts: Texts) -> Denoiser:
            denoiser = conditions.denoiser([texts[self._number(image)] for image in images])
            if encoded is None or self.networks.checkpoint.variant.kv_cache:
                return denoiser
            return beside(denoiser, encoded.references.tokens)

        return guided(of(texts), of(negatives), self.request.guidance) if negatives else of(texts)

    def _steps(
        self, images: Sequence[int], denoiser: Denoiser, latents: mx.array | None, encoded: EncodedEdit | None
    ) -> Generator[Step, Any, mx.array]:
        """The steps of `images`, from the noise of their seeds or from `latents`."""
        noise = self._noise(images, latents)
        if encoded is None or encoded.source is None:
            return denoise(denoiser, noise, self._sigmas)
        painting = Painting(encoded.source, noise, encoded.mask)
        return denoise(denoiser, painting.at(float(self._sigmas[0])), self._sigmas, painting.kept)

    def _stepped(
        self, steps: Generator[Step, Any, mx.array], images: Sequence[int], before: int, total: int
    ) -> mx.array:
        """The tokens `[B, L, C]` of `images` after all `steps`. Of the run's `total`, `before` were done already."""
        step = next(steps)
        while True:
            end_with_process()
            shown = self.views(step.estimate, partial(self.preview, step.estimate) if self.phases.beside else None)
            replaced = self._tell(Progress("transformer", before + step.number, total, step, images, None, *shown))
            try:
                step = steps.send(replaced)
            except StopIteration as end:
                return end.value

    def _noise(self, images: Sequence[int], latents: mx.array | None) -> mx.array:
        """Noise tokens `[B, L, C]`, float32."""
        channels = self.networks.checkpoint.components["transformer"].config.in_channels
        if latents is None:
            noise = mx.array(initial_noise([self.request.seeds[image] for image in images], channels, *self._grid))
        else:
            noise = latents[mx.array(list(images))].astype(mx.float32)
        return noise.reshape(len(images), channels, -1).transpose(0, 2, 1)

    def _decoder(self) -> VAE:
        self._vae = self._vae or self.networks.load("vae")
        return self._vae

    def _finish(self) -> None:
        """Make images of what is denoised, one after the other. One that fails is no obstacle to others."""
        if not self._denoised:
            return
        failure = None
        with self.phases.enter("vae"):
            self._tell(Progress("vae", len(self._images), len(self.request.seeds)))
            vae = self._decoder()
            for place in sorted(self._denoised):
                try:
                    self._finish_one(place, vae)
                except Exception as error:
                    failure = failure or error
                del self._denoised[place]
        if failure is not None:
            raise failure

    def _finish_one(self, place: int, vae: VAE) -> None:
        tokens = self._denoised[place]
        image = None
        if self.output_type == "latent":
            self._images[place] = latents_of(vae, tokens, self._grid)
        elif self.output_type == "np":
            self._images[place] = self._pixels(tokens, vae)
        else:
            # Eight bits at once, or many images would take their size in float32.
            self._images[place] = image = self._decoded(tokens, vae)
        self._tell(Progress("vae", len(self._images), len(self.request.seeds), images=(place,), image=image))
        if self.unfinished is not None:
            self.unfinished.drop(place)

    def _decoded(self, tokens: mx.array, vae: VAE) -> Image.Image:
        return self.edit.finished(to_pil(to_unit(self._pixels(tokens, vae)))[0])

    def _pixels(self, tokens: mx.array, vae: VAE) -> np.ndarray:
        return decode_tokens(vae, tokens, self._grid, self.networks.dtype_of("vae"), self.phases.strip_bytes)

    def _joined(self) -> Any:
        images = [self._images[place] for place in sorted(self._images)]
        if self.output_type == "pil":
            return images
        pixels = np.concatenate(images)
        return pixels.transpose(0, 3, 1, 2) if self.output_type == "latent" else to_unit(pixels)

    def _tell(self, progress: Progress) -> mx.array | None:
        with foreign():
            return self.on_progress(progress)

    def _number(self, image: int) -> int:
        """The number of the prompt of an image."""
        return image // self.request.images_per_prompt

    @cached_property
    def _sigmas(self) -> np.ndarray:
        length = self._grid[0] * self._grid[1]
        levels = noise_levels(self.request.schedule_steps, length, self.request.sigmas, self.request.shift_steps)
        return levels[-self.request.steps - 1 :]

    @property
    def _token_size(self) -> int:
        return self.networks.checkpoint.components["vae"].config.token_size

    @property
    def _grid(self) -> tuple[int, int]:
        """Height and width of the image in tokens."""
        return self.request.height // self._token_size, self.request.width // self._token_size


def _empty(error: BaseException) -> None:
    """Give back the transformer, and what its blocks were computing when `error` was raised.

    No scope could do that: the error's traceback holds the frames that it has left, down into the blocks, for as long
    as it is handled. A caller's function, which comes last, keeps what it holds.
    """
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code is Run._tell.__code__:
            break
        with suppress(RuntimeError):  # the first one is still running
            frame.clear()
