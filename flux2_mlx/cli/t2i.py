"""`flux2-mlx t2i`."""

import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..config import VARIANTS
from ..errors import InputError
from .options import json_option, models_dir_option, quiet_option, variant_option, weight_options
from .progress import Bars, conversion, notice

if TYPE_CHECKING:
    from ..pipeline import Flux2Output, Flux2Pipeline, Progress
    from ..sampling import Request

DEFAULT_MODEL = "klein-4b"
# What an image file remembers, and the option that each goes back to with --replay.
_REPLAYED = ("model", "variant", "quant", "text_quant", "width", "height", "steps", "guidance", "seed")


@dataclass
class _Options:
    """The command line after defaults and --replay; None is the variant's default."""

    prompts: list[str]
    model: str
    variant: str | None
    quant: str | None
    text_quant: str | None
    width: int | None
    height: int | None
    steps: int | None
    guidance: float | None
    seed: int
    num_images: int
    output: Path | None
    checkpoint: int | None
    models_dir: Path | None
    quiet: bool
    force: bool

    def settings(self) -> dict[str, Any]:
        return {
            "height": self.height,
            "width": self.width,
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "images_per_prompt": self.num_images,
        }

    def paths(self) -> list[Path]:
        """The file of each image: the name given, with the seed where there are several."""
        count = len(self.prompts) * self.num_images
        seeds = range(self.seed, self.seed + count)
        if self.output is None or self.output.is_dir():
            folder = self.output or Path()
            return [folder / f"{Path(self.model).name}-{seed}.png" for seed in seeds]
        if count == 1:
            return [self.output]
        return [self.output.with_name(f"{self.output.stem}-{seed}{self.output.suffix}") for seed in seeds]

    def checkpoint_path(self, path: Path, step: int) -> Path:
        return path.with_name(f"{path.stem}-step-{step:03}{path.suffix}")


@click.command()
@click.argument("prompt", required=False)
@click.option("-m", "--model", help=f"Variant's name, repo id or folder.  [default: {DEFAULT_MODEL}]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Image file (.png, .jpg, .webp) or folder. With several images the seed is added.  [default: MODEL-SEED.png]",
)
@click.option("-W", "--width", type=int, help="Pixels, a multiple of 16.  [default: 1024]")
@click.option("-H", "--height", type=int, help="Pixels, a multiple of 16.  [default: 1024]")
@click.option("-s", "--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option(
    "-g", "--guidance", type=float, help="Guidance scale; distilled models ignore it.  [default: the model's]"
)
@click.option("--seed", type=int, help="Seed of the first image; the next ones count up.  [default: random]")
@click.option("-n", "--num-images", type=int, default=1, help="Images for each prompt.")
@click.option(
    "--prompts-file", type=click.File(encoding="utf-8"), help="File with one prompt a line, or - for standard input."
)
@weight_options
@variant_option
@click.option("--replay", type=click.Path(path_type=Path), metavar="IMAGE", help="Make an image again from its file.")
@click.option("--checkpoint", type=click.IntRange(min=1), metavar="N", help="Also save an image every N steps.")
@models_dir_option
@click.option("--profile", is_flag=True, help="Print time and peak memory of each phase.")
@json_option
@quiet_option
@click.option("--force", is_flag=True, help="Replace existing images.")
def t2i(prompt: str | None, profile: bool, as_json: bool, **given: Any) -> None:
    """Make an image from PROMPT.

    \b
    Examples:
      flux2-mlx t2i "a red fox in snow" -o fox.png
      flux2-mlx t2i "a red fox in snow" -m klein-9b -q qint8 -W 1536 -H 1024 -n 4
      flux2-mlx t2i --replay fox.png -o again.png
    """
    options = _options(prompt, **given)
    paths = options.paths()
    _check_files(options, paths)
    start = time.perf_counter()
    with Bars(options.quiet) as bars:
        pipe = _open(options, bars)
        request = pipe.request(options.prompts, **options.settings())
        output = _run(pipe, request, options, paths, bars)
    seconds = time.perf_counter() - start
    if profile:
        _print_profile(output, seconds)
    if as_json:
        click.echo(json.dumps(_report(pipe, request, options, output, paths, seconds), ensure_ascii=False))
    else:
        for path in paths:
            click.echo(path)


