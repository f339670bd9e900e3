"""The images that an edit starts from."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import replay

if TYPE_CHECKING:
    from PIL import Image

_EDIT = {
    "images": list,
    "strength": float | None,
    "mask": dict | None,
    "mask_crop": int | None,
    "extend": dict | None,
}
_EXTEND = dict.fromkeys(("left", "right", "top", "bottom", "overlap"), int)


@dataclass(frozen=True)
class Opened:
    """What is read of the images of an edit.

    `edit` is what `Flux2Pipeline.edit` is to do with the `images`, and `settings` what image files remember of it, the
    files by name and by content; None: there are none. `others` are the files that are not those which a replayed image
    was made from, each with the name that it had.
    """

    images: "list[Image.Image]"
    edit: dict[str, Any]
    settings: dict[str, Any] | None
    others: list[tuple[Path, str]]


@dataclass(frozen=True)
class Pictures:
    """The images of an edit and what is done with them. `extend` are pixels added on each side (see `extended`).

    `match_colors` gives what is painted the colours of the first image. `former` are the files that a replayed image
    was made from, as it remembers them, where others may be given.
    """

    paths: tuple[Path, ...] = ()
    strength: float | None = None
    mask: Path | None = None
    mask_crop: int | None = None
    extend: dict[str, int] | None = None
    match_colors: bool = False
    former: tuple[dict[str, str], ...] = ()

    def open(self) -> Opened:
        """Read the files, each of them once; InputError if one is no image."""
        from ..images import open_hashed
        from ..references import extended

        hashes: dict[Path, str] = {}  # SHA-256 of each file as it was read

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
            "mask_crop": self.mask_crop,
            "feather": 0 if self.extend is None else self.extend["overlap"] // 2,
            "match_colors": self.match_colors,
        }
        return Opened(images, edit, self._settings(hashes), self._others(hashes))

    def _settings(self, hashes: dict[Path, str]) -> dict[str, Any] | None:
        if not self.paths:
            return None
        files = {path: {"path": path.name, "sha256": sha256} for path, sha256 in hashes.items()}
        return {
            "images": [files[path] for path in self.paths],
            "strength": self.strength,
            "mask": None if self.mask is None else files[self.mask],
            "mask_crop": self.mask_crop,
            "extend": self.extend,
            **({"match_colors": True} if self.match_colors else {}),
        }

    def _others(self, hashes: dict[Path, str]) -> list[tuple[Path, str]]:
        pairs = zip(self.paths, self.former, strict=False)
        return [(path, Path(file["path"]).name) for path, file in pairs if hashes[path] != file["sha256"]]

    @property
    def keep_size(self) -> bool:
        """Whether the size is that of the first image."""
        return self.match_colors or any(given is not None for given in (self.strength, self.mask, self.extend))

    def completed(self, edit: dict[str, Any], image: Path) -> "Pictures":
        """These pictures, and for all that is not given what `image` remembers of its `edit`.

        Raises:
            InputError: `edit` is damaged, or a file that is not given is gone or has changed.
        """
        from ..references import MAX_REFERENCES

        replay.check_kinds(edit, _EDIT, image)
        if not edit["images"]:
            raise InputError(f"the settings in {image} are damaged: images is []")
        if len(edit["images"]) > MAX_REFERENCES:
            raise InputError(f"the settings in {image} are damaged: it was made from {len(edit['images'])} images")
        mask = edit.get("mask")
        extend = edit.get("extend")
        if extend is not None:
            replay.check_kinds(extend, _EXTEND, image)
            extend = {name: extend[name] for name in _EXTEND}
            if self.mask is not None:
                raise InputError(f"{image} was extended, which marks what is new; leave out the mask {self.mask}")
        if self.mask is None and mask is not None:
            mask = replay.find(mask, image, "give the mask with --mask")
        for file in edit["images"]:
            replay.check_file(file, image)
        return Pictures(
            self.paths or tuple(replay.find(file, image, "give the images with -i") for file in edit["images"]),
            edit.get("strength") if self.strength is None else self.strength,
            mask if self.mask is None else self.mask,
            edit.get("mask_crop") if self.mask_crop is None else self.mask_crop,
            extend,
            self.match_colors or edit.get("match_colors") is True,
            tuple(edit["images"]),
        )
