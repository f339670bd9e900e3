"""`Flux2Pipeline`: from prompts to images."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments
from .checkpoint import Checkpoint
from .config import check_quant
from .decoders import Decoder
from .device import activation_dtype, check_process, memory_bytes
from .embedding_cache import FOLDER as PROMPTS
from .embedding_cache import UNFINISHED, EmbeddingCache
from .errors import InputError
from .inputs import Pictures, Prompts, beyond, listener
from .networks import Networks
from .output import Flux2Output
from .preparation import PreparedPipeline
from .progress_bar import acquisition_bars, announce, progress_bar
from .provenance import image_settings, sampled
from .references import Edit
from .request import Request
from .store import FILE, FirstUse, checked_variant, models_folder, resolve
from .unfinished import Unfinished

if TYPE_CHECKING:
    from .store import FoundDecoder

__all__ = ["Flux2Output", "Flux2Pipeline"]
# What a call's settings are called in diffusers, by their names here.
_SPELLED = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "images_per_prompt": "num_images_per_prompt",
    "mask_crop": "padding_mask_crop",
}


class Flux2Pipeline(PreparedPipeline):
    """Text and images to image with FLUX.2. Networks are loaded for their phase of a run, and released after it where
    there is no room to keep them."""

    @classmethod
    @arguments.named
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        variant: str | None = None,
        quant: str | None = None,
        text_quant: str | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        models_dir: str | os.PathLike[str] | None = None,
        prompt_cache: bool = True,
        memory_limit: int | str | None = None,
        keep_source: bool = True,
        keep: bool = True,
        progress: bool = True,
        decoder: str | os.PathLike[str] | None = None,
    ) -> "Flux2Pipeline":
        """Open a model; fetch and convert it first if that has not been done yet.

        Args:
            source: `demo` or another model's name; a repo of Hugging Face, as `owner/name` or its address, or a file of
                one, as `owner/name:file` or its address; a folder in the diffusers layout, of the Hub's cache, or an
                MLX checkpoint; or weights, one .safetensors or .gguf file or a folder of nothing else. Where these are
                of one part only, such as the transformer, the others are taken from a converted model or fetched. Text
                is understood as `store.resolve` says, a `Path` is a path.
            variant: the model's name where the source can't tell.
            quant: `bf16`, `qint8`, `qint6`, `mixed4` or `qint4` for the transformer; None: as stored, or when
                converting `bf16`, or as few bits as the source has.
            text_quant: the same for the text encoder; None: as stored, or when converting as `quant`, but `qint8` with
                `bf16`, or as few bits as the source has.
            dtype: `float32`, `bfloat16` or `float16`, or a dtype of MLX or PyTorch, for activations; None: float16 on
                M1 and M2, bfloat16 on later chips, float32 on a CPU. Under float16 all but the transformer is in
                bfloat16.
            torch_dtype: what diffusers calls `dtype`; give one of them.
            models_dir: where converted models are kept; None: `$FLUX2_MLX_HOME` or `~/.cache/flux2-mlx`.
            prompt_cache: keep encoded prompts in the folder `prompts` there, so that a prompt seen before needs no
                text encoder, and denoised images that wait for their decoding in `unfinished`.
            memory_limit: bytes, or a size such as `"12GB"`, that a run stays within, if need be by reading blocks of
                the networks from disk at every step; None: what the system of this machine can spare, as `flux2-mlx
                info` shows.
            keep_source: leave what is fetched in the Hub's cache, for other programs and quantizations.
            keep: keep networks in memory between calls as far as they fit into `memory_limit` beside each phase, until
                `release` or another pipeline's call that needs the room; False: release each after its phase.
            progress: show what is downloaded and converted.
            decoder: what makes images of latents in place of the model's own: `small` or `taef2`, which are fetched, or
                a file of such a decoder; None: that one. The encoder stays the model's.

        Raises:
            InputError: a setting is wrong. CheckpointError: the model is damaged. DownloadError: it can't be fetched.
            DeviceError: this process was forked from one that had computed.
        """
        arguments.kinds(variant=(variant, str), prompt_cache=(prompt_cache, bool), progress=(progress, bool))
        arguments.kinds(keep_source=(keep_source, bool), keep=(keep, bool))
        computed_in = arguments.dtype_name(dtype, torch_dtype)
        _check_opening(variant, quant, text_quant, computed_in, models_dir, memory_limit)

        with acquisition_bars(disable=not progress) as show, ExitStack() as held:
            found = None if decoder is None else held.enter_context(_look_up(decoder))
            opened = cls.prepare(
                source,
                variant=variant,
                quant=quant,
                text_quant=text_quant,
                dtype=computed_in,
                models_dir=models_dir,
                memory_limit=memory_limit,
                keep_source=keep_source,
                announce=_announce if progress else None,
                progress=show,
                decoder=None if found is None else found.decoder,
            )
            if found is not None:
                found.decoder.decoding(Checkpoint.open(opened))  # what speaks against it is told before it is fetched
                found.fetch(announce if progress else None, show)
        return cls.from_checkpoint(
            opened,
            quant=quant,
            text_quant=text_quant,
            dtype=computed_in,
            models_dir=models_dir,
            prompt_cache=prompt_cache,
            memory_limit=memory_limit,
            keep=keep,
            name=str(source),
            decoder=None if found is None else found.decoder,
        )

    @classmethod
    @arguments.named
    def from_single_file(
        cls,
        source: str | os.PathLike[str],
        *,
        variant: str | None = None,
        quant: str | None = None,
        text_quant: str | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        models_dir: str | os.PathLike[str] | None = None,
        prompt_cache: bool = True,
        memory_limit: int | str | None = None,
        keep_source: bool = True,
        keep: bool = True,
        progress: bool = True,
        decoder: str | os.PathLike[str] | None = None,
    ) -> "Flux2Pipeline":
        """Open a file of weights, as `from_pretrained` does with the same settings.

        Args:
            source: a .safetensors or .gguf file, or one of a repo of Hugging Face, as `owner/name:file` or its address.

        Raises:
            InputError: it is no file, or a setting is wrong. CheckpointError, DownloadError, DeviceError: see
                `from_pretrained`.
        """
        model = resolve(source)
        if model.kind != FILE and not (model.path and model.path.is_file()):
            raise InputError(f"{source} is no file of weights; write from_pretrained({str(source)!r})")
        return cls.from_pretrained(
            source,
            variant=variant,
            quant=quant,
            text_quant=text_quant,
            dtype=dtype,
            torch_dtype=torch_dtype,
            models_dir=models_dir,
            prompt_cache=prompt_cache,
            memory_limit=memory_limit,
            keep_source=keep_source,
            keep=keep,
            progress=progress,
            decoder=decoder,
        )

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path,
        *,
        quant: str | None = None,
        text_quant: str | None = None,
        dtype: str | None = None,
        models_dir: str | os.PathLike[str] | None = None,
        prompt_cache: bool = True,
        memory_limit: int | str | None = None,
        keep: bool = True,
        name: str | None = None,
        decoder: Decoder | None = None,
    ) -> "Flux2Pipeline":
        """Open an MLX checkpoint folder, such as `find_checkpoint` gives; the settings are those of `from_pretrained`,
        `name` is what the model was asked for as, and `decoder` is such as `find_decoder` gives."""
        name = str(folder) if name is None else name
        checkpoint = Checkpoint.open(folder)
        networks = Networks.open(checkpoint, quant=quant, text_quant=text_quant, dtype=dtype, decoder=decoder)
        models = models_folder(models_dir)
        return cls(
            networks,
            EmbeddingCache(models / PROMPTS) if prompt_cache else None,
            Unfinished(models / UNFINISHED) if prompt_cache else None,
            name,
            memory_limit=memory_limit,
            keep=keep,
        )

    @arguments.named
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        *,
        mask_image: Any = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        match_colors: bool = False,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: Any = None,
        num_images_per_prompt: int = 1,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_embeds: Any = None,
        max_sequence_length: int | None = None,
        sigmas: Sequence[float] | None = None,
        step_cache: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["Flux2Pipeline", int, float, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        text_encoder_out_layers: Sequence[int] | None = None,
    ) -> Flux2Output | Any:  # a tuple if asked for, which checkers need not have all other callers rule out
        """Make images. None means the variant's default.

        Args:
            prompt: one or several prompts; left out only with `prompt_embeds`.
            image: reference images that the model sees, each at least 64 pixels a side and at most 8 times as long as
                wide. Above 1024² pixels they are scaled down, and cut to multiples of 16 in the middle. One or a list
                of PIL images, paths, arrays `[H, W, C]` or tensors of PyTorch `[C, H, W]` (see `arguments.pictures`).
                It may also come first, before the prompt.
            mask_image: of the size of the first image, which is then painted over where the mask is white; `pil`
                output has the original's size and its very pixels elsewhere. Transparent is black.
            strength: above 0 to 1: the first image is what the run starts from, noisier the greater. All
                `num_inference_steps` are taken, at the end of a longer schedule.
            padding_mask_crop: work on the mask's surroundings only, with so many pixels around it.
            match_colors: give results the colours of the first image where they are the same (see `colors.matched`).
                What is edited gets the same correction, and keeps its own colours. For `pil` output.
            height: pixels, a multiple of 16; None: the first image's. With a mask or strength it can't be chosen.
            width: pixels, a multiple of 16; None: the first image's.
            num_inference_steps: denoising steps; with `sigmas`, what their shift is worked out for (None: 50).
            guidance_scale: embedded guidance (dev) or the CFG scale (base models); distilled models ignore it.
            seed: of the first image, 0 … 2^64 − 1; image k has seed + k. Or a list of the seed of each image. None:
                random.
            generator: in place of seeds: new CPU generators of PyTorch, one for each image.
            num_images_per_prompt: images for each prompt.
            latents: noise to start from, `[B, 4c, H/16, W/16]`, in place of the seeds' noise.
            prompt_embeds: what `encode_prompt` gives, one row a prompt, in place of `prompt`.
            negative_prompt: what guidance steers away from, one for all prompts or one for each; None: empty ones. Of
                the base models only, and with a `guidance_scale` above 1.
            negative_prompt_embeds: what `encode_prompt` gives of negative prompts, in place of `negative_prompt`: one
                row for all prompts or one for each.
            max_sequence_length: text tokens of a prompt that the transformer sees, at most the variant's. Embeds have
                their own length.
            sigmas: noise levels before the shift, one a step, in place of the even grid.
            step_cache: 0 or more: where what the first block of the transformer adds has changed by no more than this
                share since all blocks were computed, the others are skipped and add what they did then; `passes` of
                the result counts it. 0 or None: all are computed. Not with models that are made for 4 steps.
            output_type: `pil`; `np`: float32 `[B, H, W, 3]` in 0..1; `pt`: PyTorch's `[B, 3, H, W]` in 0..1; `latent`:
                `[B, c, H/8, W/8]`, un-normalised, with dev too, whose pipeline in diffusers gives its normalised tokens
                `[B, L, 4c]`; `decode` makes images of them.
            callback_on_step_end: called as `(pipe, step, timestep, {"latents": tokens})` after every step, with
                the timestep that it started from, in 0..1000, and tokens `[b, L, 4c]`; `latents` of the dict it
                returns are gone on with; `previews.sketches` shows them. Runs and previews that it makes have what this
                run leaves of the memory limit.
            return_dict: False: a tuple with the images only.
            callback_on_step_end_tensor_inputs: `["latents"]`, as nothing else changes.
            attention_kwargs: `{"scale": x}` multiplies what adapters change, in this call.
            text_encoder_out_layers: the model's own.

        Raises:
            InputError: a setting is wrong.

        Whatever ends the call early, an exception of the callback and Ctrl-C included, has the images that are finished
        until then as its attribute `partial_output`, a `Flux2Output`; without any there is no such attribute.
        """
        text = self.checkpoint.components["text_encoder"].config
        arguments.kinds(return_dict=(return_dict, bool))
        arguments.check_diffusers(callback_on_step_end_tensor_inputs, text_encoder_out_layers, text.out_layers)
        pipe = self._scaled(arguments.adapter_scale(attention_kwargs))
        prompt, image = arguments.in_order(prompt, image)
        given = Prompts.checked(self.checkpoint, prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        pictures = Pictures.opened(image, mask_image)
        seeds = arguments.seeds(seed, generator, len(given.texts), num_images_per_prompt)
        with arguments.spelled(**_SPELLED):
            edit = pictures.edit(self.token_size, strength, padding_mask_crop, match_colors, output_type)
            request = self.request(
                given.texts,
                edit=edit,
                height=height,
                width=width,
                strength=strength,
                steps=num_inference_steps,
                guidance=guidance_scale,
                seed=seeds,
                images_per_prompt=num_images_per_prompt,
                max_sequence_length=max_sequence_length,
                sigmas=sigmas,
                negative_prompt=negative_prompt,
                step_cache=step_cache,
            )
        output = pipe._made(request, edit, given, latents, output_type, callback_on_step_end)
        arguments.draw(generator, request, self.checkpoint.fitted_variant.vae)
        edited = pictures.settings(strength, padding_mask_crop, match_colors)
        unsaid = beyond(latents, prompt_embeds, negative_prompt_embeds, max_sequence_length, callback_on_step_end)
        output.settings = [pipe._settings(request, edit, place, edited, unsaid) for place in range(len(request.seeds))]
        return output if return_dict else (output.images,)

    def _made(
        self, request: Request, edit: Edit, given: Prompts, latents: Any, output_type: str, callback: Any
    ) -> Flux2Output:
        """The images of a call, under a bar of its steps."""
        with progress_bar(**self._bar) as show:
            return self.run(
                request,
                edit,
                latents=latents,
                prompt_embeds=given.embeds,
                negative_prompt_embeds=given.negative_embeds,
                output_type=output_type,
                on_progress=listener(self, callback, show),
                resume=callback is None,
            )

    def _settings(
        self, request: Request, edit: Edit, place: int, edited: dict[str, Any] | None, unsaid: list[str]
    ) -> dict[str, Any]:
        """What the image at a `place` of a run remembers."""
        number = place // request.images_per_prompt
        prompt = request.prompts[number]
        negative = "".join(request.negative_prompts[number:][:1])
        return image_settings(
            self.networks,
            model=Path(self.name).name if os.path.isdir(self.name) else self.name,
            prompt=prompt,
            text=prompt,
            settings=sampled(request, edit) | ({"negative_prompt": negative} if negative else {}),
            seed=request.seeds[place],
            edited=edited,
            beyond=unsaid,
        )


def _check_opening(
    variant: str | None, quant: Any, text_quant: Any, dtype: str | None, models_dir: Any, memory_limit: Any
) -> None:
    """Raise InputError if a setting of `from_pretrained` is wrong, and DeviceError if nothing can be computed here,
    before anything is fetched."""
    if not isinstance(models_dir, str | os.PathLike | None):
        raise InputError(f"models_dir must be a folder, got {type(models_dir).__name__}")
    check_process()
    activation_dtype(dtype)
    memory_bytes(memory_limit)
    arguments.kinds(quant=(quant, str), text_quant=(text_quant, str))
    for setting in (quant, text_quant):
        if setting is not None:
            check_quant(setting)
    if variant in ("fp16", "bf16", "fp32"):
        raise InputError(f"leave out variant={variant!r}: here it names a model, and weights of any precision are read")
    checked_variant(variant)


def _look_up(decoder: str | os.PathLike[str]) -> "AbstractContextManager[FoundDecoder]":
    from .store import look_up_decoder  # with the Hub and the converter

    return look_up_decoder(decoder)


def _announce(use: FirstUse) -> None:
    """Say on stderr what is about to be fetched, where it goes, and what stays."""
    from tqdm import tqdm

    for download in use.downloads:
        announce(download)
    tqdm.write(f"converted it takes {use.converted / 1e9:.3g} GB in {use.target}", file=sys.stderr)
