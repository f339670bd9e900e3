"""What a command line that makes images asks for, after defaults and --replay."""

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from ..files import opened
from .options import DEFAULT_MODEL
from .prompts import read_prompts

if TYPE_CHECKING:
    from PIL import Image

    from ..names import Model

# What an image file remembers that goes back to the option of the same name with --replay.
_REPLAYED = {
    "model": str,
    "variant": str,
    "quant": str,
    "text_quant": str,
    "dtype": str | None,  # older images don't say it
    "width": int,
    "height": int,
    "steps": int,
    "guidance": float,
    "seed": int,
}
_EDIT = {
    "images": list,
    "strength": float | None,
    "mask": dict | None,
    "mask_crop": int | None,
    "extend": dict | None,
}
_EXTEND = dict.fromkeys(("left", "right", "top", "bottom", "overlap"), int)
_FILE = {"path": str, "sha256": str}


@dataclass(frozen=True)
class Pictures:
    """The images of an edit and what is done with them. `extend` are pixels added on each side (see `extended`)."""

    paths: tuple[Path, ...] = ()
    strength: float | None = None
    mask: Path | None = None
    mask_crop: int | None = None
    extend: dict[str, int] | None = None

    def open(self) -> "tuple[list[Image.Image], dict[str, Any], dict[Path, str]]":
        """The images, what `Edit.checked` is to do with them, and the SHA-256 of every file as it was read."""
        from ..images import open_hashed
        from ..references import extended

        hashes = {}

        def read(path: Path, ground: str = "white") -> "Image.Image":
            image, hashes[path] = open_hashed(path, ground)
            return image

        images = [read(path) for path in self.paths]
        mask = None if self.mask is None else read(self.mask, "black")
        if self.extend is not None:
            images[0], mask = extended(images[0], **self.extend)
        edit = {
            "mask": mask,
            "on_canvas": self.strength is not None,
            "crop_padding": self.mask_crop,
            "feather": 0 if self.extend is None else self.extend["overlap"] // 2,
        }
        return images, edit, hashes

    def settings(self, hashes: dict[Path, str]) -> dict[str, Any] | None:
        """What an image file remembers of the edit: the files by name and by content, which `open` gives."""
        if not self.paths:
            return None
        files = {path: {"path": str(path.absolute()), "sha256": sha256} for path, sha256 in hashes.items()}
        return {
            "images": [files[path] for path in self.paths],
            "strength": self.strength,
            "mask": None if self.mask is None else files[self.mask],
            "mask_crop": self.mask_crop,
            "extend": self.extend,
        }

    @property
    def keep_size(self) -> bool:
        """Whether the size is that of the first image."""
        return self.strength is not None or self.mask is not None or self.extend is not None

    def completed(self, edit: dict[str, Any], image: Path) -> "Pictures":
        """These pictures, and for all that is not given what `image` remembers of its `edit`.

        Raises:
            InputError: `edit` is damaged, or a file that is not given is gone or has changed.
        """
        from ..references import MAX_REFERENCES

        _check_kinds(edit, _EDIT, image)
        if not edit["images"]:
            raise InputError(f"the settings in {image} are damaged: images is []")
        if len(edit["images"]) > MAX_REFERENCES:
            raise InputError(f"the settings in {image} are damaged: it was made from {len(edit['images'])} images")
        mask, extend = edit.get("mask"), edit.get("extend")
        if extend is not None:
            _check_kinds(extend, _EXTEND, image)
            extend = {name: extend[name] for name in _EXTEND}
            if self.mask is not None:
                raise InputError(f"{image} was extended, which marks what is new; leave out the mask {self.mask}")
        if self.mask is None and mask is not None:
            mask = _unchanged(mask, image, "the mask with --mask")
        return Pictures(
            self.paths or tuple(_unchanged(file, image, "the images with -i") for file in edit["images"]),
            edit.get("strength") if self.strength is None else self.strength,
            mask if self.mask is None else self.mask,
            edit.get("mask_crop") if self.mask_crop is None else self.mask_crop,
            extend,
        )


def _unchanged(file: Any, image: Path, way_out: str) -> Path:
    _check_kinds(file, _FILE, image)
    path = Path(file["path"])
    if _sha256(path) != file["sha256"]:
        raise InputError(f"{path}, which the image was made from, is gone or has changed; give {way_out}")
    return path


def _sha256(path: Path) -> str | None:
    """The SHA-256 of an image file; None if there is none, or something that can't be one."""
    from ..images import MAX_INPUT_BYTES

    found = hashlib.sha256()
    try:
        with opened(path, MAX_INPUT_BYTES) as file:
            while chunk := file.read(2**20):
                found.update(chunk)
    except (OSError, ValueError, InputError):  # ValueError: a name that no file can have
        return None
    return found.hexdigest()


