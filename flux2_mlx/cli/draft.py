"""What a job asks of its model: requests, pictures, files. All of it is checked before anything is fetched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .job import Job

if TYPE_CHECKING:
    from PIL import Image

    from .. import Flux2Pipeline, Plan, Request
    from ..references import Edit


@dataclass(frozen=True)
class Batch:
    """Images that one run makes: its settings, the images' places in the job, and what the run may take."""

    request: "Request"
    places: Sequence[int]
    planned: "Plan | None" = None


@dataclass(frozen=True)
class Draft:
    """The images of a job as the model makes them, by their places among the job's frames.

    `requests` has for each the request that it is one of, `paths` its file, and `batches` are the runs that make what
    is not there already. Build it with `Drafts.of`.
    """

    edit: "Edit"
    requests: "list[Request]"
    paths: list[Path]
    batches: list[Batch]

    @property
    def missing(self) -> list[int]:
        """The places of the images to make."""
        return sorted(place for batch in self.batches for place in batch.places)


class Drafts:
    """Makes the draft of a job when its model is known, and only then another if the model turns out to be another.

    Args:
        job: what is asked for.
        images: the pictures of the edit.
        settings: what is done with them, as `Flux2Pipeline.edit` takes it.
    """

    def __init__(self, job: Job, images: "list[Image.Image]", settings: dict[str, Any]):
        self._job = job
        self._images = images
        self._settings = settings
        self._known: tuple[Any, Draft] | None = None

    def of(self, pipe: "Flux2Pipeline") -> Draft:
        """The draft for a model, of which there may be no more than the outline yet.

        Raises:
            InputError: what can be known to be wrong with the job.
        """
        model = pipe.checkpoint.model
        if self._known is None or self._known[0] != model:
            self._known = model, self._draft(pipe)
        return self._known[1]

    def _draft(self, pipe: "Flux2Pipeline") -> Draft:
        job = self._job
        edit = pipe.edit(self._images, **self._settings)
        whole = _batches(job, lambda prompts, **settings: pipe.request(prompts, edit=edit, **settings))
        request_of = {place: batch.request for batch in whole for place in batch.places}
        requests = [request_of[place] for place in range(len(job.frames))]
        paths = _paths(job, edit, requests)
        for path in paths:
            check_path(job, path)
        missing = {place for place, path in enumerate(paths) if not is_kept(job, path)}
        batches = []
        for batch in whole:
            if places := [place for place in batch.places if place in missing]:
                request = batch.request.only([batch.places.index(place) for place in places])
                _check_images(request, edit, job, [paths[place] for place in places])
                planned = pipe.plan(request, edit, previews=has_previews(job, request))
                batches.append(Batch(request, places, planned))
        return Draft(edit, requests, paths, batches)


def _batches(job: Job, build: "Callable[..., Request]") -> list[Batch]:
    """The images of a job in as few runs as their settings allow; `build` makes a request of prompts and settings."""
    from ..request import MAX_IMAGES

    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, frame in enumerate(job.frames):
        groups.setdefault(tuple(job.settings(frame.prompt).values()), []).append(place)
    parts = (
        group[start : start + MAX_IMAGES] for group in groups.values() for start in range(0, len(group), MAX_IMAGES)
    )
    return [Batch(_request(job, build, places), places) for places in parts]


def _request(job: Job, build: "Callable[..., Request]", places: list[int]) -> "Request":
    """The request of images whose settings are the same."""
    frames = [job.frames[place] for place in places]
    first = frames[0].prompt
    negatives = [job.negative(frame.prompt) or "" for frame in frames]
    with first.named():
        prompts, seeds = [frame.prompt.text for frame in frames], [frame.seed for frame in frames]
        return build(prompts, seed=seeds, negative_prompt=negatives, **job.settings(first))


def _paths(job: Job, edit: "Edit", requests: "Sequence[Request]") -> list[Path]:
    values = []
    for request in requests:
        width, height = edit.output_size(request.width, request.height)
        values.append({"width": width, "height": height, "steps": request.steps})
    return job.paths(values)


def _check_images(request: "Request", edit: "Edit", job: Job, paths: list[Path]) -> None:
    """Raise InputError if images of this size, or those between their steps, can't be written to their files."""
    from ..images import check_size

    for path in paths:
        check_size(path, *edit.output_size(request.width, request.height))
        for step in range(job.checkpoint or request.steps, request.steps, job.checkpoint or 1):
            check_path(job, job.checkpoint_path(path, step))


def check_path(job: Job, path: Path) -> None:
    """Raise InputError if an image can't be written to `path`, or one that is to be left there is damaged."""
    from ..images import check_output, check_whole

    if not is_kept(job, path):
        check_output(path, job.force or is_empty(job, path))
        return
    try:
        check_whole(path)
    except InputError as error:
        raise InputError(f"{error}; remove it to have it made again") from error


def is_kept(job: Job, path: Path) -> bool:
    """Whether a file that is there is left and not made."""
    return job.skip_existing and path.is_file() and path.stat().st_size > 0


def is_empty(job: Job, path: Path) -> bool:
    """Whether a file is there that a killed run has left on a disk without links, and that is not to be kept."""
    return job.skip_existing and path.is_file() and path.stat().st_size == 0


def has_previews(job: Job, request: "Request") -> bool:
    """Whether there are images between the steps."""
    return job.checkpoint is not None and job.checkpoint < request.steps
