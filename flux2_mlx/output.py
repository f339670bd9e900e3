"""What a run gives: images, their seeds and settings, and what each phase took."""

import importlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from .errors import InputError
from .image_names import paths, values_of
from .images import FORMATS, save, to_pil

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


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
class Passes:
    """What a step cache has spared. Of `all` passes of an image through the transformer it has `skipped` so many, each
    but for its first block; `unread` are the bytes of weights that need not be read from disk because of that."""

    all: int = 0
    skipped: int = 0
    unread: int = 0


@dataclass
class Flux2Output:
    """What a run gives: `images` as asked for, and the seed of each. `timings` has a `Phase` for each phase;
    `peak_memory` is in bytes. `settings` are what each image is made again from, and `passes` is what a step cache did.

    As in diffusers, `out[0]` and `out["images"]` are the images.
    """

    images: Any = None
    seeds: list[int] = field(default_factory=list)
    timings: list[Phase] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    passes: Passes = field(default_factory=Passes)

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

    def save(self, path: str | os.PathLike[str], *, replace: bool = False) -> list[Path]:
        """Write the images with their settings, from which `flux2-mlx t2i --replay` makes them again.

        Args:
            path: a file's name (.png, .jpg or .webp), to which the seed is added where there are several images; a
                folder, made if it ends in `/` or has no ending, whose files are called MODEL-SEED.png; or either with
                `{seed}`, `{prompt}`, `{model}`, `{index}`, `{width}`, `{height}` or `{steps}` in it. A result that was
                put together by hand has numbers for seeds.
            replace: put images in the place of existing files.

        Returns:
            Where each image is.

        Raises:
            InputError: it can't be written, or there are latents only; nothing has been written then.
        """
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"a path must be text or a Path, got {type(path).__name__}")
        images = self._pictures()
        targets = self._paths(os.fspath(path), len(images), replace)
        for target in targets:
            if target.suffix.lower() not in FORMATS:
                raise InputError(f"can't write {target}: the name must end in {', '.join(FORMATS)}")
            if _is_taken(target) and not replace:
                raise InputError(f"{target} exists; choose another name, or say replace=True")
        settings: list[dict[str, Any] | None] = [*self.settings] or [None] * len(images)
        try:
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
            return [
                save(image, target, own, replace=replace)
                for image, target, own in zip(images, targets, settings, strict=True)
            ]
        except OSError as error:
            raise InputError(f"can't write {error.filename or targets[0]}: {error.strerror or error}") from error

    def _pictures(self) -> list[Image.Image]:
        if self.images is None or len(self.images) == 0:
            raise InputError("there are no images to save")
        if isinstance(self.images, list):
            return self.images
        if self.images.shape[-1] == 3:
            return to_pil(np.asarray(self.images))
        if self.images.shape[1] == 3 and not isinstance(self.images, np.ndarray):
            return to_pil(self.images.permute(0, 2, 3, 1).numpy())
        raise InputError("latents are no images; write Flux2Output(pipe.decode(out), out.seeds).save(...)")

    def _paths(self, text: str, count: int, replace: bool) -> list[Path]:
        """The file of each of so many images."""
        if not Path(text).suffix and "{" not in text:
            text = os.path.join(text, "")  # a folder, which may be a new one
        known = []
        for place in range(count):
            own = self.settings[place] if self.settings else {}
            words = {"prompt": own.get("prompt"), "model": own.get("model") or "flux2"}
            sizes = {name: own.get(name, "") for name in ("width", "height", "steps")}
            known.append({"seed": self.seeds[place] if self.seeds else None, **words, **sizes})
        return paths([text] * count, values_of(known), listed=False, keep=replace)


def _is_taken(path: Path) -> bool:
    """Whether something is at `path`; InputError if nothing can be."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"can't write {str(path)[:80]!r}: {reason}; choose another name") from error
    return True


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
