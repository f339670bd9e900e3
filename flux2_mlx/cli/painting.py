"""Doing a job: checks, loading, rewriting, painting, saving, printing."""

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import VARIANTS, Variant
from ..errors import InputError
from .job import Job
from .options import DEFAULT_MODEL
from .progress import Bars, Stream, notice
from .report import Record, differences, print_profile
from .terminal import print_result, to_json
from .writing import check_sight, is_blind, open_writer

if TYPE_CHECKING:
    from PIL import Image

    from ..checkpoint import Checkpoint
    from ..networks import Networks
    from ..output import Phase
    from ..pipeline import Flux2Pipeline
    from ..references import Edit
    from ..request import Progress, Request
    from ..upsampling import Writer

Batch = tuple["Request", list[int]]  # images that one run makes: its settings, and their places in the job
_log = logging.getLogger(__name__)


def paint(job: Job, *, profile: bool, as_json: bool) -> None:
    """Make the images of `job`, and print the path of each as soon as it is there, or a report of all at the end."""
    images, edit, hashes = job.pictures.open()
    for path, former in job.pictures.others(hashes):
        notice(f"{path} is not the {former} that the image was made from, so the new one will differ", job.quiet)
    checked = _check(job, images, edit)
    with Bars(job.quiet) as bars:
        pipe = _open(job, bars, partial(_check_fit, job, images, edit))
        edit = pipe.edit(images, **edit)
        texts, edited = [prompt.text for prompt in job.prompts], job.pictures.settings(hashes)
        record = Record(job, pipe, edit, edited, _requests(job, _batches(job, _builder(pipe, edit), texts)), texts)
        record.paths = _paths(job, edit, record.requests)
        _hint(pipe, job, record.requests[0], edit)
        _check_paths(job, [path for path in record.paths if path not in checked])
        missing = _skip(record)
        try:
            if missing:
                _make(record, missing, images, bars, as_json)
        finally:
            # Of a run that is cut short, too, what is finished stays and is named.
            ended = sys.exc_info()[0] is None
            if as_json and (ended or record.made):
                print_result(to_json(record.report(complete=ended)))
    if profile:
        print_profile(record.output, record.seconds)


def _builder(pipe: "Flux2Pipeline", edit: "Edit") -> "Callable[..., Request]":
    return lambda prompts, **settings: pipe.request(prompts, edit=edit, **settings)


def _batches(
    job: Job, build: "Callable[..., Request]", texts: Sequence[str], places: Sequence[int] | None = None
) -> list[Batch]:
    """The images at `places`, by default all of the job, in as few runs as their settings allow.

    `build` makes a request of prompts and settings, and `texts` are what was made of the job's prompts.
    """
    from ..request import MAX_IMAGES

    groups: dict[tuple, list[int]] = {}
    for place in range(len(job.frames)) if places is None else places:
        groups.setdefault(tuple(job.settings(job.frames[place].prompt).values()), []).append(place)
    parts = (
        group[start : start + MAX_IMAGES] for group in groups.values() for start in range(0, len(group), MAX_IMAGES)
    )
    return [(_request(job, build, texts, part), part) for part in parts]


def _request(job: Job, build: "Callable[..., Request]", texts: Sequence[str], places: list[int]) -> "Request":
    """The request of images whose settings are the same."""
    frames = [job.frames[place] for place in places]
    first, negatives = frames[0].prompt, [job.negative(frame.prompt) or "" for frame in frames]
    with first.named():
        prompts = [texts[frame.number] for frame in frames]
        seeds = [frame.seed for frame in frames]
        return build(prompts, seed=seeds, negative_prompt=negatives, **job.settings(first))


def _requests(job: Job, batches: Sequence[Batch]) -> "list[Request]":
    """The request that each image of the job is one of."""
    found = {place: request for request, places in batches for place in places}
    return [found[place] for place in range(len(job.frames))]


def _paths(job: Job, edit: "Edit", requests: "Sequence[Request]") -> list[Path]:
    values = []
    for request in requests:
        width, height = edit.output_size(request.width, request.height)
        values.append({"width": width, "height": height, "steps": request.steps})
    return job.paths(values)