@dataclass(frozen=True)
class Job:
    """Settings of a run; None is the variant's default. Build it with `Job.of`.

    `resolved` is what `model` means.
    `rewritten` are the prompts and `fingerprint` the weights that a replayed image was made from.
    """

    prompts: list[str]
    model: str
    resolved: "Model"
    variant: str | None
    quant: str | None
    text_quant: str | None
    dtype: str | None
    width: int | None
    height: int | None
    steps: int | None
    guidance: float | None
    seed: int
    num_images: int
    output: Path | None
    checkpoint: int | None
    models_dir: Path | None
    keep_source: bool
    no_cache: bool
    memory_limit: str | None
    upsample_prompt: bool
    interpret: tuple[Path, ...]
    vision_model: str
    quiet: bool
    force: bool
    skip_existing: bool
    pictures: Pictures
    rewritten: list[str] | None = None
    fingerprint: str | None = None

    def settings(self) -> dict[str, Any]:
        return {
            "height": self.height,
            "width": self.width,
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "images_per_prompt": self.num_images,
            "strength": self.pictures.strength,
        }

    def paths(self) -> list[Path]:
        """The file of each image: the name given, with the seed where there are several; a name that is not given is
        one that is free."""
        from ..files import free_path

        count = len(self.prompts) * self.num_images
        seeds = range(self.seed, self.seed + count)
        if self.output is None or self.output.is_dir():
            folder = self.output or Path()
            paths = [folder / f"{Path(self.model).absolute().name}-{seed}.png" for seed in seeds]
            return paths if self.force or self.skip_existing else [free_path(path) for path in paths]
        if count == 1:
            return [self.output]
        return [self.output.with_name(f"{self.output.stem}-{seed}{self.output.suffix}") for seed in seeds]

    def checkpoint_path(self, path: Path, step: int) -> Path:
        """The file of the image after `step` steps."""
        return path.with_name(f"{path.stem}-step-{step:03}{path.suffix}")

    @classmethod
    def of(cls, prompt: str | None, *, replay: Path | None, prompts_file: str | None, **given: Any) -> "Job":
        """The job of a command line; `given` are its options by name, and its `pictures`."""
        from ..sampling import MAX_IMAGES
        from ..store import resolve
        from ..text.prompts import check_words

        if prompts_file is not None and prompt is not None:
            raise click.UsageError("give either PROMPT or --prompts-file")
        if prompts_file is None and prompt is None and replay is None:
            raise click.UsageError("give a PROMPT, --prompts-file or --replay")
        remembered = {} if replay is None else _remembered(replay)
        replayed = given["model"] is None and "model" in remembered
        if given["model"] is not None:
            remembered |= {"variant": None, "fingerprint": None}  # those of the other model
        if remembered.get("edit") is not None:
            given["pictures"] = given["pictures"].completed(remembered["edit"], replay)
        if given["pictures"].keep_size:
            remembered |= {"width": None, "height": None}
        given |= {key: remembered.get(key) for key in _REPLAYED if given[key] is None}
        if prompts_file is not None:
            prompts = read_prompts(prompts_file)
        else:
            prompts = [remembered["prompt"] if prompt is None else prompt]
        given["fingerprint"] = remembered.get("fingerprint")
        # A replayed prompt was rewritten already; rewriting it again need not give the same words.
        again = remembered.get("upsampled_prompt") if prompts == [remembered.get("prompt")] else None
        asked = given["interpret"] or given["upsample_prompt"]
        given["rewritten"] = [again] if again is not None and not asked else None
        count = len(prompts) * given["num_images"]
        if not 1 <= count <= MAX_IMAGES:
            raise InputError(f"the number of images must be 1 to {MAX_IMAGES}, got {count}")
        for prompt in prompts:
            check_words(prompt)
        if given["force"] and given["skip_existing"]:
            raise click.UsageError("--skip-existing leaves what --force would replace; give one of them")
        defaults = {"model": DEFAULT_MODEL, "seed": secrets.randbelow(2**32)}
        given |= {key: x for key, x in defaults.items() if given[key] is None}
        resolved = resolve(given["model"], given["models_dir"])
        _check_weights(given, resolved, replayed)
        return cls(prompts=prompts, resolved=resolved, **given)


def _remembered(image: Path) -> dict[str, Any]:
    from ..images import read_settings

    settings = read_settings(image)
    optional = dict.fromkeys(("upsampled_prompt", "fingerprint"), str | None)
    _check_kinds(settings, {"prompt": str, **optional, "edit": dict | None, **_REPLAYED}, image)
    return settings


def _check_weights(given: dict[str, Any], model: "Model", replayed: bool) -> None:
    """Raise InputError if the weights can't be used, or `model` is a `replayed` one that would have to be fetched.

    Whoever made an image chose what it says, so it may only name a model of the table or one that is here already.
    """
    from ..names import get_variant
    from ..quantization import check_quant
    from ..store import find_checkpoint

    weights = {name: given[name] for name in ("variant", "quant", "text_quant")}
    for value, check in zip(weights.values(), (get_variant, check_quant, check_quant), strict=True):
        if value is not None:
            check(value)
    if replayed and model.variant is None:
        find_checkpoint(model, **weights, models_dir=given["models_dir"], only_converted=True)


def _check_kinds(values: Any, kinds: dict[str, Any], image: Path) -> None:
    """Raise InputError if `values`, which `image` remembers, are not all of their kinds; None may be left out."""
    if not isinstance(values, dict):
        raise InputError(f"the settings in {image} are damaged: {values!r} should say {', '.join(kinds)}")
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind) or isinstance(values.get(name), bool):
            raise InputError(f"the settings in {image} are damaged: {name} is {values.get(name)!r}")
