"""Doing a job: checks, loading, rewriting, painting, saving, printing."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .decoders import Decoders
from .draft import Batch, Draft, Drafts, Target
from .finished import compare
from .job import Job
from .pictures import Opened
from .progress import Bars, notice
from .prompts import named
from .replay import elsewhere
from .report import Record, passes_notice, print_profile
from .saving import Saving, checkpoint_path
from .terminal import print_result, to_json
from .writing import is_blind, model_of, rewritten

if TYPE_CHECKING:
    from PIL import Image

    from .. import Edit, Flux2Pipeline, Plan, Progress, Request
    from ..store import Decoder


def paint(job: Job, *, profile: bool, as_json: bool) -> None:
    """Make the images of `job`, and print the path of each as soon as it is there, or a report of all at the end."""
    opened = job.pictures.open()
    for path, former in opened.others:
        notice(f"{path} is not the {former} that the image was made from, so the new one will differ", job.quiet)
    _check(job, bool(opened.images))
    with Bars(job.quiet) as bars:
        if job.preview and bars.no_pictures:
            notice(f"--preview shows nothing, as {bars.no_pictures}", job.quiet)
            job = replace(job, preview=False)  # so that nothing is fetched or computed for it
        pipe, draft = _open(job, opened, bars)
        record = Record(job, draft.targets, pipe, opened.settings, job.prompts)
        _notices(job, pipe, draft)
        if job.saving.skip_existing:
            compare(record)
        try:
            if draft.batches:
                _make(record, draft, opened.images, bars, as_json)
        finally:
            # Of a run that is cut short, too, what is finished stays and is named.
            ended = sys.exc_info()[0] is None
            if as_json and (ended or record.made):
                print_result(to_json(record.report(complete=ended)))
    if said := passes_notice(record.output):
        notice(said, job.quiet)
    if profile:
        print_profile(record.output, record.seconds)


def _make(record: Record, draft: Draft, images: "list[Image.Image]", bars: Bars, as_json: bool) -> None:
    """Make the images that are missing."""
    job = record.job
    pipe = record.pipe
    for batch in draft.batches:
        if images:
            _count_tokens(batch.request, draft.edit, pipe.token_size, job.quiet)
        if not batch.request.negative_prompts and any(target.frame.negative_prompt for target in batch.targets):
            notice(f"a negative prompt has no effect at a guidance of {batch.request.guidance:g}", job.quiet)
    if job.rewritten is not None:
        record.texts = job.rewritten
    elif job.interpret or job.upsample_prompt:
        record.texts = rewritten(job, images, pipe, record.output, bars)
    for batch in draft.batches:
        request, planned = _rewritten(batch, record.texts)
        pipe.run(
            request,
            draft.edit,
            on_progress=_listener(record, batch, bars, as_json),
            previews=batch.previews,
            planned=planned,
            resume=True,
            output=record.output,
        )


def _rewritten(batch: Batch, texts: list[str]) -> "tuple[Request, Plan | None]":
    """The request of a batch with its rewritten prompts, and its plan; None: they have changed, so it is of another."""
    prompts = [texts[target.frame.number] for target in batch.targets]
    if tuple(prompts) == batch.request.prompts:
        return batch.request, batch.planned
    with named(batch.targets[0].frame.line):
        return batch.request.rewritten(prompts), None


def _listener(record: Record, batch: Batch, bars: Bars, as_json: bool) -> "Callable[[Progress], None]":
    """The `on_progress` of a batch's run: it shows how far that is, and saves and prints images."""
    denoised = True
    job = record.job

    def on_progress(progress: "Progress") -> None:
        nonlocal denoised
        if progress.phase == "transformer":
            denoised = progress.done == progress.total
        if denoised or progress.phase != "vae":  # a bar at a time
            bars.show(progress.label, progress.done, progress.total)
        about = [batch.targets[image] for image in progress.images]
        if progress.image is not None:
            path = record.save(about[0], progress.image)
            if not as_json:
                with bars.aside():
                    print_result(path)
        step = progress.step
        if step is not None:
            preview = progress.preview and cache(progress.preview)
            if preview is not None and step.number in batch.saved:
                _save_previews(job.saving, about, step.number, preview())
            seen = preview if job.preview_decoder else progress.sketch
            if job.preview and seen is not None:
                bars.picture(seen())

    return on_progress


def _save_previews(saving: Saving, targets: list[Target], step: int, previews: "list[Image.Image]") -> None:
    for target, preview in zip(targets, previews, strict=True):
        path = checkpoint_path(target.path, step)
        if not saving.is_kept(path):
            saving.save(preview, path)


def _check(job: Job, is_edit: bool) -> None:
    """Raise InputError for what can be known to be wrong before anything is known of the model."""
    from ..device import memory_bytes
    from ..embedding_cache import default_limit
    from ..images import open_image

    memory_bytes(job.memory_limit)  # InputError if it is no size
    for path in job.interpret:
        open_image(path)
    looks = job.interpret or (is_edit and job.upsample_prompt)
    if looks and job.rewritten is None and is_blind(job.resolved):
        model_of(job.vision_model, job.models_dir, must_see=True)
    if not job.no_cache:
        default_limit()  # InputError if there is none