def _skip(record: Record) -> list[int]:
    """The places of the images to make. Those that are there already are left, those made otherwise with a warning."""
    from ..images import read_settings

    for place, path in enumerate(record.paths):
        if not _is_kept(record.job, path):
            if _is_empty(record.job, path):
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
    return sorted(set(range(len(record.paths))) - set(record.skipped))


def _make(record: Record, missing: list[int], images: "list[Image.Image]", bars: Bars, as_json: bool) -> None:
    """Make the images of the places that are `missing`."""
    job, pipe, edit = record.job, record.pipe, record.edit
    build = _builder(pipe, edit)
    for request, places in _batches(job, build, record.texts, missing):
        _check_images(request, edit, job, [record.paths[place] for place in places])
        pipe.networks.checked_plan(request, edit, previews=_has_previews(job, request))
        if images:
            _count_tokens(pipe, request, edit, job)
        if not request.negative_prompts and any(job.negative(job.frames[place].prompt) for place in places):
            notice(f"a negative prompt has no effect at a guidance of {request.guidance:g}", job.quiet)
    record.texts, record.output.timings[:] = _rewrite(pipe, job, images, bars)
    for request, places in _batches(job, build, record.texts, missing):
        pipe.run(
            request,
            edit,
            on_progress=_listener(record, request, places, bars, as_json),
            previews=_has_previews(job, request),
            resume=True,
            output=record.output,
        )


def _listener(
    record: Record, request: "Request", places: list[int], bars: Bars, as_json: bool
) -> "Callable[[Progress], None]":
    """What hears of the run of a batch: it shows how far that is, and saves and prints images."""
    job, denoised = record.job, True

    def on_progress(progress: "Progress") -> None:
        nonlocal denoised
        if progress.phase == "transformer":
            denoised = progress.done == progress.total
        if denoised or progress.phase != "vae":  # a bar at a time
            bars.show(progress.phase, progress.done, progress.total)
        about = [places[image] for image in progress.images]
        if progress.image is not None:
            path = _save(record, about[0], progress.image)
            if not as_json:
                with bars.aside():
                    print_result(path)
        step = progress.step
        if step is not None and job.checkpoint and step.number % job.checkpoint == 0 and step.number < request.steps:
            _save_previews(job, [record.paths[place] for place in about], step.number, progress.preview())

    return on_progress


def _save(record: Record, place: int, image: "Image.Image") -> Path:
    """Write an image to its path, or beside it if something has appeared there meanwhile."""
    from ..images import save

    path, settings = record.paths[place], record.settings(place) if record.job.metadata else None
    path.parent.mkdir(parents=True, exist_ok=True)
    replace = record.job.force or _is_empty(record.job, path)
    record.paths[place] = save(image, path, settings, replace=replace)
    record.made.append(place)
    return record.paths[place]


def _save_previews(job: Job, paths: list[Path], step: int, previews: "list[Image.Image]") -> None:
    from ..images import save

    for path, preview in zip(paths, previews, strict=True):
        target = job.checkpoint_path(path, step)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _is_kept(job, target):
            save(preview, target, replace=job.force or _is_empty(job, target))


def _check(job: Job, images: "list[Image.Image]", edit: dict[str, Any]) -> list[Path]:
    """Everything that can be known to be wrong before a model is fetched; the paths that can be written."""
    from ..images import open_image
    from ..store import resolve

    paths = _check_run(job, images, edit)
    for path in job.interpret:
        open_image(path)
    looks = job.interpret or (images and job.upsample_prompt)
    if looks and job.rewritten is None and is_blind(job.resolved):
        check_sight(resolve(job.vision_model, job.models_dir))
    if not job.no_cache:
        _check_cache(job)
    _check_paths(job, paths)
    return paths


def _check_paths(job: Job, paths: Sequence[Path]) -> None:
    for path in paths:
        _check_path(job, path)


def _check_path(job: Job, path: Path) -> None:
    from ..images import check_output, check_whole

    if not _is_kept(job, path):
        check_output(path, job.force or _is_empty(job, path))
        return
    try:
        check_whole(path)
    except InputError as error:
        raise InputError(f"{error}; remove it to have it made again") from error


def _is_kept(job: Job, path: Path) -> bool:
    return job.skip_existing and path.is_file() and path.stat().st_size > 0


