"""`Flux2Pipeline`: from prompts to images."""

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .checkpoint import PAINTING, Checkpoint
from .convert import find_checkpoint, models_folder
from .embedding_cache import FOLDER, CachedEncoder, EmbeddingCache
from .errors import CheckpointError, InputError
from .images import to_pil, to_unit
from .layers import activation_dtype
from .noise import initial_noise
from .quantization import DEFAULT_TEXT_QUANT, check_quant, loadable_quant
from .sampling import Conditioning, Request, Step, denoise
from .scheduler import noise_levels
from .transformer import image_ids, rope_table, text_ids
from .upsampling import Writer

_OUTPUT_TYPES = ("pil", "np", "latent")
# Small images share a pass up to this many image tokens, those of one 1024×1024 image. Larger passes would need
# more memory and be no faster.
_TOKENS_PER_PASS = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """What one phase of a run took: seconds, and peak memory in bytes."""

    name: str
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of a phase. `step` is set after a denoising step, for the images at `images`."""

    phase: str
    done: int
    total: int
    step: Step | None = None
    images: range = range(0)


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
def measured(name: str, timings: list[Phase]) -> Iterator[None]:
    """Add what a phase took to `timings`, and give its memory back at the end."""
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    yield
    timings.append(Phase(name, time.perf_counter() - start, mx.get_peak_memory()))
    gc.collect()
    mx.clear_cache()


OnProgress = Callable[[Progress], mx.array | None]


class Flux2Pipeline:
    """Text to image with a FLUX.2 model. Networks are loaded for their phase of a run and released after it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        quant: str,
        text_quant: str,
        dtype: mx.Dtype,
        prompt_cache: EmbeddingCache | None = None,
    ):
        self.checkpoint = checkpoint
        self.variant = checkpoint.variant
        self.quant = quant
        self.text_quant = text_quant
        self.dtype = dtype
        self.prompt_cache = prompt_cache
        self.tokenizer = checkpoint.tokenizer

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        variant: str | None = None,
        quant: str | None = None,
        text_quant: str | None = None,
        dtype: str | None = None,
        models_dir: str | os.PathLike | None = None,
        prompt_cache: bool = True,
    ) -> "Flux2Pipeline":
        """Open a model; fetch and convert it first if that has not been done yet.

        Args:
            source: `demo` or another variant's name, a Hugging Face repo id, a diffusers folder, or an MLX
                checkpoint folder.
            variant: the model's name where the source can't tell.
            quant: `bf16`, `qint8` or `qint4` for the transformer; None: as stored, or `bf16` when converting.
            text_quant: the same for the text encoder; None: as stored, or 8 bit (4 bit with `qint4`).
            dtype: `float32`, `bfloat16` or `float16` for activations; None: float32 on a CPU, else bfloat16.
            models_dir: where converted models are kept; None: `$FLUX2_MLX_HOME` or `~/.cache/flux2-mlx`.
            prompt_cache: keep encoded prompts in the folder `prompts` there, so that a prompt seen before needs no
                text encoder.

        Raises:
            InputError: a setting is wrong. CheckpointError: the model is damaged. DownloadError: it can't be fetched.
        """
        activation_dtype(dtype)
        for setting in filter(None, (quant, text_quant)):
            check_quant(setting)
        folder = find_checkpoint(
            str(source), variant=variant, quant=quant, text_quant=text_quant, models_dir=models_dir
        )
        checkpoint = Checkpoint.open(folder)
        if not checkpoint.components.keys() >= set(PAINTING):
            raise CheckpointError(f"{folder} holds a language model only; it can't make images")
        if quant is not None and text_quant is None:
            text_quant = DEFAULT_TEXT_QUANT[quant] if checkpoint.text_quant == "bf16" else checkpoint.text_quant
        return cls(
            checkpoint,
            loadable_quant("transformer", checkpoint.quant, quant),
            loadable_quant("text encoder", checkpoint.text_quant, text_quant),
            activation_dtype(dtype),
            EmbeddingCache(models_folder(models_dir) / FOLDER) if prompt_cache else None,
        )

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        num_images_per_prompt: int = 1,
        latents: Any = None,
        prompt_embeds: Any = None,
        max_sequence_length: int | None = None,
        sigmas: Sequence[float] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[["Flux2Pipeline", int, float, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> Flux2Output:
        """Make images. None means the variant's default.

        Args:
            prompt: one or several prompts; left out only with `prompt_embeds`.
            height: pixels, a multiple of 16.
            width: pixels, a multiple of 16.
            num_inference_steps: denoising steps.
            guidance_scale: embedded guidance (dev) or the CFG scale (base models); distilled models ignore it.
            seed: of the first image, 0 … 2^64 − 1; image k has seed + k. None: random.
            num_images_per_prompt: images for each prompt.
            latents: noise to start from, `[B, 4c, H/16, W/16]`, in place of the seeds' noise.
            prompt_embeds: what `encode_prompt` gives, one row a prompt, in place of `prompt`.
            max_sequence_length: text tokens that the transformer sees, at most the variant's.
            sigmas: noise levels before the shift, in place of the even grid.
            output_type: `pil`; `np`: float32 `[B, H, W, 3]` in 0..1; `latent`: `[B, c, H/8, W/8]`, un-normalised.
            callback_on_step_end: called as `(pipe, step, timestep, {"latents": tokens})` after every step, with
                the timestep that it started from, in 0..1000, and tokens `[b, L, 4c]`; `latents` of the dict it
                returns are gone on with.

        Raises:
            InputError: a setting is wrong.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if (prompt is None) == (prompt_embeds is None):
            raise InputError("give either prompt or prompt_embeds")
        if prompt_embeds is not None:
            prompt_embeds = mx.array(prompt_embeds)
            features = self.checkpoint.components["text_encoder"].config.output_size
            if prompt_embeds.ndim != 3 or prompt_embeds.shape[-1] != features:
                raise InputError(f"prompt_embeds must be [prompts, tokens, {features}], got {prompt_embeds.shape}")
            prompts, max_sequence_length = [""] * len(prompt_embeds), prompt_embeds.shape[1]
        request = self.request(
            prompts,
            height=height,
            width=width,
            steps=num_inference_steps,
            guidance=guidance_scale,
            seed=seed,
            images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            sigmas=sigmas,
        )

        def on_progress(progress: Progress) -> mx.array | None:
            if progress.step is None or callback_on_step_end is None:
                return None
            step = progress.step
            returned = callback_on_step_end(self, step.number - 1, 1000 * step.from_sigma, {"latents": step.tokens})
            return (returned or {}).get("latents")

        return self.run(
            request, latents=latents, prompt_embeds=prompt_embeds, output_type=output_type, on_progress=on_progress
        )

    def request(self, prompts: Sequence[str], **settings: Any) -> Request:
        """Checked settings for `run`; the names are those of `Request.checked`."""
        return Request.checked(self.variant, self._token_size, prompts, **settings)

    def run(
        self,
        request: Request,
        *,
        latents: Any = None,
        prompt_embeds: mx.array | None = None,
        output_type: str = "pil",
        on_progress: OnProgress = lambda progress: None,
    ) -> Flux2Output:
        """Make the images of `request`. `on_progress` hears of every phase, step and image; after a step it may
        return tokens to go on from, and it may raise to cancel."""
        if output_type not in _OUTPUT_TYPES:
            raise InputError(f"unknown output_type {output_type!r}; choose one of {', '.join(_OUTPUT_TYPES)}")
        tokens = self._initial_tokens(request, latents)
        output = Flux2Output(seeds=list(request.seeds))
        with measured("text_encoder", output.timings):
            embeds, negative = self._text_states(request, prompt_embeds, on_progress)
        with measured("transformer", output.timings):
            tokens = self._denoise(request, tokens, embeds, negative, on_progress)
        with measured("vae", output.timings):
            output.images = self._decode(request, tokens, output_type, on_progress)
        return output

    def encode_prompt(self, prompt: str | Sequence[str], max_sequence_length: int | None = None) -> mx.array:
        """Text states `[B, L, C]` for the transformer, padding included."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        length = self.request(prompts, max_sequence_length=max_sequence_length).max_sequence_length
        states = self._encode(prompts, length, lambda progress: None)
        return mx.stack([states[p] for p in prompts])

    def writer(self) -> Writer:
        """The model's own language model: dev's sees images, klein's does not."""
        return Writer(self.checkpoint, self.text_quant, self.dtype)

    def upsample_prompt(
        self,
        prompt: str | Sequence[str],
        images: Sequence[Image.Image] = (),
        *,
        vision: Writer | None = None,
        **settings,
    ) -> list[str]:
        """Prompts rewritten with more detail or, with RGB `images` to edit, as clear instructions.

        `vision` looks at images where this model can't (see `Writer.from_pretrained`); `settings` are those of
        `Writer.write`.
        """
        writer = vision if images and vision is not None else self.writer()
        return writer.upsample([prompt] if isinstance(prompt, str) else prompt, images, **settings)

    def describe_image(self, image: Image.Image, *, vision: Writer | None = None, **settings) -> str:
        """What is to be seen in an RGB image; arguments as for `upsample_prompt`."""
        return (vision or self.writer()).describe([image], **settings)[0]

    def preview(self, request: Request, tokens: mx.array) -> list[Image.Image]:
        """Images from the tokens of a step, such as its `estimate`."""
        return self._decode(request, list(tokens), "pil", lambda progress: None)

    @property
    def _token_size(self) -> int:
        return self.checkpoint.components["vae"].config.token_size

    def _load(self, name: str) -> Any:
        quants = {"transformer": self.quant, "text_encoder": self.text_quant, "vae": "bf16"}
        return self.checkpoint.components[name].load(self.dtype, quants[name])

    def _initial_tokens(self, request: Request, latents: Any) -> list[mx.array]:
        """Noise tokens `[L, C]` of each image, float32."""
        channels = self.checkpoint.components["transformer"].config.in_channels
        shape = (len(request.seeds), channels, request.height // self._token_size, request.width // self._token_size)
        if latents is None:
            noise = initial_noise(request.seeds, *shape[1:])
        else:
            noise = np.array(mx.array(latents).astype(mx.float32))
            if noise.shape != shape:
                raise InputError(f"latents have shape {noise.shape}, this run needs {shape}")
        return list(mx.array(noise.reshape(*shape[:2], -1).transpose(0, 2, 1)))

    def _text_states(
        self, request: Request, prompt_embeds: mx.array | None, on_progress: OnProgress
    ) -> tuple[list[mx.array], mx.array | None]:
        """States `[L, C]` of each prompt, and those of the empty prompt if CFG needs them."""
        prompts = [] if prompt_embeds is not None else list(request.prompts)
        negatives = [""] if self.variant.uses_cfg and request.guidance > 1 else []
        states = {}
        if prompts or negatives:
            states = self._encode(prompts + negatives, request.max_sequence_length, on_progress)
        if prompt_embeds is None:
            embeds = [states[prompt] for prompt in prompts]
        else:
            embeds = list(prompt_embeds.astype(self.dtype))
        return embeds, states[""] if negatives else None

    def _encode(self, prompts: Sequence[str], length: int, on_progress: OnProgress) -> dict[str, mx.array]:
        distinct = list(dict.fromkeys(prompts))
        on_progress(Progress("text_encoder", 0, len(distinct)))
        load = partial(self._load, "text_encoder")
        encoder = CachedEncoder(self.checkpoint, self.text_quant, self.dtype, self.prompt_cache, load)
        states = {}
        for done, prompt in enumerate(distinct, 1):
            count = self.tokenizer.count(prompt)
            if count > length:
                _log.warning("the prompt takes %d tokens, the model sees the first %d: %.40s…", count, length, prompt)
            states[prompt] = encoder(*self.tokenizer([prompt], length))
            on_progress(Progress("text_encoder", done, len(distinct)))
        return states

    def _denoise(
        self,
        request: Request,
        tokens: list[mx.array],
        embeds: list[mx.array],
        negative: mx.array | None,
        on_progress: OnProgress,
    ) -> list[mx.array]:
        """Denoise all images, several small ones in one pass."""
        count, per_pass = len(tokens), max(1, _TOKENS_PER_PASS // len(tokens[0]))
        total = request.steps * -(-count // per_pass)
        on_progress(Progress("transformer", 0, total))
        transformer = self._load("transformer")
        config = self.checkpoint.components["transformer"].config
        height, width = request.height // self._token_size, request.width // self._token_size
        ids = np.concatenate([text_ids(embeds[0].shape[0]), image_ids(height, width)])
        rope = rope_table(ids, config)
        sigmas = noise_levels(request.steps, height * width, request.sigmas)
        projected = [transformer.txt_in(states) for states in embeds]
        negative = None if negative is None else transformer.txt_in(negative)
        finished: list[mx.array] = []
        done = 0
        for start in range(0, count, per_pass):
            images = range(start, min(start + per_pass, count))
            conditioning = Conditioning(
                mx.stack([projected[i // request.images_per_prompt] for i in images]),
                rope,
                None if negative is None else mx.broadcast_to(negative, (len(images), *negative.shape)),
                request.guidance,
                config.guidance_embeds,
            )
            batch = mx.stack(tokens[start : images.stop])
            steps = denoise(transformer, batch, conditioning, sigmas, self.dtype)
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

    def _decode(self, request: Request, tokens: list[mx.array], output_type: str, on_progress: OnProgress) -> Any:
        on_progress(Progress("vae", 0, len(tokens)))
        vae = self._load("vae")
        height, width = request.height // self._token_size, request.width // self._token_size
        decoded = []
        for done, image_tokens in enumerate(tokens, 1):
            latents = vae.from_tokens(image_tokens[None], height, width)
            result = latents if output_type == "latent" else vae.decode(latents.astype(self.dtype))
            decoded.append(np.array(result.astype(mx.float32)))
            on_progress(Progress("vae", done, len(tokens)))
        images = np.concatenate(decoded)
        if output_type == "latent":
            return images.transpose(0, 3, 1, 2)
        images = to_unit(images)
        return to_pil(images) if output_type == "pil" else images
