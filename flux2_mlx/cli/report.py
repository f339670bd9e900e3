"""What a run leaves behind: settings inside image files, the JSON report, the profile."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .draft import Target
from .job import Job
from .progress import size_text
from .terminal import print_result

if TYPE_CHECKING:
    from PIL import Image

    from .. import Flux2Output, Flux2Pipeline


def _new_output() -> "Flux2Output":
    from .. import Flux2Output

    return Flux2Output()


@dataclass
class Record:
    """What is known of the images of a job, the `targets`.

    `edited` is what image files remember of the edit, `texts` has for each prompt what was made of it, and `made` the
    file of each image that is finished, by its place.
    """

    job: Job
    targets: list[Target]
    pipe: "Flux2Pipeline"
    edited: dict[str, Any] | None
    texts: list[str]
    output: "Flux2Output" = field(default_factory=_new_output)
    made: dict[int, Path] = field(default_factory=dict)
    _start: float = field(default_factory=time.perf_counter)

    def settings(self, target: Target) -> dict[str, Any]:
        """What an image remembers: all that is needed to make it again, and of files and folders their names only."""
        from ..provenance import image_settings

        frame = target.frame
        return image_settings(
            self.pipe.networks,
            model=self.job.label,
            prompt=frame.prompt,
            text=self.texts[frame.number],
            settings=target.settings,
            seed=frame.seed,
            edited=self.edited,
        )

    def save(self, target: Target, image: "Image.Image") -> Path:
        """Write an image with its settings, and give the path that it is at."""
        settings = self.settings(target) if self.job.metadata else None
        path = self.job.saving.save(image, target.path, settings)
        self.made[target.frame.place] = path
        return path

    def report(self, *, complete: bool) -> dict[str, Any]:
        """The object that --json prints; `complete` is whether nothing is missing.

        A setting that is not the same for all images is None, and each image says its own.
        """
        from ..provenance import adapters, weights

        asked = self.job.prompts
        texts = self.texts if self.texts != asked else [None]
        first, *others = (target.settings for target in self.targets)
        shared = {name: x if all(other[name] == x for other in others) else None for name, x in first.items()}
        made = [self._file(self.targets[place], self.made[place], shared) for place in sorted(self.made)]
        skipped = [self._file(target, target.path, shared) for target in self.targets if target.is_kept]
        return {
            "images": made,
            **({"skipped": skipped} if skipped else {}),
            **({} if complete else {"interrupted": True}),
            "prompt": asked[0] if len(asked) == 1 else asked,
            "upsampled_prompt": texts[0] if len(texts) == 1 else texts,
            "model": self.job.model,
            **weights(self.pipe.networks),
            **adapters(self.pipe.networks),
            **shared,
            **({} if self.edited is None else {"edit": self.edited}),
            "phases": _phases(self.output),
            **({"passes": asdict(self.output.passes)} if self.output.passes.all else {}),
            "seconds": self.seconds,
            "peak_memory": self.output.peak_memory,
        }

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def _file(self, target: Target, path: Path, shared: dict[str, Any]) -> dict[str, Any]:
        frame = target.frame
        own = {name: value for name, value in target.settings.items() if shared[name] is None}
        prompt = {"prompt": frame.prompt} if len(self.job.prompts) > 1 else {}
        return {"path": str(path), "seed": frame.seed, **prompt, **own}


def is_image(name: str) -> bool:
    """Whether this is the name of a file that can be an image which this program has made."""
    from ..images import FORMATS

    return Path(name).suffix.lower() in FORMATS and not Path(name).is_dir()


def print_settings(settings: dict[str, Any]) -> None:
    """Show what an image remembers, a setting a line; further lines of a text are indented."""
    for name, value in _flat(settings):
        print_result(f"{name}: {value}".replace("\n", "\n  "))


def _flat(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings that are there, those of an edit with their names in front, and of files the names."""
    shown: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, dict) and "path" not in value:
            shown += [(f"{name.replace('_', ' ')} {inner}", x) for inner, x in _flat(value)]
        elif value is not None:
            files = value if isinstance(value, list) else [value]
            words = [str(file.get("path", file)) if isinstance(file, dict) else str(file) for file in files]
            shown.append((name.replace("_", " "), ", ".join(words)))
    return shown


def _phases(output: "Flux2Output") -> list[dict[str, Any]]:
    """What is known of each phase; what was read only if something was."""
    always = ("name", "seconds", "peak_memory")
    return [
        {key: value for key, value in asdict(phase).items() if phase.read or key in always} for phase in output.timings
    ]


def passes_notice(output: "Flux2Output") -> str | None:
    """What a step cache has spared, in words; None: there was none."""
    passes = output.passes
    if not passes.all:
        return None
    unread = f", and {size_text(passes.unread)} of reading" if passes.unread else ""
    return f"the step cache skipped {passes.skipped} of {passes.all} passes through the transformer{unread}"


def print_profile(output: "Flux2Output", seconds: float) -> None:
    """A line on stderr for each phase."""
    for phase in output.timings:
        line = _line(phase.name, phase.seconds, phase.peak_memory)
        if phase.read:
            read = phase.read / 2**30
            each = phase.streamed / 2**30
            line += f", {read:.3f} GiB read, {each:.3f} a pass, {phase.overlap:.0%} of the time beside the computation"
        click.echo(line, err=True)
    click.echo(_line("whole run", seconds, output.peak_memory), err=True)


def _line(name: str, seconds: float, peak: int) -> str:
    return f"{name:14}{seconds:9.2f} s{peak / 2**30:9.3f} GiB peak"
