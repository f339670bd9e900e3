"""What a run gives: images, their seeds and settings, and what each phase took."""

import importlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from .errors import InputError
from .files import free_path
from .images import FORMATS, save, to_pil

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_FIELDS = ("seed", "prompt", "index", "model")
_UNSAFE = re.compile(r"[^\w.-]+")
_MAX_WORDS = 60  # characters of a prompt in a file's name


@dataclass(frozen=True)
class Phase:
    """What one phase of a run took: seconds, and peak memory in bytes.

    `read` are the bytes of weights that were streamed from disk, `streamed` those of each pass, and `overlap` is the
    share of the reading, 0 to 1, that the computation did not wait for.
    """

    name: str
    seconds: float
    peak_memory: int
    read: int = 0
    streamed: int = 0
    overlap: float | None = None


@dataclass
class Flux2Output:
    """What a run gives: `images` as asked for, and the seed of each. `timings` has a `Phase` for each phase;
    `peak_memory` is in bytes. `settings` are what each image is made again from.

    As in diffusers, `out[0]` and `out["images"]` are the images.
    """

    images: Any = None
    seeds: list[int] = field(default_factory=list)
    timings: list[Phase] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def peak_memory(self) -> int:
        return max((phase.peak_memory for phase in self.timings), default=0)

    def __getitem__(self, key: int | str) -> Any:
        values = vars(self)
        if isinstance(key, str):
            if key not in values:
                raise InputError(f"a result has no {key!r}; it has {', '.join(values)}")
            return values[key]
        return (self.images,)[key]

    def __repr__(self) -> str:
        count = 0 if self.images is None else len(self.images)
        seconds = sum(phase.seconds for phase in self.timings)
        return (
            f"Flux2Output({count} images, seeds={self.seeds}, {seconds:.1f} s, {self.peak_memory / 2**30:.2f} GiB peak)"
        )

    def save(self, path: str | os.PathLike, *, replace: bool = False) -> list[Path]:
        """Write the images with their settings, from which `flux2-mlx t2i --replay` makes them again.

        Args:
            path: a file's name (.png, .jpg or .webp), to which the seed is added where there are several images; a
                folder, made if it ends in `/` or has no ending, whose files are called MODEL-SEED.png; or either with
                `{seed}`, `{prompt}`, `{index}` or `{model}` in it.
            replace: put images in the place of existing files.

        Returns:
            Where each image is.

        Raises:
            InputError: it can't be written, or there are latents only; nothing has been written then.
        """
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"a path must be text or a Path, got {type(path).__name__}")
        images, paths = self._pictures(), self._paths(os.fspath(path))
        for target in paths:
            if target.suffix.lower() not in FORMATS:
                raise InputError(f"can't write {target}: the name must end in {', '.join(FORMATS)}")
            if os.path.lexists(target) and not replace:
                raise InputError(f"{target} exists; choose another name, or say replace=True")
        settings = self.settings or [None] * len(images)
        written = []
        for image, target, own in zip(images, paths, settings, strict=True):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"can't make the folder {target.parent}: {error.strerror}") from error
            written.append(save(image, target, own, replace=replace))
        return written

    def _pictures(self) -> list[Image.Image]:
        if self.images is None or len(self.images) == 0:
            raise InputError("there are no images to save")
        if isinstance(self.images, list):
            return self.images
        if self.images.shape[-1] == 3:
            return to_pil(np.asarray(self.images))
        if self.images.shape[1] == 3 and not isinstance(self.images, np.ndarray):
            return to_pil(self.images.permute(0, 2, 3, 1).numpy())
        raise InputError("latents are no images; write Flux2Output(pipe.decode(out.images)).save(...)")

    def _paths(self, text: str) -> list[Path]:
        """The file of each image."""
        named = re.search(r"\{.*?\}", text) is not None
        folder = text.endswith(("/", os.sep)) or Path(text).is_dir() or not Path(text).suffix
        if folder:
            text = os.path.join(text, "{model}-{seed}.png")
        elif not named and len(self.seeds) > 1:
            text = f"{text.removesuffix(Path(text).suffix)}-{{seed}}{Path(text).suffix}"
        paths: list[Path] = []
        for index in range(len(self.seeds)):
            target = Path(self._filled(text, index)) if folder or named or len(self.seeds) > 1 else Path(text)
            paths.append(free_path(target) if folder else target)
        if len(set(paths)) < len(paths):
            raise InputError(f"{text!r} names several images alike; put {{index}} or {{seed}} into it")
        return paths

    def _filled(self, template: str, index: int) -> str:
        own = self.settings[index] if self.settings else {}
        values = {
            "seed": self.seeds[index],
            "prompt": _UNSAFE.sub("-", own.get("prompt") or "image")[:_MAX_WORDS].strip("-.") or "image",
            "index": index,
            "model": Path(own.get("model") or "flux2").absolute().name,
        }

        def value(match: re.Match) -> str:
            if match[1] not in values:
                raise InputError(f"{match[0]} names nothing in {template!r}; choose of {', '.join(_FIELDS)}")
            return str(values[match[1]])

        return re.sub(r"\{(.*?)\}", value, template)


def check_output_type(output_type: Any) -> None:
    """Raise InputError if images can't be given as this: an unknown type, or PyTorch's without it."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise InputError(f"unknown output_type {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
    if output_type == "pt":
        _torch()


def to_torch(images: np.ndarray) -> Any:
    """PyTorch's tensor `[B, 3, H, W]` of images `[B, H, W, 3]`."""
    return _torch().from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _torch() -> ModuleType:
    try:
        return importlib.import_module("torch")  # only for who asks for its tensors
    except ImportError as error:
        raise InputError("output_type 'pt' needs PyTorch, which is not installed; choose 'np'") from error
