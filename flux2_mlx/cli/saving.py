"""The files of images: which may be written, which are left, and the writing."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Saving:
    """What is done where a file is there already: `force` replaces it, `skip_existing` leaves it.

    An empty one, which a killed run has left on a disk without links, is not left.
    """

    force: bool
    skip_existing: bool

    @property
    def expects_files(self) -> bool:
        """Whether names stay what they are where something is there already."""
        return self.force or self.skip_existing

    def is_kept(self, path: Path) -> bool:
        """Whether a file that is there is left and not made."""
        return self.skip_existing and path.is_file() and path.stat().st_size > 0

    def is_empty(self, path: Path) -> bool:
        """Whether a file that is there is not kept since there is nothing in it."""
        return self.skip_existing and path.is_file() and path.stat().st_size == 0

    def check(self, path: Path) -> None:
        """Raise InputError if an image can't be written to `path`, or one that is to be left there is damaged."""
        from ..images import check_output, check_whole

        if not self.is_kept(path):
            check_output(path, self.force or self.is_empty(path))
            return
        try:
            check_whole(path)
        except InputError as error:
            raise InputError(f"{error}; remove it to have it made again") from error

    def save(self, image: "Image.Image", path: Path, settings: dict[str, Any] | None = None) -> Path:
        """Write an image with its settings to `path`, or beside it if something has appeared there meanwhile."""
        from ..images import save

        path.parent.mkdir(parents=True, exist_ok=True)
        return save(image, path, settings, replace=self.force or self.is_empty(path))


def checkpoint_path(path: Path, step: int) -> Path:
    """The file of an image after `step` steps, of which `path` is the file when it is finished."""
    return path.with_name(f"{path.stem}-step-{step:03}{path.suffix}")
