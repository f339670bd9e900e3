"""Doing a job: checks, loading, rewriting, painting, saving, printing."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .draft import Batch, Drafts, has_previews, is_empty, is_kept
from .job import Job
from .loras import Adapters
from .progress import Bars, Stream, notice
from .replay import elsewhere
from .report import Record, differences, print_profile
from .terminal import print_result, to_json
from .writing import check_sight, is_blind, open_writer

if TYPE_CHECKING:
    from PIL import Image

    from .. import Flux2Pipeline, Plan, Progress, Request, Writer
    from ..output import Phase
    from ..references import Edit

_log = logging.getLogger(__name__)


def paint(job: Job, *, profile: bool, as_json: bool) -> None:
    """Make the images of `job`, and print the path of each as soon as it is there, or a report of all at the end."""
    images, settings, hashes = job.pictures.open()
    for path, former in job.pictures.others(hashes):
        notice(f"{path} is not the {former} that the image was made from, so the new one will differ", job.quiet)
    _check(job, images)
    drafts = Drafts(job, images, settings)
    with Bars(job.quiet) as bars:
        pipe = _open(job, bars, drafts.of)
        record = Record(job, pipe, drafts.of(pipe), job.pictures.settings(hashes))
        _notices(record)
        _skip(record)
        try:
            if record.draft.batches:
                _make(record, images, bars, as_json)
        finally:
            # Of a run that is cut short, too, what is finished stays and is named.
            ended = sys.exc_info()[0] is None
            if as_json and (ended or record.made):
                print_result(to_json(record.report(complete=ended)))
    if profile:
        print_profile(record.output, record.seconds)


def _skip(record: Record) -> None:
    """Leave the images that are there already, those made otherwise with a warning."""
    from ..images import read_settings

    missing = set(record.draft.missing)
    for place, path in enumerate(record.paths):
        if place in missing:
            if is_empty(record.job, path):
                _log.warning("%s is empty and is made again", path)
            continue
        record.skipped.append(place)
        try:
            changed = differences(read_settings(path), record.settings(place))
        except InputError:
            if record.job.metadata:
                _log.warning("%s is left as it is, but does not say what it was made from", path)
            continue
        if changed:
            _log.warning("%s is left as it is, but was made with another %s", path, ", ".join(changed))


def _make(record: Record, images: "list[Image.Image]", bars: Bars, as_json: bool) -> None:
    """Make the images that are missing."""
    job, pipe, edit = record.job, record.pipe, record.draft.edit
    for batch in record.draft.batches:
        if images:
            _count_tokens(pipe, batch.request, edit, job)
        negative = any(job.negative(job.frames[place].prompt) for place in batch.places)
        if negative and not batch.request.negative_prompts:
            notice(f"a negative prompt has no effect at a guidance of {batch.request.guidance:g}", job.quiet)
    record.texts, record.output.timings[:] = _rewrite(pipe, job, images, bars)
    for batch in record.draft.batches:
        request, planned = _rewritten(record, batch)
        pipe.run(
            request,
            edit,
            on_progress=_listener(record, request, batch.places, bars, as_json),
            previews=has_previews(job, request),
            planned=planned,
            resume=True,
            output=record.output,
        )


def _rewritten(record: Record, batch: Batch) -> "tuple[Request, Plan | None]":
    """The request of a batch with its rewritten prompts, and its plan; None: they have changed, so it is of another."""
    texts = [record.texts[record.job.frames[place].number] for place in batch.places]
    if tuple(texts) == batch.request.prompts:
        return batch.request, batch.planned
    with record.job.frames[batch.places[0]].prompt.named():
        return batch.request.rewritten(texts), None


def _listener(
    record: Record, request: "Request", places: "Sequence[int]", bars: Bars, as_json: bool
) -> "Callable[[Progress], None]":
    """The `on_progress` of a batch's run: it shows how far that is, and saves and prints images."""
    job = record.job
    denoised = True

    def on_progress(progress: "Progress") -> None:
        nonlocal denoised
        if progress.phase == "transformer":
            denoised = progress.done == progress.total
        if denoised or progress.phase != "vae":  # a bar at a time
            bars.show(progress.label, progress.done, progress.total)
        about = [places[image] for image in progress.images]
        if progress.image is not None:
            path = _save(record, about[0], progress.image)
            if not as_json:
                with bars.aside():
                    print_result(path)
        step, preview = progress.step, progress.preview
        if step is None or preview is None or not job.checkpoint:
            return
        if step.number % job.checkpoint == 0 and step.number < request.steps:
            _save_previews(job, [record.paths[place] for place in about], step.number, preview())

    return on_progress


def _save(record: Record, place: int, image: "Image.Image") -> Path:
    """Write an image to its path, or beside it if something has appeared there meanwhile."""
    from ..images import save

    path = record.paths[place]
    settings = record.settings(place) if record.job.metadata else None
    path.parent.mkdir(parents=True, exist_ok=True)
    replace = record.job.force or is_empty(record.job, path)
    record.paths[place] = save(image, path, settings, replace=replace)
    record.made.append(place)
    return record.paths[place]


def _save_previews(job: Job, paths: list[Path], step: int, previews: "list[Image.Image]") -> None:
    from ..images import save

    for path, preview in zip(paths, previews, strict=True):
        target = job.checkpoint_path(path, step)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not is_kept(job, target):
            save(preview, target, replace=job.force or is_empty(job, target))


