"""What a job asks of its model: requests, files, plans. All of it is checked before anything is fetched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import image_names
from .frames import Frame
from .job import Job
from .pictures import Opened
from .prompts import named
from .saving import checkpoint_path

if TYPE_CHECKING:
    from .. import Edit, Flux2Pipeline, Plan, Request


@dataclass(frozen=True)
class Target:
    """An image as the model makes it: what it is made with besides prompt and seed, its file, and whether that is there
    already and stays."""

    frame: Frame
    settings: dict[str, Any]
    path: Path
    is_kept: bool


@dataclass(frozen=True)
class Batch:
    """Images that one run makes, the steps after which previews of them are saved, whether it plans for any, and what
    it may take."""

    request: "Request"
    targets: Sequence[Target]
    saved: range
    previews: bool
    planned: "Plan"


@dataclass(frozen=True)
class Draft:
    """The images of a job as the model makes them: `targets` has all, `batches` the runs that make what is missing.

    `first` are the settings of the run that the first image is of. Build it with `Drafts.of`.
    """

    edit: "Edit"
    first: "Request"
    targets: list[Target]
    batches: list[Batch]


@dataclass
class Drafts:
    """Makes the draft of a job with its pictures once the model is known, and another only for another model.

    `preview` has the previews of a pipeline made as is asked for, where there are any.
    """

    job: Job
    opened: Opened
    preview: Callable[["Flux2Pipeline"], object]
    _known: tuple[Any, Draft] | None = field(default=None, init=False)

    def of(self, pipe: "Flux2Pipeline") -> Draft:
        """The draft for a model, of which there may be no more than the outline yet.

        Raises:
            InputError: what can be known to be wrong with the job.
        """
        model = pipe.checkpoint.fitted_variant
        if self._known is None or self._known[0] != model:
            self._known = model, self._draft(pipe)
        return self._known[1]

    def _draft(self, pipe: "Flux2Pipeline") -> Draft:
        edit = pipe.edit(self.opened.images, **self.opened.edit)
        runs = [(_request(pipe, edit, frames), frames) for frames in _groups(self.job.frames)]
        targets = _targets(self.job, edit, runs)
        for target in targets:
            self.job.saving.check(target.path)
        batches = []
        for request, frames in runs:
            missing = [number for number, frame in enumerate(frames) if not targets[frame.place].is_kept]
            made = [targets[frames[number].place] for number in missing]
            if made:
                rest = request if len(made) == len(frames) else request.only(missing)
                batches.append(self._batch(pipe, edit, rest, made))
        return Draft(edit, runs[0][0], targets, batches)

    def _batch(self, pipe: "Flux2Pipeline", edit: "Edit", request: "Request", targets: list[Target]) -> Batch:
        from ..images import check_size

        every = self.job.checkpoint or request.steps
        saved = range(every, request.steps, every)
        for target in targets:
            check_size(target.path, target.settings["width"], target.settings["height"])
            for step in saved:
                self.job.saving.check(checkpoint_path(target.path, step))
        previews = bool(saved) or (self.job.preview and self.job.preview_decoder is not None)
        if previews:
            self.preview(pipe)
        return Batch(request, targets, saved, previews, pipe.plan(request, edit, previews=previews))


def _groups(frames: Sequence[Frame]) -> list[list[Frame]]:
    """The images of as few runs as their settings allow."""
    from ..request import MAX_IMAGES

    groups: dict[tuple[Any, ...], list[Frame]] = {}
    for frame in frames:
        groups.setdefault(tuple(frame.settings.values()), []).append(frame)
    return [
        group[start : start + MAX_IMAGES] for group in groups.values() for start in range(0, len(group), MAX_IMAGES)
    ]


def _request(pipe: "Flux2Pipeline", edit: "Edit", frames: Sequence[Frame]) -> "Request":
    """The settings of a run, which those of its images are."""
    with named(frames[0].line):
        return pipe.request(
            [frame.prompt for frame in frames],
            edit=edit,
            seed=[frame.seed for frame in frames],
            negative_prompt=[frame.negative_prompt or "" for frame in frames],
            **frames[0].settings,
        )


def _targets(job: Job, edit: "Edit", runs: "Sequence[tuple[Request, Sequence[Frame]]]") -> list[Target]:
    """All images in their order."""
    from ..provenance import sampled

    settings: dict[int, dict[str, Any]] = {}
    for request, frames in runs:
        settings |= dict.fromkeys((frame.place for frame in frames), sampled(request, edit))
    if any(frame.negative_prompt for frame in job.frames):
        settings = {x.place: settings[x.place] | {"negative_prompt": x.negative_prompt} for x in job.frames}
    known = [settings[x.place] | {"prompt": x.prompt, "seed": x.seed, "model": job.model} for x in job.frames]
    paths = image_names.paths(
        [frame.template for frame in job.frames],
        image_names.values_of(known),
        listed=job.listed,
        keep=job.saving.expects_files,
    )
    return [
        Target(frame, settings[frame.place], path, job.saving.is_kept(path))
        for frame, path in zip(job.frames, paths, strict=True)
    ]