def _is_empty(job: Job, path: Path) -> bool:
    """Whether a file is there that a killed run has left on a disk without links, and that is not to be kept."""
    return job.skip_existing and path.is_file() and path.stat().st_size == 0


def _check_run(job: Job, images: "list[Image.Image]", edit: dict[str, Any]) -> list[Path]:
    """The settings, and, of a model of the table that is known by its name, that it will fit into memory; the paths, as
    far as they are known."""
    from ..names import VARIANT
    from ..networks import Networks

    row = job.resolved.variant or VARIANTS[DEFAULT_MODEL]
    batches, pictures, wanted = _checked(job, images, edit, row, known=job.resolved.variant is not None)
    if job.resolved.kind == VARIANT:
        _check_plans(job, Networks.described(row, job.quant or "bf16", job.text_quant, **wanted), batches, pictures)
    return _paths(job, pictures, _requests(job, batches))


def _check_fit(job: Job, images: "list[Image.Image]", edit: dict[str, Any], checkpoint: "Checkpoint") -> None:
    """That a model which is about to be fetched will fit into memory."""
    from ..networks import Networks

    batches, pictures, wanted = _checked(job, images, edit, checkpoint.model)
    _check_plans(job, Networks.of(checkpoint, job.quant, job.text_quant, **wanted), batches, pictures)


def _check_plans(job: Job, networks: "Networks", batches: Sequence[Batch], edit: "Edit") -> None:
    for request, _ in batches:
        networks.checked_plan(request, edit, previews=_has_previews(job, request))


def _checked(
    job: Job, images: "list[Image.Image]", edit: dict[str, Any], model: Variant, *, known: bool = True
) -> "tuple[list[Batch], Edit, dict[str, Any]]":
    """The runs of a `model`, which may not be `known` yet, their pictures, and the further settings of its networks."""
    from ..device import activation_dtype, memory_bytes
    from ..references import Edit
    from ..request import Request

    wanted = {"dtype": activation_dtype(job.dtype), "memory_limit": memory_bytes(job.memory_limit)}
    pictures = Edit.checked(images, model.vae.token_size, **edit)

    def build(prompts: Sequence[str], width: int | None, height: int | None, **settings: Any) -> Request:
        width, height = pictures.working_size(width, height)
        if not known:
            del settings["negative_prompt"]  # whether the model has a use for it is not known yet
        return Request.checked(model, model.vae.token_size, prompts, width=width, height=height, **settings)

    return _batches(job, build, [prompt.text for prompt in job.prompts]), pictures, wanted


def _has_previews(job: Job, request: "Request") -> bool:
    return job.checkpoint is not None and job.checkpoint < request.steps


def _check_cache(job: Job) -> None:
    from ..embedding_cache import FOLDER, EmbeddingCache
    from ..names import models_folder

    EmbeddingCache(models_folder(job.models_dir) / FOLDER)


def _check_images(request: "Request", edit: "Edit", job: Job, paths: list[Path]) -> None:
    """What else can be wrong with the files, now that the model has given size and steps."""
    from ..images import check_size

    for path in paths:
        check_size(path, *edit.output_size(request.width, request.height))
        for step in range(job.checkpoint or request.steps, request.steps, job.checkpoint or 1):
            _check_path(job, job.checkpoint_path(path, step))


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


def _hint(pipe: "Flux2Pipeline", job: Job, request: "Request", edit: "Edit") -> None:
    """Say where 4 bits take longer than the 16 for which there is memory."""
    from ..device import chip, is_slow_with_qint4
    from ..networks import Networks

    if job.quant != "qint4" or not is_slow_with_qint4():
        return
    own = pipe.networks
    plain = Networks.described(pipe.checkpoint.model, "bf16", own.text_quant, own.dtype, own.memory_limit)
    planned = plain.plan(request, edit)
    if planned.fits and not planned.phase("transformer").streamed:
        notice(f"on {chip()} -q bf16 is faster than qint4, and there is memory enough for it", job.quiet)


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
    prompts, timings = [prompt.text for prompt in job.prompts], []
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
    options = {"dtype": job.dtype, "memory_limit": job.memory_limit, "models_dir": job.models_dir}
    options["keep_source"] = job.keep_source
    return open_writer(job.vision_model, bars, **options)