def _check(job: Job, images: "list[Image.Image]") -> None:
    """Raise InputError for what can be known to be wrong before anything is known of the model."""
    from ..device import memory_bytes
    from ..embedding_cache import default_limit
    from ..images import open_image
    from ..store import resolve

    memory_bytes(job.memory_limit)  # InputError if it is no size
    for path in job.interpret:
        open_image(path)
    looks = job.interpret or (images and job.upsample_prompt)
    if looks and job.rewritten is None and is_blind(job.resolved):
        check_sight(resolve(job.vision_model, job.models_dir))
    if not job.no_cache:
        default_limit()  # InputError if there is none


def _open(job: Job, bars: Bars, check: Callable[["Flux2Pipeline"], object]) -> "Flux2Pipeline":
    """The pipeline of a job with its adapters, after a check of it with them, before anything is fetched or loaded."""
    with Adapters(job.loras, bars, job.quiet) as adapters:

        def look(pipe: "Flux2Pipeline") -> None:
            check(adapters.expected(pipe))
            adapters.fetch()

        def look_closely(pipe: "Flux2Pipeline") -> None:
            look(pipe)
            adapters.read(pipe)  # what can be wrong with their values is told before a long download

        pipe = _opened(job, bars, look_closely)
        look(pipe)
        adapters.load(pipe)
    return pipe


def _opened(job: Job, bars: Bars, check: Callable[["Flux2Pipeline"], object]) -> "Flux2Pipeline":
    from ..pipeline import Flux2Pipeline

    folder = Flux2Pipeline.prepare(
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
    )
    return Flux2Pipeline.from_checkpoint(
        folder,
        quant=job.quant,
        text_quant=job.text_quant,
        dtype=job.dtype,
        models_dir=job.models_dir,
        prompt_cache=not job.no_cache,
        memory_limit=job.memory_limit,
        keep=job.takes_several_runs,  # a single run has the least memory without
    )


def _notices(record: Record) -> None:
    """Say what a user may want to know of the model before the images are there."""
    job, pipe = record.job, record.pipe
    variant = pipe.variant
    if job.preset:
        notice(job.preset, job.quiet)
    if job.replayed and (said := elsewhere(job.replayed[1], job.replayed[0])):
        notice(said, job.quiet)
    if not variant.commercial_use:
        notice(f"{variant.name} and its images: {variant.licence} licence", job.quiet)
    if variant.distilled and job.guidance not in (None, variant.guidance):
        notice(f"{variant.name} is distilled and ignores --guidance", job.quiet)
    if job.fingerprint not in (None, pipe.checkpoint.source.get("fingerprint")):
        notice(f"{job.model} has other weights than when the image was made, so the new one will differ", job.quiet)
    _hint(record)


def _hint(record: Record) -> None:
    """Say where 4 bits take longer than the 16 for which there is memory."""
    from ..device import chip
    from ..store import CHECKPOINT

    job, pipe, draft = record.job, record.pipe, record.draft
    if job.quant is not None and pipe.is_faster_in_bf16(draft.requests[0], draft.edit, job.text_quant):
        stays = job.resolved.kind == CHECKPOINT and pipe.checkpoint.quant != "bf16"
        way = "; download or convert the model with that" if stays else ""
        notice(f"on {chip()} -q bf16 is faster than qint4, and there is memory enough for it{way}", job.quiet)


def _count_tokens(pipe: "Flux2Pipeline", request: "Request", edit: "Edit", job: Job) -> None:
    size = pipe.token_size
    image = request.width * request.height // size**2
    references = sum(edit.token_counts(size))
    notice(f"{image} tokens of the image and {references} of {len(edit.references)} references", job.quiet)


def _rewrite(
    pipe: "Flux2Pipeline", job: Job, images: "list[Image.Image]", bars: Bars
) -> tuple[list[str], list["Phase"]]:
    """The prompts that the images are made from, after --interpret and --upsample-prompt, and what that took."""
    from ..images import open_image

    if job.rewritten is not None:
        return job.rewritten, []
    prompts = [prompt.text for prompt in job.prompts]
    timings = []
    if job.interpret:
        pictures = [open_image(path) for path in job.interpret]
        writer = _seeing(pipe, job, bars)
        with Stream(job.quiet) as stream:
            descriptions = writer.describe(pictures, seed=job.seed[0], on_text=stream.show)
        timings += writer.timings
        prompts = ["\n\n".join([prompt, *descriptions]) for prompt in prompts]
    if job.upsample_prompt:
        writer = _seeing(pipe, job, bars) if images else pipe.writer()
        with Stream(job.quiet) as stream:
            prompts = writer.upsample(prompts, images, seed=job.seed[0], on_text=stream.show)
        timings += writer.timings
    return prompts, timings


def _seeing(pipe: "Flux2Pipeline", job: Job, bars: Bars) -> "Writer":
    """A language model that sees: the model's own, or else that of --vision-model."""
    own = pipe.writer()
    if own.can_see:
        return own
    return open_writer(
        job.vision_model,
        bars,
        dtype=job.dtype,
        memory_limit=job.memory_limit,
        models_dir=job.models_dir,
        keep_source=job.keep_source,
    )
