"""What a command line that makes images asks for, after defaults and --replay."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import check_quant
from . import replay, schedule
from .frames import OPTIONS, Frame, frames_of
from .loras import Adapters
from .loras import read as read_loras
from .loras import remembered as remembered_loras
from .options import DEFAULT_MODEL
from .pictures import Pictures
from .prompts import Prompt, read_prompt, read_prompts
from .replay import remembered as read_image
from .saving import Saving

if TYPE_CHECKING:
    from ..store import Model

_NOISE = ("sigmas", "preset", "steps", "guidance")  # what a preset is about


@dataclass(frozen=True)
class Job:
    """Settings of a command; None is the variant's default. Build it with `Job.of`.

    `frames` are the images, those of one of the `prompts` after the other; `seed` is the first that is given or drawn.
    `listed` is whether the prompts are those of a file. `resolved` is what `model` means, and `label` what images say
    of it. `rewritten` are the prompts, `fingerprint` the weights and `decoder_sha256` the decoder that a `replayed`
    image, which comes with its settings, was made from. `preset` says what an adapter's preset has set.
    """

    prompts: list[str]
    listed: bool
    frames: list[Frame]
    seed: int
    model: str
    resolved: "Model"
    label: str
    variant: str | None
    quant: str | None
    text_quant: str | None
    dtype: str | None
    guidance: float | None
    saving: Saving
    metadata: bool
    checkpoint: int | None
    preview: bool
    preview_decoder: str | None
    decoder: str | None
    models_dir: Path | None
    keep_source: bool
    no_cache: bool
    memory_limit: str | None
    upsample_prompt: bool
    interpret: tuple[Path, ...]
    vision_model: str
    quiet: bool
    pictures: Pictures
    adapters: Adapters
    is_guided: bool = False  # by --guidance
    preset: str | None = None
    rewritten: list[str] | None = None
    fingerprint: str | None = None
    decoder_sha256: str | None = None
    replayed: tuple[Path, dict[str, Any]] | None = None

    @classmethod
    def of(cls, prompt: str | None, *, replay: Path | None, prompts_file: str | None, **given: Any) -> "Job":
        """The job of a command line; `given` are its options by name, and its `pictures`."""
        _check_usage(prompt, replay, prompts_file, given)
        is_named = given["model"] is not None
        remembered = {} if replay is None else read_image(replay)
        _complete(given, replay, remembered)
        _check_weights(given)
        given |= _resolved(given, None if is_named else replay)
        given["seed"] = given["seed"] or (_random_seed(),)
        prompts = _prompts(prompt, prompts_file, remembered)
        texts = [one.text for one in prompts]
        of_images = {name: given.pop(name) for name in OPTIONS}
        return cls(
            prompts=texts,
            listed=prompts_file is not None,
            frames=frames_of(prompts, of_images),
            seed=of_images["seed"][0],
            guidance=of_images["guidance"],
            rewritten=_rewritten(texts, given, remembered),
            **given,
        )


def _random_seed() -> int:
    import secrets  # with all that it needs, which --help does not

    return secrets.randbelow(2**32)


def _check_usage(prompt: str | None, replay: Path | None, prompts_file: str | None, given: Mapping[str, Any]) -> None:
    if prompts_file is not None and prompt is not None:
        raise click.UsageError("give either PROMPT or --prompts-file")
    if prompts_file is None and prompt is None and replay is None:
        raise click.UsageError("give a PROMPT, --prompts-file or --replay")
    if given["preview_decoder"] is not None and not given["preview"] and given["checkpoint"] is None:
        raise click.UsageError("--preview-decoder is about --preview and --checkpoint; give one of them besides")
    if given["force"] and given["skip_existing"]:
        raise click.UsageError("--skip-existing leaves what --force would replace; give one of them")


def _complete(given: dict[str, Any], replay: Path | None, remembered: dict[str, Any]) -> None:
    """Read the options that are texts, and complete what is `given` with a preset, an image and defaults."""
    texts, steps = given.pop("lora"), given.pop("lora_steps")
    of_image = steps if replay is not None and not texts else None  # the steps of adapters that it remembers
    loras = read_loras(texts, steps if of_image is None else None)
    if replay is not None:
        loras = remembered_loras(remembered.get("adapters"), replay, given["models_dir"], loras, of_image)
    given["adapters"] = Adapters(loras)
    click.get_current_context().call_on_close(given["adapters"].close)
    given["is_guided"] = given["guidance"] is not None
    noise = {name: given[name] for name in _NOISE}
    schedule.complete(noise, given["adapters"])
    given |= noise | {"shift_steps": None}
    if replay is not None:
        _take_over(given, replay, remembered)
    given["model"] = DEFAULT_MODEL if given["model"] is None else given["model"]
    given["strength"] = given["pictures"].strength
    given["saving"] = Saving(given.pop("force"), given.pop("skip_existing"))


def _take_over(given: dict[str, Any], image: Path, remembered: dict[str, Any]) -> None:
    """Complete what is `given` with what `image` remembers."""
    own = dict(remembered)
    if given["model"] is not None:
        own |= {"variant": None, "fingerprint": None}  # those of the other model
    if remembered.get("edit") is not None:
        given["pictures"] = given["pictures"].completed(remembered["edit"], image)
    if given["pictures"].keep_size:
        own |= {"width": None, "height": None}
    if given["sigmas"] or given["steps"] not in (None, own["steps"]):
        own |= {"steps": None, "sigmas": None, "shift_steps": None}
    own["seed"] = (own["seed"],)
    if given["decoder"] is None:
        found = replay.find_decoder(own.get("decoder"), image, given["models_dir"])
        own["decoder"], given["decoder_sha256"] = found
    given |= {key: own.get(key) for key in replay.SETTINGS if given[key] in (None, ())}
    given["sigmas"] = given["sigmas"] and tuple(given["sigmas"])
    given["fingerprint"] = own.get("fingerprint")
    given["replayed"] = image, remembered


def _prompts(prompt: str | None, prompts_file: str | None, remembered: Mapping[str, Any]) -> list[Prompt]:
    """Those of a file, or the one that is given or remembered."""
    if prompts_file is not None:
        return read_prompts(prompts_file)
    return [Prompt(remembered["prompt"] if prompt is None else read_prompt("-") if prompt == "-" else prompt)]


def _rewritten(prompts: list[str], given: Mapping[str, Any], remembered: Mapping[str, Any]) -> list[str] | None:
    """What the prompts of a replayed image were rewritten to; doing so again need not give the same words."""
    again = remembered.get("upsampled_prompt") if prompts == [remembered.get("prompt")] else None
    asked = given["interpret"] or given["upsample_prompt"]
    return [again] if again is not None and not asked else None


def _check_weights(given: dict[str, Any]) -> None:
    """Raise InputError if the weights can't be used."""
    from ..store import checked_variant

    for name, check in (("variant", checked_variant), ("quant", check_quant), ("text_quant", check_quant)):
        if given[name] is not None:
            check(given[name])


def _resolved(given: dict[str, Any], source: Path | None) -> dict[str, Any]:
    """What the model's name means, and what images say of it; `source` is the image that names it, if one does."""
    from ..store import resolve

    if source is None:
        model = resolve(given["model"], given["models_dir"])
        return {"resolved": model, "label": replay.label(model)}
    weights = {name: given[name] for name in ("variant", "quant", "text_quant", "models_dir")}
    found = replay.find_model(given["model"], given["fingerprint"], source, **weights)
    return {"resolved": found, "label": replay.without_folder(given["model"])}
