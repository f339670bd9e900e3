"""Options that several commands share."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..config import DTYPES, QUANTIZATIONS
from .wakefulness import caffeinate_option

Command = Callable[..., Any]
DEFAULT_MODEL = "klein-4b"
PRESETS = ("turbo",)
PREVIEWS = ("linear", "taef2", "full")


def _silence(ctx: click.Context, param: click.Parameter, quiet: bool) -> bool:
    """Drop the library's warnings until the command ends."""
    logger = logging.getLogger(__package__.partition(".")[0])
    if quiet:
        ctx.call_on_close(partial(logger.setLevel, logger.level))
        logger.setLevel(logging.ERROR)
    return quiet


quant_option = click.option(
    "-q",
    "--quant",
    type=click.Choice(QUANTIZATIONS),
    help="Quantization of the transformer.  [default: bf16, or as few bits as the source has]",
)
text_quant_option = click.option(
    "--text-quant",
    type=click.Choice(QUANTIZATIONS),
    help="Quantization of the text encoder.  [default: as -q, but qint8 with bf16; or as few bits as the source has]",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="What is computed in.  [default: float16 on M1 and M2, bfloat16 on later chips, float32 without a GPU]",
)
models_dir_option = click.option(
    "--models-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where converted models are kept.  [default: $FLUX2_MLX_HOME or ~/.cache/flux2-mlx]",
)
memory_option = click.option(
    "--memory-limit",
    metavar="SIZE",
    help="Such as 12GB: stay within it, if need be by reading weights at every step.  [default: what the "
    "system can spare; info shows it]",
)
no_cache_option = click.option("--no-cache", is_flag=True, help="Neither use nor keep encoded prompts on disk.")
variant_option = click.option("--variant", metavar="NAME", help="Which model a folder or repo holds, if it can't tell.")
quiet_option = click.option(
    "--quiet", is_flag=True, callback=_silence, help="No progress, notices or warnings on stderr."
)
keep_source_option = click.option(
    "--keep-source/--no-keep-source",
    default=True,
    help="Whether the download stays in the Hub's cache when a model is converted.  [default: it stays]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")

image_option = click.option(
    "-i",
    "--images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="IMAGE",
    help="Image to look at; may be given several times.",
)


def weight_options(command: Command) -> Command:
    """`--quant` and `--text-quant`."""
    return quant_option(text_quant_option(command))


