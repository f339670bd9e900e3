"""What a run leaves behind: settings inside image files, the JSON report, the profile."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__

if TYPE_CHECKING:
    from ..phases import Flux2Output, Phase
    from ..pipeline import Flux2Pipeline
    from ..references import Edit
    from ..sampling import Request


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
        from ..layers import dtype_name

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

    def report(self, output: "Flux2Output", paths: list[Path], seconds: float) -> dict[str, Any]:
        """The object that --json prints."""
        rewritten = list(self.request.prompts) if self._rewritten else None
        return {
            "images": [{"path": str(path), "seed": seed} for path, seed in zip(paths, output.seeds, strict=True)],
            "prompt": self.asked[0] if len(self.asked) == 1 else self.asked,
            "upsampled_prompt": rewritten[0] if rewritten and len(rewritten) == 1 else rewritten,
            **self._shared(),
            **self._edited(),
            "phases": [_phase(phase) for phase in output.timings],
            "seconds": seconds,
            "peak_memory": output.peak_memory,
        }


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
