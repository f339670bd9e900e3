"""The folder of converted models, and the checkpoints in it."""

import os
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from ..checkpoint import Checkpoint, is_checkpoint
from ..errors import CheckpointError, InputError
from ..staging import bring_all_back


def models_folder(models_dir: str | os.PathLike[str] | None = None) -> Path:
    """`models_dir`, or `$FLUX2_MLX_HOME`, or `~/.cache/flux2-mlx`."""
    return expanded(models_dir or os.environ.get("FLUX2_MLX_HOME") or "~/.cache/flux2-mlx")


def demo_folder() -> Path:
    """The built-in checkpoint."""
    return Path(str(files("flux2_mlx.demo")))


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with a home folder in place of a leading `~`."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"can't tell whose home folder {str(path)!r} starts with; write the folder in full") from error


def stored_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a models folder."""
    bring_all_back(folder)
    return [path for path in sorted(folder.iterdir()) if is_checkpoint(path)] if folder.is_dir() else []


def whole_checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoints in a models folder that are not damaged."""
    for path in stored_checkpoints(folder):
        with suppress(CheckpointError):
            yield Checkpoint.open(path)


def official_first(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoints in a models folder, which is looked through when the first one is asked for."""
    yield from sorted(whole_checkpoints(folder), key=lambda checkpoint: not is_official(checkpoint))


def is_official(checkpoint: Checkpoint) -> bool:
    """Whether the weights are those of the table's repo, as far as the checkpoint's source is known by name."""
    name = checkpoint.source.get("name")
    variant = checkpoint.variant
    named = isinstance(name, str) and name.lower() in (variant.name, variant.repo and variant.repo.lower())
    return named and not checkpoint.folded
