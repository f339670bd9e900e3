"""The language model of a command line: what `upsample` and `describe` print, and what prompts are rewritten to."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import VARIANTS
from ..errors import InputError
from .job import Job
from .progress import Bars, Stream

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from .. import Flux2Output, Flux2Pipeline, Writer
    from ..store import Model


def model_of(name: str, models_dir: "Path | None", *, must_see: bool) -> "Model":
    """What a model's name means; InputError if its language model must see images and is known to be blind."""
    from ..store import resolve

    model = resolve(name, models_dir)
    if must_see and is_blind(model):
        seeing = ", ".join(name for name, variant in VARIANTS.items() if variant.vision)
        raise InputError(f"{model.name} has no language model that sees images; choose {seeing}")
    return model


def is_blind(model: "Model") -> bool:
    """Whether `model` is one of the table whose language model can't look at images."""
    return model.variant is not None and model.variant.vision is None


def open_writer(model: "Model | str", bars: Bars, **settings: Any) -> "Writer":
    """The language model of `model`, fetched and converted first if need be; `settings` go to
    `Writer.from_pretrained`."""
    from .. import Writer

    return Writer.from_pretrained(model, announce=bars.announce, progress=bars, **settings)


def described(writer: "Writer", images: "Sequence[Image.Image]", quiet: bool, **settings: Any) -> list[str]:
    """What is to be seen in each image, which is shown while it is written; `settings` are those of `Writer.write`."""
    with Stream(quiet) as stream:
        return writer.describe(images, on_text=stream.show, **settings)


def upsampled(
    writer: "Writer", prompts: Sequence[str], images: "Sequence[Image.Image]", quiet: bool, **settings: Any
) -> list[str]:
    """Each prompt in more detail, which is shown while it is written; `settings` are those of `Writer.write`."""
    with Stream(quiet) as stream:
        return writer.upsample(prompts, images, on_text=stream.show, **settings)


def rewritten(
    job: Job, images: "Sequence[Image.Image]", pipe: "Flux2Pipeline", output: "Flux2Output", bars: Bars
) -> list[str]:
    """The prompts of a job after --interpret and --upsample-prompt; what that took goes into `output`."""
    from ..images import open_image

    prompts = job.prompts
    if job.interpret:
        writer = _seeing(pipe, job, bars)
        descriptions = described(writer, [open_image(path) for path in job.interpret], job.quiet, seed=job.seed)
        output.timings += writer.timings
        prompts = ["\n\n".join([prompt, *descriptions]) for prompt in prompts]
    if job.upsample_prompt:
        writer = _seeing(pipe, job, bars) if images else pipe.writer()
        prompts = upsampled(writer, prompts, images, job.quiet, seed=job.seed)
        output.timings += writer.timings
    return prompts


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
