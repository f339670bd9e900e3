"""Runs of settings and pictures that are checked, and the parts of one."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
from PIL import Image

from . import arguments
from .advice import check_given_plan, checked_phase_plan, checked_plan, workload
from .branches import AtWork, check_steps
from .checkpoint import Checkpoint
from .config import Variant
from .decoders import Decoder
from .device import dtype_name, memory_bytes
from .diffusers_methods import DiffusersMethods
from .embedding_cache import EmbeddingCache
from .errors import InputError
from .images import to_pil
from .kept import held
from .lora_methods import LoraMethods
from .memory import Plan, Workload
from .metering import Phases, running, turn
from .networks import Networks
from .output import Flux2Output, Phase, check_output_type, to_torch
from .previews import LINEAR, Previews, Views, has_sketches
from .references import Edit
from .request import OnProgress, Request
from .run import Run
from .text import PromptTokenizer
from .unfinished import Unfinished
from .upsampling import WritingMethods


class BasePipeline(WritingMethods, LoraMethods, DiffusersMethods):
    """Networks with what is done with them. They are loaded for their phase of a run and released after it. With `keep`
    they stay in memory as far as all that stays fits into `memory_limit`, in bytes, beside each phase."""

    def __init__(
        self,
        networks: Networks | None = None,
        prompt_cache: EmbeddingCache | None = None,
        unfinished: Unfinished | None = None,
        name: str | None = None,
        *,
        memory_limit: int | str | None = None,
        keep: bool = False,
    ):
        if not isinstance(networks, Networks):
            raise InputError(f"write Flux2Pipeline.from_pretrained({networks or 'klein-4b'!r:.80})")
        self.networks = networks
        self._memory_limit = memory_bytes(memory_limit)
        self.keep = keep
        self.prompt_cache = prompt_cache
        self.unfinished = unfinished
        self.name = str(networks.checkpoint.folder) if name is None else name
        self._previews: Previews | None = None
        self._bar: dict[str, Any] = {}
        self._loaded: dict[str, AtWork] = {one.adapter.name: one for one in networks.adapters}
        self._chosen = [*networks.adapters]

    def __repr__(self) -> str:
        weights = f"quant={self.quant!r}, text_quant={self.text_quant!r}, dtype={dtype_name(self.dtype)!r}"
        limit = f"memory_limit='{self.memory_limit / 2**30:.3g}GiB'"
        return f"Flux2Pipeline({self.name!r}, variant={self.variant.name!r}, {weights}, {limit})"

    def edit(
        self,
        images: Sequence[Image.Image],
        *,
        mask: Image.Image | None = None,
        on_canvas: bool = False,
        mask_crop: int | None = None,
        feather: int = 0,
        match_colors: bool = False,
    ) -> Edit:
        """Prepared pictures for `run`; see `Edit.checked`."""
        return Edit.checked(
            images,
            self.token_size,
            mask=mask,
            on_canvas=on_canvas,
            mask_crop=mask_crop,
            feather=feather,
            match_colors=match_colors,
        )

    def request(
        self,
        prompts: Sequence[str],
        *,
        edit: Edit = Edit(),  # noqa: B008 (it is frozen)
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | Sequence[int] | None = None,
        images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        sigmas: Sequence[float] | None = None,
        strength: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        step_cache: float | None = None,
    ) -> Request:
        """Checked settings for `run`; see `Request.checked`. The size is by default `edit`'s."""
        width, height = edit.working_size(width, height)
        return Request.checked(
            self.variant,
            self.token_size,
            prompts,
            width=width,
            height=height,
            steps=steps,
            guidance=guidance,
            seed=seed,
            images_per_prompt=images_per_prompt,
            max_sequence_length=max_sequence_length,
            sigmas=sigmas,
            strength=strength,
            negative_prompt=negative_prompt,
            step_cache=step_cache,
        )

    def plan(
        self,
        request: Request,
        edit: Edit = Edit(),  # noqa: B008 (it is frozen)
        *,
        previews: bool = False,
    ) -> Plan:
        """What a `run` will hold in memory, phase by phase, and what it will read from disk.

        Networks that are kept from a call before come on top, as far as they fit beside each phase. A run that a
        callback makes has what the one that is going on leaves of the memory limit.

        Raises:
            InputError: it does not fit into memory; what would is in the message. Or an adapter's steps begin after
                the run's last.
        """
        check_steps(self.networks.adapters, request.steps)
        return checked_plan(self.networks, self._work(request, edit, previews), self._limit)

    @property
    def has_sketches(self) -> bool:
        """Whether steps have a `sketch`: the linear map knows latents like this model's."""
        return has_sketches(self.checkpoint.components["vae"].config)

    def _work(
        self, request: Request, edit: Edit, previews: bool, texts: tuple[int, int, int] | None = None
    ) -> Workload:
        """What a run makes; see `workload`."""
        own = self._previews if previews else None
        taken = 0 if own is None else own.nbytes(request.width, request.height)
        return workload(request, edit, previews=previews and own is None, previewing=taken, texts=texts)

    def preview_with(self, decoder: Decoder | str | None) -> None:
        """Say what makes the `preview` of steps, and those that `run` has `previews` for.

        Args:
            decoder: TAEF2, as `store.find_decoder` gives it; `linear`: the linear map, which takes neither a network
                nor time; None: the decoder of finished images.

        Raises:
            InputError: it is none of these, or for other latents than this model's.
        """
        config = self.checkpoint.components["vae"].config
        if isinstance(decoder, Decoder) and decoder.is_tiny:
            decoder.fitted(config, self.variant.name)
            self._previews = Previews(decoder, self.networks.dtype_of("vae"))
        elif decoder is None:
            self._previews = None
        elif decoder != LINEAR or not self.has_sketches:
            told = decoder.name if isinstance(decoder, Decoder) else repr(decoder)
            raise InputError(
                f"previews of {self.variant.name} can't be made with {told:.80}; give TAEF2, 'linear' or None"
            )
        else:
            self._previews = Previews()

    def run(
        self,
        request: Request,
        edit: Edit = Edit(),  # noqa: B008 (it is frozen)
        *,
        latents: Any = None,
        prompt_embeds: mx.array | None = None,
        negative_prompt_embeds: mx.array | None = None,
        output_type: str = "pil",
        on_progress: OnProgress = lambda progress: None,
        previews: bool = False,
        planned: Plan | None = None,
        resume: bool = False,
        output: Flux2Output | None = None,
    ) -> Flux2Output:
        """Make the images of `request` with the pictures of `edit`.

        Args:
            request: the settings.
            edit: the pictures.
            latents: noise to start from, `[B, 4c, H/16, W/16]`, in place of the seeds' noise.
            prompt_embeds: what `encode_prompt` gives, one row a prompt, in place of the prompts of `request`.
            negative_prompt_embeds: what it gives of the negative prompts, one row a prompt.
            output_type: `pil`, `np`, `pt` or `latent`, as for a call.
            on_progress: hears of every phase, step and image. An image is finished soon after its denoising, and
                before that of the next pass where memory allows it. After a step it may return tokens to go on from,
                call the progress' `preview` or `sketch`, and raise to cancel; of what is denoised already it hears even
                then.
            previews: plan for those, so that there is room for what makes them (see `preview_with`).
            planned: what `plan` gave for this run; None: it is planned now.
            resume: where images wait for their decoding, keep them on disk meanwhile, and go on from those that an
                earlier run of the same settings has left.
            output: what to fill in and return; of a run that is cut short it has the timings, and the images that were
                finished with their seeds. The exception has it as `partial_output` then, as for a call.
        """
        check_output_type(output_type)
        self._check(request, edit)
        check_steps(self.networks.adapters, request.steps)
        if not request.negative_prompts:
            negative_prompt_embeds = None  # up to a guidance of 1
        texts = arguments.text_sizes(request, prompt_embeds, negative_prompt_embeds)
        work = self._work(request, edit, previews, texts)
        if planned is None:
            planned = checked_plan(self.networks, work, self._limit)
        else:
            check_given_plan(planned, work, self._limit)
        if latents is not None:
            latents = self._noise(request, latents)
        given = [values for values in (latents, prompt_embeds, negative_prompt_embeds) if values is not None]
        waiting = self.unfinished if resume and not given else None
        output = Flux2Output() if output is None else output
        unfinished = None if waiting is None else waiting.of(self.networks, request, edit)
        try:
            with self._running(planned, output.timings) as phases:
                run = Run(
                    self.networks,
                    phases,
                    request,
                    edit,
                    self.prompt_cache,
                    unfinished,
                    self._views(request, edit, previews),
                    output_type="np" if output_type == "pt" else output_type,
                    on_progress=on_progress,
                    output=output,
                )
                return run.make(latents, prompt_embeds, negative_prompt_embeds)
        finally:
            if self._previews is not None:
                self._previews.release()
            if output_type == "pt" and output.images is not None:
                output.images = to_torch(output.images)

    def _views(self, request: Request, edit: Edit, previews: bool) -> Views:
        return Views(request.width, request.height, edit, self.has_sketches, self._previews if previews else None)

    def _check(self, request: Request, edit: Edit) -> None:
        """InputError if a request or an edit, which may be built by hand, can't be run with this model and each
        other."""
        arguments.kinds(request=(request, Request), edit=(edit, Edit))
        request.check(self.variant, self.token_size)
        edit.working_size(request.width, request.height)

    def _noise(self, request: Request, latents: Any) -> mx.array:
        """The noise of a run that a caller has given; InputError if it can't be that."""
        channels = self.checkpoint.fitted_variant.vae.token_channels
        return arguments.latents(latents, (len(request.seeds), channels, *self._grid(request)))

    def _grid(self, request: Request) -> tuple[int, int]:
        """Height and width of an image in tokens."""
        return request.height // self.token_size, request.width // self.token_size

    def encode_prompt(self, prompt: str | Sequence[str], max_sequence_length: int | None = None) -> mx.array:
        """Text states `[B, L, C]` for the transformer, padding included."""
        prompts = arguments.texts("prompt", prompt)
        request = self.request(prompts, max_sequence_length=max_sequence_length)
        planned = checked_phase_plan(self.networks, workload(request), "text_encoder", self._limit)
        with self._running(planned, []) as phases:
            states = Run(self.networks, phases, request, prompt_cache=self.prompt_cache).encode(prompts)
            stacked = mx.stack([states[p] for p in prompts])
            mx.eval(stacked)  # or only this thread could use it
        return stacked

    def decode(self, latents: Any, output_type: str = "pil") -> Any:
        """Images of latents.

        Args:
            latents: `[B, c, H/8, W/8]`, un-normalised, as `output_type="latent"` gives them, or that result itself.
            output_type: `pil`, `np` or `pt`.

        Raises:
            InputError: they have another shape, or values that are not finite.
        """
        check_output_type(output_type)
        if output_type == "latent":
            raise InputError("latents are what is decoded; choose pil, np or pt")
        config = self.checkpoint.components["vae"].config
        if isinstance(latents, Flux2Output):
            latents = latents.images
        latents = arguments.latents(latents, (None, config.latent_channels, None, None))
        height, width = (side * config.scale_factor for side in latents.shape[2:])
        request = Request.checked(self.variant, self.token_size, [""], height=height, width=width)
        planned = checked_phase_plan(self.networks, workload(request), "vae", self._limit)
        with self._running(planned, []) as phases:
            images = Run(self.networks, phases, request).decode(latents.transpose(0, 2, 3, 1))
        return to_pil(images) if output_type == "pil" else to_torch(images) if output_type == "pt" else images

    def release(self) -> None:
        """Give back the memory of the networks that were kept for the next run."""
        with turn():
            self.networks.release()

    def preview(self, request: Request, tokens: mx.array, edit: Edit | None = None) -> list[Image.Image]:
        """Images from the tokens of a step, such as its `estimate`, of a run with the pictures of `edit`.

        A callback can ask for them while the run goes on; other threads wait for its end.

        Raises:
            InputError: the tokens have another shape than `[B, L, C]`, or values that are not finite. The VAE does not
                fit into the memory limit, or into what a run leaves of it that is going on.
        """
        edit = edit or Edit()
        self._check(request, edit)
        channels = self.checkpoint.fitted_variant.vae.token_channels
        tokens = arguments.latents(tokens, (None, math.prod(self._grid(request)), channels), "tokens")
        planned = checked_phase_plan(self.networks, workload(request), "vae", self._limit)
        with self._running(planned, []) as phases:
            return Run(self.networks, phases, request, edit).preview(tokens)

    def _running(self, planned: Plan, timings: list[Phase]) -> AbstractContextManager[Phases]:
        return running(self.networks, planned, timings, keep=self.keep)

    @property
    def memory_limit(self) -> int:
        """Bytes that a run stays within. It is set as for `from_pretrained`."""
        return self._memory_limit

    @memory_limit.setter
    def memory_limit(self, limit: int | str | None) -> None:
        self._memory_limit = memory_bytes(limit)

    @property
    def _limit(self) -> int:
        """Bytes that a run may take now: in a callback, those that the runs around it leave."""
        return max(0, self.memory_limit - held())

    @property
    def checkpoint(self) -> Checkpoint:
        """The files, and what they say of the model."""
        return self.networks.checkpoint

    @property
    def variant(self) -> Variant:
        """The model's row of the table."""
        return self.checkpoint.variant

    @property
    def tokenizer(self) -> PromptTokenizer:
        """Makes token ids of prompts."""
        return self.checkpoint.tokenizer

    @property
    def quant(self) -> str:
        """`bf16`, `qint8`, `qint6`, `mixed4` or `qint4`, of the transformer."""
        return self.networks.quant

    @property
    def text_quant(self) -> str:
        """`bf16`, `qint8`, `qint6`, `mixed4` or `qint4`, of the text encoder."""
        return self.networks.text_quant

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that the transformer computes in."""
        return self.networks.dtype

    @property
    def token_size(self) -> int:
        """Pixels per image token along one side."""
        return self.checkpoint.components["vae"].config.token_size