_WRITING = (
    text_quant_option,
    click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Makes the text repeatable."),
    click.option(
        "--temperature",
        type=click.FloatRange(0, 2),
        default=0.15,
        show_default=True,
        help="0 takes the likeliest word each time.",
    ),
    memory_option,
    models_dir_option,
    keep_source_option,
    json_option,
    quiet_option,
    caffeinate_option,
)
_PAINTING = (
    click.option("-m", "--model", help=f"Variant's name, repo id or folder.  [default: {DEFAULT_MODEL}]"),
    click.option(
        "-o",
        "--output",
        metavar="NAME",
        help="Image file (.png, .jpg, .webp), or folder, which ends in /; both are made. {seed}, {prompt}, {model}, "
        "{index}, {width}, {height} and {steps} stand for those of each image; names that would be the same get the "
        "seed added.  [default: MODEL-SEED.png, or MODEL-SEED-PROMPT.png with --prompts-file]",
    ),
    click.option("-s", "--steps", type=int, help="Denoising steps.  [default: the model's]"),
    click.option(
        "-g", "--guidance", type=float, help="Guidance scale; distilled models ignore it.  [default: the model's]"
    ),
    click.option(
        "--negative-prompt", metavar="TEXT", help="What is not to be seen; of base models, with a guidance above 1."
    ),
    click.option(
        "--seed",
        type=int,
        multiple=True,
        help="Seed of the first image; the next ones count up. Given several times: of an image of each prompt.  "
        "[default: random]",
    ),
    click.option("--same-seed", is_flag=True, help="Let every prompt begin with the same seed."),
    click.option("-n", "--num-images", type=int, help="Images for each prompt.  [default: 1, or one for each --seed]"),
    weight_options,
    dtype_option,
    variant_option,
    click.option(
        "--lora",
        multiple=True,
        metavar="SOURCE[:SCALE]",
        help="Adapter: a file, folder, Hugging Face repo id or REPO:FILE, with the scale of what it changes; may be "
        "given several times.",
    ),
    click.option("--lora-steps", metavar="A-B", help="Steps that adapters work in, from the first to the last."),
    click.option(
        "--preset",
        type=click.Choice(PRESETS),
        help="The steps, noise levels and guidance that an adapter of few steps is made for; what is given besides "
        "replaces them.",
    ),
    click.option(
        "--sigmas",
        metavar="LIST",
        help="Noise levels before the shift, one a step, falling from at most 1, with commas between.",
    ),
    click.option(
        "--step-cache",
        type=float,
        metavar="THRESHOLD",
        help="Skip most of a step where what the first block of the transformer adds has changed by no more than this "
        "share, such as 0.08; of base models and dev.  [default: 0, which skips nothing]",
    ),
    click.option("--upsample-prompt", is_flag=True, help="Let the model's language model rewrite the prompt first."),
    click.option(
        "--interpret",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="IMAGE",
        help="Describe an image and add that to the prompt; may be given several times.",
    ),
    click.option(
        "--vision-model", default="dev", show_default=True, help="Who describes, if the model can't see images."
    ),
    click.option("--checkpoint", type=click.IntRange(min=1), metavar="N", help="Also save an image every N steps."),
    click.option("--preview", is_flag=True, help="Show in the terminal what is forming, after every step."),
    click.option(
        "--preview-decoder",
        type=click.Choice(PREVIEWS),
        help="What makes the images of --preview and --checkpoint: a linear map, which costs nothing, TAEF2, which is "
        "fetched (5 MB), or the decoder of the finished ones.  [default: linear for --preview, full for --checkpoint]",
    ),
    click.option(
        "--decoder",
        metavar="small|taef2|full|FILE",
        help="What makes the finished images in place of the model's own decoder: the small one of FLUX.2 or TAEF2, "
        "which are fetched, or such a file; faster and in less memory, and a little less exact. `full` is the model's "
        "own.",
    ),
    models_dir_option,
    keep_source_option,
    memory_option,
    no_cache_option,
    click.option("--profile", is_flag=True, help="Print time and peak memory of each phase."),
    json_option,
    quiet_option,
    caffeinate_option,
    click.option("--force", is_flag=True, help="Replace existing images."),
    click.option("--skip-existing", is_flag=True, help="Make only those images whose files are not there yet."),
    click.option("--metadata/--no-metadata", default=True, help="Keep the settings in the images.  [default: keep]"),
)
_PROMPT = (
    click.option(
        "--prompts-file",
        metavar="FILE",
        help="File with a prompt a line, as text or as JSON with settings of its own, or .csv with a column prompt; "
        "- is standard input.",
    ),
    click.option(
        "--replay", type=click.Path(path_type=Path), metavar="IMAGE", help="Make an image again from its file."
    ),
)


def _apply(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def painting_options(command: Command) -> Command:
    """The options of every command that makes images, in the order of the help."""
    return _apply(_PAINTING, command)


def writing_options(command: Command) -> Command:
    """The options of every command that only writes text, in the order of the help."""
    return _apply(_WRITING, command)


def size_options(text: str) -> Callable[[Command], Command]:
    """`--width` and `--height`; `text` ends their help."""
    names = (("-W", "--width"), ("-H", "--height"))
    return partial(_apply, [click.option(*name, type=int, help=f"Pixels, a multiple of 16{text}") for name in names])


def prompt_options(command: Command) -> Command:
    """`--prompts-file` and `--replay`."""
    return _apply(_PROMPT, command)