def _options(prompt: str | None, *, replay: Path | None, prompts_file: Any, **given: Any) -> _Options:
    remembered: dict[str, Any] = {}
    if replay is not None:
        from ..images import read_settings

        remembered = read_settings(replay)
        given |= {key: remembered.get(key) for key in _REPLAYED if given[key] is None}
    if prompts_file is not None and prompt is not None:
        raise click.UsageError("give either PROMPT or --prompts-file")
    if prompts_file is not None:
        prompts = [line.strip() for line in prompts_file if line.strip()]
    else:
        prompts = [p for p in (prompt, remembered.get("prompt")) if p is not None][:1]
    if not prompts and prompt is None and prompts_file is None:
        raise click.UsageError("give a PROMPT, --prompts-file or --replay")
    if not prompts or not all(p.strip() for p in prompts):
        raise InputError("the prompt is empty; describe the image in words")
    seed = secrets.randbelow(2**32) if given["seed"] is None else given["seed"]
    return _Options(prompts=prompts, **{**given, "model": given["model"] or DEFAULT_MODEL, "seed": seed})


def _check_files(options: _Options, paths: list[Path]) -> None:
    """Everything that can be known to be wrong before a model is fetched or loaded."""
    from ..images import check_output
    from ..sampling import Request

    if options.model in VARIANTS:
        row = VARIANTS[options.model]
        Request.checked(row, row.vae.token_size, options.prompts, **options.settings())
    for path in paths:
        check_output(path, options.force)
    if len(set(paths)) < len(paths) or not paths:
        raise InputError("the number of images must be 1 or more")


def _open(options: _Options, bars: Bars) -> "Flux2Pipeline":
    from ..convert import find_checkpoint
    from ..pipeline import Flux2Pipeline

    folder = find_checkpoint(
        options.model,
        variant=options.variant,
        quant=options.quant,
        text_quant=options.text_quant,
        models_dir=options.models_dir,
        quiet=options.quiet,
        progress=conversion(bars),
    )
    pipe = Flux2Pipeline.from_pretrained(folder, quant=options.quant, text_quant=options.text_quant)
    variant = pipe.variant
    if not variant.commercial_use:
        notice(f"{variant.name} and its images: {variant.licence} licence", options.quiet)
    if variant.distilled and options.guidance not in (None, variant.guidance):
        notice(f"{variant.name} is distilled and ignores --guidance", options.quiet)
    return pipe


def _run(pipe: "Flux2Pipeline", request: "Request", options: _Options, paths: list[Path], bars: Bars) -> "Flux2Output":
    from ..images import save

    def on_progress(progress: "Progress") -> None:
        bars.show(progress.phase, progress.done, progress.total)
        step = progress.step
        if step is None or not options.checkpoint or step.number % options.checkpoint or step.number == request.steps:
            return
        for i, image in zip(progress.images, pipe.preview(request, step.estimate), strict=True):
            save(image, options.checkpoint_path(paths[i], step.number))

    output = pipe.run(request, on_progress=on_progress)
    for i, (image, path) in enumerate(zip(output.images, paths, strict=True)):
        save(image, path, _settings(pipe, request, options, i))
    return output


def _settings(pipe: "Flux2Pipeline", request: "Request", options: _Options, index: int) -> dict[str, Any]:
    """What an image file remembers: all that is needed to make it again."""
    return {
        "prompt": request.prompts[index // request.images_per_prompt],
        **_shared_settings(pipe, request, options),
        "seed": request.seeds[index],
        "variant": pipe.variant.name,
        "dtype": str(pipe.dtype).rpartition(".")[2],
        "fingerprint": pipe.checkpoint.source.get("fingerprint"),
        "version": __version__,
    }


def _shared_settings(pipe: "Flux2Pipeline", request: "Request", options: _Options) -> dict[str, Any]:
    return {
        "model": options.model,
        "quant": pipe.quant,
        "text_quant": pipe.text_quant,
        "width": request.width,
        "height": request.height,
        "steps": request.steps,
        "guidance": request.guidance,
    }


def _report(
    pipe: "Flux2Pipeline",
    request: "Request",
    options: _Options,
    output: "Flux2Output",
    paths: list[Path],
    seconds: float,
) -> dict[str, Any]:
    prompts = request.prompts
    return {
        "images": [{"path": str(path), "seed": seed} for path, seed in zip(paths, output.seeds, strict=True)],
        "prompt": prompts[0] if len(prompts) == 1 else list(prompts),
        **_shared_settings(pipe, request, options),
        "phases": [asdict(phase) for phase in output.timings],
        "seconds": seconds,
        "peak_memory": output.peak_memory,
    }


def _print_profile(output: "Flux2Output", seconds: float) -> None:
    for phase in output.timings:
        click.echo(f"{phase.name:14}{phase.seconds:9.2f} s{phase.peak_memory / 2**30:9.3f} GiB peak", err=True)
    click.echo(f"{'whole run':14}{seconds:9.2f} s{output.peak_memory / 2**30:9.3f} GiB peak", err=True)
