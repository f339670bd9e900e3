"""Doing a job: checks, loading, rewriting, painting, saving, printing."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import VARIANTS, Variant
from .job import Job
from .options import DEFAULT_MODEL
from .progress import Bars, Stream, notice
from .report import Result, Run, print_profile
from .terminal import print_result, to_json
from .writing import check_sight, is_blind, open_writer

if TYPE_CHECKING:
    from PIL import Image

    from ..checkpoint import Checkpoint
    from ..phases import Phase, Progress
    from ..pipeline import Flux2Pipeline
    from ..references import Edit
    from ..sampling import Request
    from ..upsampling import Writer


def paint(job: Job, *, profile: bool, as_json: bool) -> None:
    """Make the images of `job`, and print the path of each as soon as it is there, or a report of all at the end."""
    images, edit, hashes = job.pictures.open()
    paths = job.paths()
    missing = [place for place, path in enumerate(paths) if not (job.skip_existing and path.is_file())]
    _check(job, [paths[place] for place in missing], images, edit)
    with Bars(job.quiet) as bars:
        pipe = _open(job, bars, partial(_check_fit, job, images, edit))
        edit = pipe.edit(images, **edit)
        request = pipe.request(job.prompts, edit=edit, **job.settings())
        result = Result(Run(job.model, pipe, request, job.prompts, edit, job.pictures.settings(hashes)), paths)
        result.skip(place for place in range(len(paths)) if place not in missing)
        try:
            if missing:
                _make(result, missing, job, images, bars, as_json)
        finally:
            # Of a run that is cut short, too, what is finished stays and is named.
            ended = sys.exc_info()[0] is None
            if as_json and (ended or result.made):
                print_result(to_json(result.report(complete=ended)))
    if profile:
        print_profile(result.output, result.seconds)


def _make(result: Result, missing: list[int], job: Job, images: "list[Image.Image]", bars: Bars, as_json: bool) -> None:
    """Make the images of the places that are `missing`."""
    run = result.run
    request = run.request.only(missing)
    _check_images(request, run.edit, job, [result.paths[place] for place in missing])
    run.pipe.networks.checked_plan(request, run.edit, previews=_has_previews(job, request))
    if images:
        _count_tokens(run.pipe, request, run.edit, job)
    prompts, result.output.timings[:] = _rewrite(run.pipe, job, images, bars)
    result.run = run = replace(run, request=run.pipe.request(prompts, edit=run.edit, **job.settings()))
    denoised = True

    def on_progress(progress: "Progress") -> None:
        nonlocal denoised
        if progress.phase == "transformer":
            denoised = progress.done == progress.total
        if denoised or progress.phase != "vae":  # a bar at a time
            bars.show(progress.phase, progress.done, progress.total)
        places = [missing[image] for image in progress.images]
        if progress.image is not None:
            path = result.save(places[0], progress.image, replace=job.force)
            if not as_json:
                with bars.aside():
                    print_result(path)
        step = progress.step
        if step is not None and job.checkpoint and step.number % job.checkpoint == 0 and step.number < request.steps:
            _save_previews(job, [result.paths[place] for place in places], step.number, progress.preview())

    run.pipe.run(
        run.request.only(missing),
        run.edit,
        on_progress=on_progress,
        previews=_has_previews(job, request),
        resume=True,
        output=result.output,
    )


def _save_previews(job: Job, paths: list[Path], step: int, previews: "list[Image.Image]") -> None:
    from ..images import save

    for path, preview in zip(paths, previews, strict=True):
        target = job.checkpoint_path(path, step)
        if not (job.skip_existing and target.exists()):
            save(preview, target, replace=job.force)


def _check(job: Job, paths: list[Path], images: "list[Image.Image]", edit: dict[str, Any]) -> None:
    """Everything that can be known to be wrong before a model is fetched."""
    from ..images import check_output, open_image
    from ..store import resolve

    _check_run(job, images, edit)
    for path in job.interpret:
        open_image(path)
    looks = job.interpret or (images and job.upsample_prompt)
    if looks and job.rewritten is None and is_blind(job.resolved):
        check_sight(resolve(job.vision_model, job.models_dir))
    if not job.no_cache:
        _check_cache(job)
    for path in paths:
        check_output(path, job.force)


def _check_run(job: Job, images: "list[Image.Image]", edit: dict[str, Any]) -> None:
    """The settings, and, of a model of the table that is known by its name, that it will fit into memory."""
    from ..names import VARIANT
    from ..networks import Networks

    row = job.resolved.variant or VARIANTS[DEFAULT_MODEL]
    request, pictures, wanted = _checked(job, images, edit, row)
    if job.resolved.kind == VARIANT:
        networks = Networks.described(row, job.quant or "bf16", job.text_quant, **wanted)
        networks.checked_plan(request, pictures, previews=_has_previews(job, request))


def _check_fit(job: Job, images: "list[Image.Image]", edit: dict[str, Any], checkpoint: "Checkpoint") -> None:
    """That a model which is about to be fetched will fit into memory."""
    from ..networks import Networks

    request, pictures, wanted = _checked(job, images, edit, checkpoint.model)
    networks = Networks.of(checkpoint, job.quant, job.text_quant, **wanted)
    networks.checked_plan(request, pictures, previews=_has_previews(job, request))


def _checked(
    job: Job, images: "list[Image.Image]", edit: dict[str, Any], model: Variant
) -> "tuple[Request, Edit, dict[str, Any]]":
    """The settings of a run of `model`, its pictures, and the further ones of its networks."""
    from ..device import activation_dtype, memory_bytes
    from ..references import Edit
    from ..sampling import Request

    wanted = {"dtype": activation_dtype(job.dtype), "memory_limit": memory_bytes(job.memory_limit)}
    pictures, settings = Edit.checked(images, model.vae.token_size, **edit), job.settings()
    settings["width"], settings["height"] = pictures.working_size(job.width, job.height)
    return Request.checked(model, model.vae.token_size, job.prompts, **settings), pictures, wanted


def _has_previews(job: Job, request: "Request") -> bool:
    return job.checkpoint is not None and job.checkpoint < request.steps


def _check_cache(job: Job) -> None:
    from ..embedding_cache import FOLDER, EmbeddingCache
    from ..names import models_folder

    EmbeddingCache(models_folder(job.models_dir) / FOLDER)


def _check_images(request: "Request", edit: "Edit", job: Job, paths: list[Path]) -> None:
    """What else can be wrong with the files, now that the model has given size and steps."""
    from ..images import check_output, check_size

    for path in paths:
        check_size(path, *edit.output_size(request.width, request.height))
        for step in range(job.checkpoint or request.steps, request.steps, job.checkpoint or 1):
            check_output(job.checkpoint_path(path, step), job.force or job.skip_existing)


def _open(job: Job, bars: Bars, check: Callable[["Checkpoint"], object]) -> "Flux2Pipeline":
    from ..pipeline import Flux2Pipeline
    from ..store import find_checkpoint

    folder = find_checkpoint(
        job.resolved,
        variant=job.variant,
        quant=job.quant,
        text_quant=job.text_quant,
        models_dir=job.models_dir,
        keep_source=job.keep_source,
        check=check,
        announce=bars.announce,
        progress=bars,
    )
    pipe = Flux2Pipeline.from_checkpoint(
        folder,
        quant=job.quant,
        text_quant=job.text_quant,
        dtype=job.dtype,
        models_dir=job.models_dir,
        prompt_cache=not job.no_cache,
        memory_limit=job.memory_limit,
    )
    variant = pipe.variant
    if not variant.commercial_use:
        notice(f"{variant.name} and its images: {variant.licence} licence", job.quiet)
    if variant.distilled and job.guidance not in (None, variant.guidance):
        notice(f"{variant.name} is distilled and ignores --guidance", job.quiet)
    if job.fingerprint not in (None, pipe.checkpoint.source.get("fingerprint")):
        notice(f"{job.model} has other weights than when the image was made, so the new one will differ", job.quiet)
    return pipe


def _count_tokens(pipe: "Flux2Pipeline", request: "Request", edit: "Edit", job: Job) -> None:
    size = pipe.token_size
    image, references = request.width * request.height // size**2, sum(edit.token_counts(size))
    notice(f"{image} tokens of the image and {references} of {len(edit.references)} references", job.quiet)


def _rewrite(
    pipe: "Flux2Pipeline", job: Job, images: "list[Image.Image]", bars: Bars
) -> tuple[list[str], list["Phase"]]:
    """The prompts that the images are made from, after --interpret and --upsample-prompt, and what that took."""
    from ..images import open_image

    if job.rewritten is not None:
        return job.rewritten, []
    prompts, timings = job.prompts, []
    if job.interpret:
        pictures = [open_image(path) for path in job.interpret]
        writer = _seeing(pipe, job, bars)
        with Stream(job.quiet) as stream:
            descriptions = writer.describe(pictures, seed=job.seed, on_text=stream.show)
        timings += writer.timings
        prompts = ["\n\n".join([prompt, *descriptions]) for prompt in prompts]
    if job.upsample_prompt:
        writer = _seeing(pipe, job, bars) if images else pipe.writer()
        with Stream(job.quiet) as stream:
            prompts = writer.upsample(prompts, images, seed=job.seed, on_text=stream.show)
        timings += writer.timings
    return prompts, timings


def _seeing(pipe: "Flux2Pipeline", job: Job, bars: Bars) -> "Writer":
    """A language model that sees: the model's own, or else that of --vision-model."""
    own = pipe.writer()
    if own.can_see:
        return own
    options = {"dtype": job.dtype, "memory_limit": job.memory_limit, "models_dir": job.models_dir}
    options["keep_source"] = job.keep_source
    return open_writer(job.vision_model, bars, **options)
