"""From the bytes of a format to plain weights: a file for each family of formats."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from flux2_mlx.copying import FileVersion, Range
from flux2_mlx.errors import CheckpointError
from flux2_mlx.quantization import GROUP_SIZE
from flux2_mlx.weights import Files, Tensors, raise_problems, read_header

from . import bitsandbytes, fp8, mlx, nvfp4, outline, quanto, torchao
from .gguf import Gguf, split_files
from .gguf import read_header as read_gguf_header
from .packed import NO_SHAPES, Packed, Shapes, Unpacked
from .rounding import rounded
from .unreadable import unreadable

__all__ = [
    "GGUF",
    "SETTINGS",
    "Gguf",
    "Packed",
    "Unpacked",
    "outline",
    "plain",
    "range_of",
    "rounded",
    "starts",
    "stored",
    "unpacked",
    "unreadable",
    "usual_quant",
    "versions",
]
GGUF = ".gguf"
# Bits a weight: from _FULL on they are 16. 4 bits take up to 5 with their scales, and 5 bits are better kept in 8.
_FULL = 15
_FEW = 5.1
SETTINGS = mlx.SETTINGS
METHOD = "quant_method"
_COMPILED = "._orig_mod."


def plain(
    paths: Sequence[Path], said: Mapping[str, str] | None = None, shapes: Shapes = NO_SHAPES
) -> tuple[Tensors, Mapping[str, str]]:
    """The tensors of files of weights, packed ones unpacked when they are read, and the files' metadata.

    Args:
        paths: safetensors files that belong together, or one GGUF file, with which all of its set are read.
        said: what is said of them elsewhere, such as MLX's `SETTINGS` or a `METHOD` in a config.
        shapes: of weights by their names there, as far as they are known; some formats do not store them.

    Raises:
        CheckpointError: a file is damaged, or a packed weight lacks something that it is made of.
    """
    if paths[0].suffix.lower() == GGUF:
        gguf = Gguf(split_files(paths[0]))
        return gguf, gguf.metadata
    files = stored(paths)
    metadata = {**files.metadata, **(said or {})}
    _ = files.infos  # what is wrong with the files comes first
    try:
        tensors = unpacked(files, metadata, shapes)
        if said and tensors is files:
            how = f"quantized by {said[METHOD]}" if METHOD in said else SETTINGS
            raise CheckpointError(f"its config.json says {how}, and no weight is packed; give a complete copy")
    except CheckpointError as error:
        raise CheckpointError(f"{paths[0]}: {error}") from error
    return tensors, metadata


def stored(paths: Iterable[Path]) -> Files:
    """The tensors of safetensors files as they are stored, without what torch.compile puts inside their names."""
    return Files(paths, lambda name: name.replace(_COMPILED, "."))


def unpacked(tensors: Tensors, metadata: Mapping[str, str], shapes: Shapes = NO_SHAPES) -> Tensors:
    """`tensors` with plain weights, unpacked when they are read, in place of packed ones. (What bitsandbytes says of
    its own is read at once.)

    Args:
        tensors: as they are stored.
        metadata: what is said of them.
        shapes: of weights by their names, as far as they are known.
    """
    packed = _packed(tensors, metadata, shapes)
    return Unpacked(tensors, packed) if packed else tensors


def starts(path: Path) -> list[int]:
    """Where in a file of weights the bytes of its tensors begin."""
    if path.suffix.lower() == GGUF:
        return [stored.offset for stored in read_gguf_header(path)[1].values()]
    sizes = [info.nbytes for info in read_header(path).values()]
    return [*accumulate(sizes[:-1], initial=path.stat().st_size - sum(sizes))]


def range_of(tensors: Tensors, name: str) -> Range | None:
    """Where the bytes are that a tensor is read from as they are; None: it is made of others, or they are nowhere."""
    return tensors.range_of(name) if isinstance(tensors, Files | Unpacked | Gguf) else None


def versions(tensors: Tensors) -> list[FileVersion]:
    """The files that tensors are read from, as they were when their headers were read."""
    return tensors.versions if isinstance(tensors, Files | Unpacked | Gguf) else []


def usual_quant(tensors: Tensors, names: Iterable[str]) -> str:
    """The fewest bits of ours that keep the precision that most of the weights of these `names` are stored in, of those
    that are quantized: `bf16`, `qint8` or `qint4`."""
    if not isinstance(tensors, Unpacked | Gguf):
        return "bf16"
    kinds, sizes = tensors.kinds, tensors.sizes
    counts: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for name in names:
        info = tensors.infos[name]
        if len(info.shape) == 2 and info.shape[1] % GROUP_SIZE == 0:
            kind = kinds.get(name, info.dtype)
            counts[kind] += math.prod(info.shape)
            nbytes[kind] += sizes.get(name, info.nbytes)
    bits = {kind: 8 * nbytes[kind] / count for kind, count in counts.items() if count}
    for quant, most in (("qint4", _FEW), ("qint8", _FULL)):
        if 2 * sum(count for kind, count in counts.items() if bits[kind] < most) > counts.total():
            return quant
    return "bf16"


def _packed(tensors: Tensors, metadata: Mapping[str, str], shapes: Shapes) -> dict[str, Packed]:
    """The packed weights of all families; CheckpointError if one is of two families."""
    infos = tensors.infos
    found: dict[str, Packed] = {}
    for family in (
        fp8.packed(infos, metadata),
        nvfp4.packed(infos, metadata),
        bitsandbytes.packed(infos, metadata, tensors.read),
        quanto.packed(infos, metadata, shapes),
        torchao.packed(infos, metadata),
        mlx.packed(infos, metadata, shapes),
    ):
        twice = [f"{name} as {found[name].kind} and {family[name].kind}" for name in family if name in found]
        raise_problems("weights are packed in two ways", twice)
        found |= family
    return found
