"""`flux2-mlx t2i`."""

import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import VARIANTS
from ..errors import InputError
from .options import json_option, models_dir_option, no_cache_option, quiet_option, variant_option, weight_options
from .progress import Bars, Stream, conversion, notice
from .report import Run, print_profile

if TYPE_CHECKING:
    from ..pipeline import Flux2Output, Flux2Pipeline, Phase, Progress
    from ..sampling import Request

DEFAULT_MODEL = "klein-4b"
MAX_IMAGES = 1000
# What an image file remembers that goes back to the option of the same name with --replay.
_REPLAYED = {
    "model": str,
    "variant": str,
    "quant": str,
    "text_quant": str,
    "width": int,
    "height": int,
    "steps": int,
    "guidance": float,
    "seed": int,
}


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
    no_cache: bool
    upsample_prompt: bool
    interpret: tuple[Path, ...]
    vision_model: str
    quiet: bool
    force: bool
    rewritten: list[str] | None = None

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
            return [folder / f"{Path(self.model).absolute().name}-{seed}.png" for seed in seeds]
        if count == 1:
            return [self.output]
        return [self.output.with_name(f"{self.output.stem}-{seed}{self.output.suffix}") for seed in seeds]

    def checkpoint_path(self, path: Path, step: int) -> Path:
        """The file of the image after `step` steps."""
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
@click.option("-W", "--width", type=int, help="Pixels, a multiple of 16.  [default: 1024; demo 128]")
@click.option("-H", "--height", type=int, help="Pixels, a multiple of 16.  [default: 1024; demo 128]")
@click.option("-s", "--steps", type=int, help="Denoising steps.  [default: the model's]")
@click.option(
    "-g", "--guidance", type=float, help="Guidance scale; distilled models ignore it.  [default: the model's]"
)
@click.option("--seed", type=int, help="Seed of the first image; the next ones count up.  [default: random]")
@click.option("-n", "--num-images", type=int, default=1, show_default=True, help="Images for each prompt.")
@click.option("--prompts-file", metavar="FILE", help="File with one prompt a line, or - for standard input.")
@weight_options
@variant_option
@click.option("--upsample-prompt", is_flag=True, help="Let the model's language model rewrite the prompt first.")
@click.option(
    "--interpret",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="IMAGE",
    help="Describe an image and add that to the prompt; may be given several times.",
)
@click.option("--vision-model", default="dev", show_default=True, help="Who describes, if the model can't see images.")
@click.option("--replay", type=click.Path(path_type=Path), metavar="IMAGE", help="Make an image again from its file.")
@click.option("--checkpoint", type=click.IntRange(min=1), metavar="N", help="Also save an image every N steps.")
@models_dir_option
@no_cache_option
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
    _check(options, paths)
    start = time.perf_counter()
    with Bars(options.quiet) as bars:
        pipe = _open(options, bars)
        _check_images(pipe.request(options.prompts, **options.settings()), options, paths)
        prompts, timings = _rewrite(pipe, options, bars)
        run = Run(options.model, pipe, pipe.request(prompts, **options.settings()), options.prompts)
        output = _make(run, options, paths, bars)
        output.timings[:0] = timings
    seconds = time.perf_counter() - start
    if profile:
        print_profile(output, seconds)
    if as_json:
        click.echo(json.dumps(run.report(output, paths, seconds), ensure_ascii=False))
    else:
        for path in paths:
            click.echo(path)


def _options(prompt: str | None, *, replay: Path | None, prompts_file: str | None, **given: Any) -> _Options:
    if prompts_file is not None and prompt is not None:
        raise click.UsageError("give either PROMPT or --prompts-file")
    if prompts_file is None and prompt is None and replay is None:
        raise click.UsageError("give a PROMPT, --prompts-file or --replay")
    remembered = {} if replay is None else _remembered(replay)
    if given["model"] is not None:
        remembered.pop("variant", None)  # what the other model was
    given |= {key: remembered.get(key) for key in _REPLAYED if given[key] is None}
    if prompts_file is not None:
        prompts = _read_prompts(prompts_file)
    else:
        prompts = [remembered["prompt"] if prompt is None else prompt]
    # A replayed prompt was rewritten already; rewriting it again need not give the same words.
    again = remembered.get("upsampled_prompt") if prompts == [remembered.get("prompt")] else None
    given["rewritten"] = [again] if again is not None else None
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("the prompt is empty; describe the image in words")
    if not 1 <= len(prompts) * given["num_images"] <= MAX_IMAGES:
        raise InputError(f"a run makes 1 to {MAX_IMAGES} images, not {len(prompts) * given['num_images']}")
    defaults = {"model": DEFAULT_MODEL, "seed": secrets.randbelow(2**32)}
    return _Options(prompts=prompts, **given | {key: x for key, x in defaults.items() if given[key] is None})