def _open(job: Job, opened: Opened, bars: Bars) -> "tuple[Flux2Pipeline, Draft]":
    """The pipeline of a job with its decoders and adapters, and the draft, which is made with these before anything but
    their headers is fetched or loaded."""
    with job.adapters as adapters, Decoders(job.decoder, job.preview_decoder) as decoders:
        drafts = Drafts(job, opened, decoders.preview)

        def look(pipe: "Flux2Pipeline") -> Draft:
            draft = drafts.of(adapters.expected(pipe))
            decoders.fetch(bars, job.quiet)
            adapters.fetch(bars, job.quiet)
            return draft

        def look_closely(pipe: "Flux2Pipeline") -> None:
            look(pipe)
            adapters.read(pipe)  # what can be wrong with their values is told before a long download

        folder = _prepared(job, decoders.finished, bars, look_closely)
        looked_up = decoders.finished
        pipe = _opened(job, folder, looked_up)
        draft = look(pipe)
        if decoders.finished is not looked_up:  # its weights are only here since
            pipe = _opened(job, folder, decoders.finished)
        if decoders.finished and job.decoder_sha256 not in (None, decoders.finished.settings["sha256"]):
            text = f"decoder {job.decoder} has other weights than when the image was made, so the new one will differ"
            notice(text, job.quiet)
        if any(batch.previews for batch in draft.batches):
            decoders.preview(pipe)
        adapters.load(pipe)
    return pipe, draft


def _prepared(job: Job, decoder: "Decoder | None", bars: Bars, check: Callable[["Flux2Pipeline"], object]) -> Path:
    """The folder of a job's model."""
    from .. import Flux2Pipeline

    return Flux2Pipeline.prepare(
        job.resolved,
        variant=job.variant,
        quant=job.quant,
        text_quant=job.text_quant,
        dtype=job.dtype,
        models_dir=job.models_dir,
        memory_limit=job.memory_limit,
        keep_source=job.keep_source,
        check=check,
        announce=bars.announce,
        progress=bars,
        decoder=decoder,
    )


def _opened(job: Job, folder: Path, decoder: "Decoder | None") -> "Flux2Pipeline":
    from .. import Flux2Pipeline

    return Flux2Pipeline.from_checkpoint(
        folder,
        quant=job.quant,
        text_quant=job.text_quant,
        dtype=job.dtype,
        models_dir=job.models_dir,
        prompt_cache=not job.no_cache,
        memory_limit=job.memory_limit,
        keep=len({tuple(frame.settings.values()) for frame in job.frames}) > 1,  # a single run takes the least without
        decoder=decoder,
    )


def _notices(job: Job, pipe: "Flux2Pipeline", draft: Draft) -> None:
    """Say what a user may want to know of the model before the images are there."""
    checkpoint = pipe.checkpoint
    variant = checkpoint.variant
    if job.preset:
        notice(job.preset, job.quiet)
    if job.preview and not (job.preview_decoder or pipe.has_sketches):
        notice("--preview shows nothing, as it has no linear map of this model's latents", job.quiet)
    if job.checkpoint and draft.batches and not any(batch.saved for batch in draft.batches):
        steps = max(batch.request.steps for batch in draft.batches)
        notice(f"--checkpoint {job.checkpoint} saves nothing, as images take {steps} steps", job.quiet)
    if job.adapters.names:
        _adapter_hints(job)
    if job.replayed and (said := elsewhere(job.replayed[1], job.replayed[0])):
        notice(said, job.quiet)
    if not variant.commercial_use:
        notice(f"{variant.name} and its images: {variant.licence} licence", job.quiet)
    ignores = variant.distilled and not variant.transformer.guidance_embeds
    if ignores and job.is_guided and job.guidance not in (None, variant.guidance):
        notice(f"{variant.name} is distilled and ignores --guidance", job.quiet)
    if job.fingerprint not in (None, checkpoint.source.get("fingerprint")):
        notice(f"{job.model} has other weights than when the image was made, so the new one will differ", job.quiet)
    if job.quant is not None and pipe.is_faster_in_bf16(draft.first, draft.edit, job.text_quant):
        _recommend_bf16(job, pipe.quant, checkpoint.quant)


def _adapter_hints(job: Job) -> None:
    """Say what the adapters may lack: words of the prompts, or settings, where none are given that they may set."""
    settings = [frame.settings[name] for frame in job.frames for name in ("steps", "guidance")]
    is_preset = job.preset is not None or any(value is not None for value in settings)
    for hint in job.adapters.hints(job.rewritten or job.prompts, is_preset=is_preset):
        notice(hint, job.quiet)


def _recommend_bf16(job: Job, quant: str, stored: str) -> None:
    """Say that the 4 bits of `quant` take longer here than the 16 for which there is memory."""
    from ..device import chip
    from ..store import CHECKPOINT

    stays = job.resolved.kind == CHECKPOINT and stored != "bf16"
    way = "; download or convert the model with that" if stays else ""
    notice(f"on {chip()} -q bf16 is faster than {quant}, and there is memory enough for it{way}", job.quiet)


def _count_tokens(request: "Request", edit: "Edit", token_size: int, quiet: bool) -> None:
    image = request.width * request.height // token_size**2
    references = sum(edit.token_counts(token_size))
    notice(f"{image} tokens of the image and {references} of {len(edit.references)} references", quiet)
