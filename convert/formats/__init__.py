"""From the bytes of a format to plain weights: a file for each family of formats."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import Files, TensorInfo, Tensors

from . import fp8, nvfp4
from .packed import Packed, Unpacked

__all__ = ["Packed", "Unpacked", "plain"]
# Each finds the weights of its family by names, dtypes and shapes, given those of all tensors and what files say of
# themselves.
_FAMILIES: tuple[Callable[[Mapping[str, TensorInfo], Mapping[str, str]], dict[str, Packed]], ...] = (
    fp8.packed,
    nvfp4.packed,
)


def plain(paths: Sequence[Path]) -> tuple[Tensors, Mapping[str, str]]:
    """The tensors of files of weights, packed ones as what they stand for, and what the files say of themselves.

    Raises:
        CheckpointError: a file is damaged, or a packed weight lacks something that it is made of.
    """
    files = Files(paths)
    infos, metadata = files.infos, files.metadata
    packed: dict[str, Packed] = {}
    try:
        for family in _FAMILIES:
            packed |= family(infos, metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{paths[0]}: {error}") from error
    return (Unpacked(files, packed) if packed else files), metadata
