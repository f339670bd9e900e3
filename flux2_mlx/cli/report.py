"""What a run leaves behind: settings inside image files, the JSON report, the profile."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .draft import Draft
from .job import Job
from .replay import without_folders
from .terminal import print_result

if TYPE_CHECKING:
    from ..output import Flux2Output, Phase
    from ..pipeline import Flux2Pipeline

# What must be the same for an image to be the one that is asked for.
_COMPARED = (
    "prompt", "seed", "variant", "fingerprint", "quant", "text_quant", "width", "height", "steps", "guidance",
)  # fmt: skip
_EFFECT = "sha256", "scale", "steps"  # what that of an adapter depends on
_WORDS = {"variant": "model", "fingerprint": "weights", "text_quant": "quant of the text encoder"}


def _new_output() -> "Flux2Output":
    from ..output import Flux2Output

    return Flux2Output()


@dataclass
class Record:
    """What is known of the images of a job, by their places among its frames.

    `edited` is what image files remember of the edit, `texts` has for each prompt what was made of it, and `paths` the
    file of each image: of those that are `made`, and of those that were there already and are `skipped`.
    """

    job: Job
    pipe: "Flux2Pipeline"
    draft: Draft
    edited: dict[str, Any] | None
    output: "Flux2Output" = field(default_factory=_new_output)
    made: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.texts = [prompt.text for prompt in self.job.prompts]
        self.paths = list(self.draft.paths)

    def sampled(self, place: int) -> dict[str, Any]:
        """The settings of an image, besides its prompt and seed, that may differ from image to image."""
        from ..provenance import sampled

        settings = sampled(self.draft.requests[place], self.draft.edit)
        if any(map(self.job.negative, self.job.prompts)):
            settings["negative_prompt"] = self.job.negative(self.job.frames[place].prompt)
        return settings

    def settings(self, place: int) -> dict[str, Any]:
        """What an image remembers: all that is needed to make it again, and of files and folders their names only."""
        from ..provenance import image_settings

        frame = self.job.frames[place]
        return image_settings(
            self.pipe.networks,
            model=self.job.label,
            prompt=frame.prompt.text,
            text=self.texts[frame.number],
            settings=self.sampled(place),
            seed=frame.seed,
            edited=self.edited,
        )

    def report(self, *, complete: bool) -> dict[str, Any]:
        """The object that --json prints; `complete` is whether nothing is missing.

        A setting that is not the same for all images is None, and each image says its own.
        """
        from ..provenance import adapters, weights

        asked = [prompt.text for prompt in self.job.prompts]
        places = range(len(self.paths))
        texts = self.texts if self.texts != asked else [None]
        settings = [self.sampled(place) for place in places]
        shared = {name: x if all(other[name] == x for other in settings) else None for name, x in settings[0].items()}
        return {
            "images": self._files(self.made, shared),
            **({"skipped": self._files(self.skipped, shared)} if self.skipped else {}),
            **({} if complete else {"interrupted": True}),
            "prompt": asked[0] if len(asked) == 1 else asked,
            "upsampled_prompt": texts[0] if len(texts) == 1 else texts,
            "model": self.job.model,
            **weights(self.pipe.networks),
            **adapters(self.pipe.networks),
            **shared,
            **self._edited(),
            "phases": [_phase(phase) for phase in self.output.timings],
            "seconds": self.seconds,
            "peak_memory": self.output.peak_memory,
        }

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def _edited(self) -> dict[str, Any]:
        return {} if self.edited is None else {"edit": self.edited}

    def _files(self, places: list[int], shared: dict[str, Any]) -> list[dict[str, Any]]:
        return [self._file(place, shared) for place in sorted(places)]

    def _file(self, place: int, shared: dict[str, Any]) -> dict[str, Any]:
        frame = self.job.frames[place]
        own = {name: value for name, value in self.sampled(place).items() if shared[name] is None}
        prompt = {"prompt": frame.prompt.text} if len(self.job.prompts) > 1 else {}
        return {"path": str(self.paths[place]), "seed": frame.seed, **prompt, **own}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The settings in which an image differs from what is wanted, in words. What either does not tell is no
    difference."""
    changed = [
        name for name in _COMPARED if None not in (found.get(name), wanted[name]) and found[name] != wanted[name]
    ]
    if found.get("negative_prompt") != wanted.get("negative_prompt"):
        changed.append("negative prompt")
    if found.get("sigmas") != wanted.get("sigmas"):
        changed.append("set of noise levels")
    if _at_work(found) != _at_work(wanted):
        changed.append("set of adapters")
    if without_folders(found.get("edit")) != wanted.get("edit"):
        changed.append("pictures")
    return [_WORDS.get(name, name) for name in changed]


def _at_work(settings: dict[str, Any]) -> Any:
    """What the adapters of an image do, whatever they are called and wherever they come from."""
    told = settings.get("adapters") or []
    if not isinstance(told, list):
        return told
    return [[one.get(key) for key in _EFFECT] if isinstance(one, dict) else one for one in told]


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


def _phase(phase: "Phase") -> dict[str, Any]:
    """What is known of a phase; what was read only if something was."""
    values = asdict(phase)
    return values if phase.read else {key: values[key] for key in ("name", "seconds", "peak_memory")}


def print_profile(output: "Flux2Output", seconds: float) -> None:
    """A line on stderr for each phase."""
    for phase in output.timings:
        line = _line(phase.name, phase.seconds, phase.peak_memory)
        if phase.read:
            read, each = phase.read / 2**30, phase.streamed / 2**30
            line += f", {read:.3f} GiB read, {each:.3f} a pass, {phase.overlap:.0%} of the time beside the computation"
        click.echo(line, err=True)
    click.echo(_line("whole run", seconds, output.peak_memory), err=True)


def _line(name: str, seconds: float, peak: int) -> str:
    return f"{name:14}{seconds:9.2f} s{peak / 2**30:9.3f} GiB peak"
