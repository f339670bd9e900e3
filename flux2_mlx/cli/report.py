"""What a run leaves behind: settings inside image files, the JSON report, the profile."""

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__

if TYPE_CHECKING:
    from PIL import Image

    from ..output import Flux2Output, Phase
    from ..pipeline import Flux2Pipeline
    from ..references import Edit
    from ..sampling import Request


_log = logging.getLogger(__name__)


def _new_output() -> "Flux2Output":
    from ..output import Flux2Output

    return Flux2Output()


@dataclass(frozen=True)
class Run:
    """A run's model and settings. `asked` are the prompts as given; the request has what was made of them. `remembered`
    is what image files keep of the `edit`."""

    model: str
    pipe: "Flux2Pipeline"
    request: "Request"
    asked: list[str]
    edit: "Edit"
    remembered: dict[str, Any] | None

    @property
    def _size(self) -> tuple[int, int]:
        return self.edit.output_size(self.request.width, self.request.height)

    @property
    def _rewritten(self) -> bool:
        return tuple(self.asked) != self.request.prompts

    def _shared(self) -> dict[str, Any]:
        from ..device import dtype_name

        return {
            "model": self.model,
            "quant": self.pipe.quant,
            "text_quant": self.pipe.text_quant,
            "dtype": dtype_name(self.pipe.dtype),
            "width": self._size[0],
            "height": self._size[1],
            "steps": self.request.steps,
            "guidance": self.request.guidance,
        }

    def _edited(self) -> dict[str, Any]:
        return {} if self.remembered is None else {"edit": self.remembered}

    def settings(self, index: int) -> dict[str, Any]:
        """What image `index` remembers: all that is needed to make it again."""
        number = index // self.request.images_per_prompt
        return {
            "prompt": self.asked[number],
            "upsampled_prompt": self.request.prompts[number] if self._rewritten else None,
            **self._shared(),
            "seed": self.request.seeds[index],
            **self._edited(),
            "variant": self.pipe.variant.name,
            "fingerprint": self.pipe.checkpoint.source.get("fingerprint"),
            "version": __version__,
        }

    def report(self) -> dict[str, Any]:
        """What --json prints of the settings."""
        rewritten = list(self.request.prompts) if self._rewritten else None
        return {
            "prompt": self.asked[0] if len(self.asked) == 1 else self.asked,
            "upsampled_prompt": rewritten[0] if rewritten and len(rewritten) == 1 else rewritten,
            **self._shared(),
            **self._edited(),
        }


@dataclass
class Result:
    """What has become of a run so far: the places of the images that are `made`, and of those that were there already
    and are `skipped`, which have their files at `paths`."""

    run: Run
    paths: list[Path]
    output: "Flux2Output" = field(default_factory=_new_output)
    made: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)

    def save(self, place: int, image: "Image.Image", *, replace: bool) -> Path:
        """Write an image, with its settings, to its path, or beside it if something has appeared there meanwhile."""
        from ..images import save

        self.paths[place] = save(image, self.paths[place], self.run.settings(place), replace=replace)
        self.made.append(place)
        return self.paths[place]

    def skip(self, places: Iterable[int]) -> None:
        """Leave images that are there already, with a warning for each that was made from something else."""
        for place in places:
            self.skipped.append(place)
            if not self._is_alike(place):
                _log.warning(
                    "%s is left as it is, but it does not say that it was made from this prompt and seed",
                    self.paths[place],
                )

    def _is_alike(self, place: int) -> bool:
        from ..errors import InputError
        from ..images import read_settings

        wanted = self.run.settings(place)
        try:
            found = read_settings(self.paths[place])
        except InputError:
            return False
        return all(found.get(name) == wanted[name] for name in ("prompt", "seed"))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def report(self, *, complete: bool) -> dict[str, Any]:
        """The object that --json prints; `complete` is whether nothing is missing."""
        return {
            "images": self._files(self.made),
            **({"skipped": self._files(self.skipped)} if self.skipped else {}),
            **({} if complete else {"interrupted": True}),
            **self.run.report(),
            "phases": [_phase(phase) for phase in self.output.timings],
            "seconds": self.seconds,
            "peak_memory": self.output.peak_memory,
        }

    def _files(self, places: list[int]) -> list[dict[str, Any]]:
        return [{"path": str(self.paths[place]), "seed": self.run.request.seeds[place]} for place in sorted(places)]


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