def _remembered(image: Path) -> dict[str, Any]:
    from ..images import read_settings

    settings = read_settings(image)
    for name, kind in {"prompt": str, **_REPLAYED}.items():
        if not isinstance(settings.get(name), kind):
            raise InputError(f"the settings in {image} are damaged: {name} is {settings.get(name)!r}")
    upsampled = settings.get("upsampled_prompt")
    if not isinstance(upsampled, str | None):
        raise InputError(f"the settings in {image} are damaged: upsampled_prompt is {upsampled!r}")
    return settings


def _read_prompts(file: str) -> list[str]:
    try:
        with click.open_file(file, encoding="utf-8-sig") as lines:
            prompts = [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeError) as error:
        raise InputError(f"can't read {file}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from error
    if not prompts:
        raise InputError(f"{file} holds no prompt; write one a line")
    return prompts


def _check(options: _Options, paths: list[Path]) -> None:
    """Everything that can be known to be wrong before a model is fetched."""
    from ..images import check_output
    from ..sampling import Request

    row = VARIANTS.get(options.model, VARIANTS[DEFAULT_MODEL])
    Request.checked(row, row.vae.token_size, options.prompts, **options.settings())
    for path in paths:
        check_output(path, options.force)


def _check_images(request: "Request", options: _Options, paths: list[Path]) -> None:
    """What else can be wrong with the files, now that the model has given size and steps."""
    from ..images import check_output, check_size

    for path in paths:
        check_size(path, request.width, request.height)
        for step in range(options.checkpoint or request.steps, request.steps, options.checkpoint or 1):
            check_output(options.checkpoint_path(path, step), options.force)


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
    pipe = Flux2Pipeline.from_pretrained(
        folder,
        quant=options.quant,
        text_quant=options.text_quant,
        models_dir=options.models_dir,
        prompt_cache=not options.no_cache,
    )
    variant = pipe.variant
    if not variant.commercial_use:
        notice(f"{variant.name} and its images: {variant.licence} licence", options.quiet)
    if variant.distilled and options.guidance not in (None, variant.guidance):
        notice(f"{variant.name} is distilled and ignores --guidance", options.quiet)
    return pipe


def _rewrite(pipe: "Flux2Pipeline", options: _Options, bars: Bars) -> tuple[list[str], list["Phase"]]:
    """The prompts that the images are made from, after --interpret and --upsample-prompt, and what that took."""
    from ..images import open_image
    from ..pipeline import measured
    from ..upsampling import Writer

    if options.rewritten is not None:
        return options.rewritten, []
    prompts, timings = options.prompts, []
    with Stream(options.quiet) as stream:
        if options.interpret:
            pictures = [open_image(path) for path in options.interpret]
            writer = pipe.writer()
            if not writer.can_see:
                writer = Writer.from_pretrained(
                    options.vision_model,
                    models_dir=options.models_dir,
                    quiet=options.quiet,
                    progress=conversion(bars),
                )
            with measured("interpret", timings):
                descriptions = writer.describe(pictures, seed=options.seed, on_text=stream.show)
            prompts = ["\n\n".join([prompt, *descriptions]) for prompt in prompts]
        if options.upsample_prompt:
            with measured("upsample", timings):
                prompts = pipe.upsample_prompt(prompts, seed=options.seed, on_text=stream.show)
    return prompts, timings


def _make(run: Run, options: _Options, paths: list[Path], bars: Bars) -> "Flux2Output":
    from ..images import save

    pipe, request = run.pipe, run.request

    def on_progress(progress: "Progress") -> None:
        bars.show(progress.phase, progress.done, progress.total)
        step = progress.step
        if step is None or not options.checkpoint or step.number % options.checkpoint or step.number == request.steps:
            return
        for i, image in zip(progress.images, pipe.preview(request, step.estimate), strict=True):
            save(image, options.checkpoint_path(paths[i], step.number))

    output = pipe.run(request, on_progress=on_progress)
    for i, (image, path) in enumerate(zip(output.images, paths, strict=True)):
        save(image, path, run.settings(i))
    return output
