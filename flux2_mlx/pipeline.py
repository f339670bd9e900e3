"""`Flux2Pipeline`: from prompts to images."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image

from .checkpoint import Checkpoint
from .device import activation_dtype, memory_bytes
from .embedding_cache import FOLDER as PROMPTS
from .embedding_cache import EmbeddingCache
from .errors import InputError
from .memory import Plan
from .names import models_folder
from .networks import Networks
from .phases import Flux2Output, OnProgress, Progress, decode_image, finished_image, turn
from .quantization import check_quant
from .references import Edit
from .run import Run
from .sampling import Request
from .store import find_checkpoint
from .unfinished import FOLDER as UNFINISHED
from .unfinished import Unfinished
from .upsampling import Writer

_OUTPUT_TYPES = ("pil", "np", "latent")


class Flux2Pipeline:
    """Text and images to image with FLUX.2. Networks are loaded for their phase of a run and released after it."""

    def __init__(
        self, networks: Networks, prompt_cache: EmbeddingCache | None = None, unfinished: Unfinished | None = None
    ):
        self.networks = networks
        self.checkpoint = networks.checkpoint
        self.variant = networks.checkpoint.variant
        self.quant = networks.quant
        self.text_quant = networks.text_quant
        self.dtype = networks.dtype
        self.prompt_cache = prompt_cache
        self.unfinished = unfinished
        self.tokenizer = networks.checkpoint.tokenizer

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
        memory_limit: int | str | None = None,
    ) -> "Flux2Pipeline":
        """Open a model; fetch and convert it first if that has not been done yet.

        Args:
            source: `demo` or another model's name, a Hugging Face repo id or address, or a folder: one in the diffusers
                layout, of the Hub's cache, or an MLX checkpoint. Text is understood as `store.resolve` says, a `Path`
                is a path.
            variant: the model's name where the source can't tell.
            quant: `bf16`, `qint8` or `qint4` for the transformer; None: as stored, or `bf16` when converting.
            text_quant: the same for the text encoder; None: as stored, or 8 bit (4 bit with `qint4`).
            dtype: `float32`, `bfloat16` or `float16` for activations; None: float16 on M1 and M2,
                bfloat16 on later chips, float32 on a CPU. Under float16 all but the transformer is in bfloat16.
            models_dir: where converted models are kept; None: `$FLUX2_MLX_HOME` or `~/.cache/flux2-mlx`.
            prompt_cache: keep encoded prompts in the folder `prompts` there, so that a prompt seen before needs no
                text encoder, and denoised images that wait for their decoding in `unfinished`.
            memory_limit: bytes, or a size such as `"12GB"`, that a run stays within, if need be by reading blocks of
                the networks from disk at every step; None: what the machine has.

        Raises:
            InputError: a setting is wrong. CheckpointError: the model is damaged. DownloadError: it can't be fetched.
        """
        wanted = {"dtype": activation_dtype(dtype), "memory_limit": memory_bytes(memory_limit)}
        for setting in filter(None, (quant, text_quant)):
            check_quant(setting)

        def check(checkpoint: Checkpoint) -> None:
            Networks.of(checkpoint, quant, text_quant, **wanted).check_possible()

        folder = find_checkpoint(
            source, variant=variant, quant=quant, text_quant=text_quant, models_dir=models_dir, check=check
        )
        settings = {"quant": quant, "text_quant": text_quant, "dtype": dtype, "memory_limit": memory_limit}
        return cls.from_checkpoint(folder, **settings, models_dir=models_dir, prompt_cache=prompt_cache)

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path,
        *,
        quant: str | None = None,
        text_quant: str | None = None,
        dtype: str | None = None,
        models_dir: str | os.PathLike | None = None,
        prompt_cache: bool = True,
        memory_limit: int | str | None = None,
    ) -> "Flux2Pipeline":
        """Open an MLX checkpoint folder, such as `find_checkpoint` gives; the settings are those of
        `from_pretrained`."""
        wanted = {"dtype": activation_dtype(dtype), "memory_limit": memory_bytes(memory_limit)}
        networks = Networks.of(Checkpoint.open(folder), quant, text_quant, **wanted)
        if not prompt_cache:
            return cls(networks)
        folder = models_folder(models_dir)
        return cls(networks, EmbeddingCache(folder / PROMPTS), Unfinished(folder / UNFINISHED))

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Image.Image | Sequence[Image.Image] | None = None,
        mask_image: Image.Image | None = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
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
            image: reference images that the model sees, each at least 64 pixels a side and at most 8 times as long as
                wide. Above 1024² pixels they are scaled down, and cut to multiples of 16 in the middle.
            mask_image: of the size of the first image, which is then painted over where the mask is white; `pil`
                output has the original's size and its very pixels elsewhere. Transparent is black.
            strength: above 0 to 1: the first image is what the run starts from, noisier the greater. All
                `num_inference_steps` are taken, at the end of a longer schedule.
            padding_mask_crop: work on the mask's surroundings only, with so many pixels around it.
            height: pixels, a multiple of 16; None: the first image's. With a mask or strength it can't be chosen.
            width: the same.
            num_inference_steps: denoising steps; with `sigmas`, what their shift is worked out for (None: 50).
            guidance_scale: embedded guidance (dev) or the CFG scale (base models); distilled models ignore it.
            seed: of the first image, 0 … 2^64 − 1; image k has seed + k. None: random.
            num_images_per_prompt: images for each prompt.
            latents: noise to start from, `[B, 4c, H/16, W/16]`, in place of the seeds' noise.
            prompt_embeds: what `encode_prompt` gives, one row a prompt, in place of `prompt`.
            max_sequence_length: text tokens of a prompt that the transformer sees, at most the variant's. Embeds have
                their own length; the negative prompt of guidance has this one.
            sigmas: noise levels before the shift, one a step, in place of the even grid.
            output_type: `pil`; `np`: float32 `[B, H, W, 3]` in 0..1; `latent`: `[B, c, H/8, W/8]`, un-normalised, with
                dev too, whose pipeline in diffusers gives its normalised tokens `[B, L, 4c]`.
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
            prompt_embeds = _given(prompt_embeds, "prompt_embeds")
            features = self.checkpoint.components["text_encoder"].config.output_size
            if prompt_embeds.ndim != 3 or prompt_embeds.shape[-1] != features:
                raise InputError(f"prompt_embeds must be [prompts, tokens, {features}], got {prompt_embeds.shape}")
            if prompt_embeds.shape[1] == 0 or not mx.isfinite(prompt_embeds).all().item():
                raise InputError(f"prompt_embeds {prompt_embeds.shape} must be finite numbers, for one token at least")
            prompts = [""] * len(prompt_embeds)
        images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
        edit = self.edit(images, mask=mask_image, on_canvas=strength is not None, crop_padding=padding_mask_crop)
        request = self.request(
            prompts,
            edit=edit,
            height=height,
            width=width,
            strength=strength,
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
            request,
            edit,
            latents=latents,
            prompt_embeds=prompt_embeds,
            output_type=output_type,
            on_progress=on_progress,
            resume=callback_on_step_end is None,
        )

    def edit(self, images: Sequence[Image.Image], **settings: Any) -> Edit:
        """Prepared pictures for `run`; the names are those of `Edit.checked`."""
        return Edit.checked(images, self.token_size, **settings)

    def request(
        self,
        prompts: Sequence[str],
        *,
        edit: Edit = Edit(),  # noqa: B008 (it is frozen)
        width: int | None = None,
        height: int | None = None,
        **settings: Any,
    ) -> Request:
        """Checked settings for `run`; the names are those of `Request.checked`. The size is by default `edit`'s."""
        width, height = edit.working_size(width, height)
        return Request.checked(self.variant, self.token_size, prompts, width=width, height=height, **settings)

    def run(
        self,
        request: Request,
        edit: Edit = Edit(),  # noqa: B008 (it is frozen)
        *,
        latents: Any = None,
        prompt_embeds: mx.array | None = None,
        output_type: str = "pil",
        on_progress: OnProgress = lambda progress: None,
        previews: bool = False,
        resume: bool = False,
        output: Flux2Output | None = None,
    ) -> Flux2Output:
        """Make the images of `request` with the pictures of `edit`.

        Args:
            request: the settings.
            edit: the pictures.
            latents: as for a call.
            prompt_embeds: the same.
            output_type: the same.
            on_progress: hears of every phase, step and image. An image is finished soon after its denoising, and
                before that of the next pass where memory allows it. After a step it may return tokens to go on from,
                call the progress' `preview`, and raise to cancel.
            previews: plan for those, so that the VAE stays in memory.
            resume: where images wait for their decoding, keep them on disk meanwhile, and go on from those that an
                earlier run of the same settings has left.
            output: what to fill in and return; of a run that is cut short it has the timings.
        """
        if output_type not in _OUTPUT_TYPES:
            raise InputError(f"unknown output_type {output_type!r}; choose one of {', '.join(_OUTPUT_TYPES)}")
        texts = None
        if prompt_embeds is not None:
            negative = request.max_sequence_length if self.variant.uses_cfg and request.guidance > 1 else 0
            texts = len(prompt_embeds), max(prompt_embeds.shape[1], negative)
        planned = self.networks.checked_plan(request, edit, previews=previews, texts=texts)
        latents = self._checked_latents(request, latents)
        with turn():
            run = self._run(
                request,
                planned,
                edit=edit,
                output_type=output_type,
                on_progress=on_progress,
                unfinished=self.unfinished if resume and latents is None and prompt_embeds is None else None,
                output=Flux2Output() if output is None else output,
            )
            return run.make(latents, prompt_embeds)

    def _run(self, request: Request, planned: Plan, **settings: Any) -> Run:
        return Run(self.networks, self.variant, request, planned, prompt_cache=self.prompt_cache, **settings)

    def encode_prompt(self, prompt: str | Sequence[str], max_sequence_length: int | None = None) -> mx.array:
        """Text states `[B, L, C]` for the transformer, padding included."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        request = self.request(prompts, max_sequence_length=max_sequence_length)
        planned = self.networks.checked_text_plan(request)
        with turn():
            states = self._run(request, planned).encode(prompts)
        stacked = mx.stack([states[p] for p in prompts])
        mx.eval(stacked)  # or only this thread could use it
        return stacked

    def writer(self) -> Writer:
        """The model's own language model: dev's sees images, klein's does not."""
        return Writer(self.networks)

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

    def preview(self, request: Request, tokens: mx.array, edit: Edit | None = None) -> list[Image.Image]:
        """Images from the tokens of a step, such as its `estimate`, of a run with the pictures of `edit`."""
        vae, dtype = self.networks.load("vae"), self.networks.dtype_of("vae")
        grid = request.height // self.token_size, request.width // self.token_size
        return [finished_image(decode_image(vae, image, grid, dtype), edit or Edit()) for image in tokens]

    @property
    def token_size(self) -> int:
        """Pixels per image token along one side."""
        return self.checkpoint.components["vae"].config.token_size

    def _checked_latents(self, request: Request, latents: Any) -> mx.array | None:
        if latents is None:
            return None
        channels, size = self.checkpoint.components["transformer"].config.in_channels, self.token_size
        shape = (len(request.seeds), channels, request.height // size, request.width // size)
        latents = _given(latents, "latents")
        if latents.shape != shape:
            raise InputError(f"latents have shape {latents.shape}, this run needs {shape}")
        if not mx.isfinite(latents).all().item():
            raise InputError("latents have values that are not finite numbers")
        return latents


def _given(values: Any, name: str) -> mx.array:
    """An array of real numbers that the caller has given, evaluated; one of MLX is not copied."""
    try:
        array = values if isinstance(values, mx.array) else mx.array(values)
        mx.eval(array)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{name} can't be used ({reason}); give an array, evaluated if another thread has made it"
        ) from error
    if array.dtype == mx.complex64:
        raise InputError(f"{name} must be real numbers, got {array.dtype}")
    return array
