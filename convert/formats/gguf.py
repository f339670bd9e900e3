"""GGUF files, of llama.cpp, stable-diffusion.cpp and the converters for ComfyUI: their tensors as plain weights.

Names are those in the file. A transformer has those of the original release. A text encoder has those of llama.cpp,
which keeps the rows of Mistral's `attn_q` and `attn_k` in another order, and not those of Qwen3: within each head of
128 rows, row 2·i + j is row i + 64·j of the original, so that `rows.reshape(heads, 64, 2, -1).swapaxes(1, 2)` puts
them back. Rows are given here as they are stored.

Headers are parsed here and not by the `gguf` library, whose reader believes what a file says of counts, lengths and
offsets and makes an object of each token of a vocabulary. What blocks of quantized weights mean is the library's part.
"""

import io
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from flux2_mlx.copying import FileVersion, Range
from flux2_mlx.errors import CheckpointError
from flux2_mlx.json_files import decoded, open_model_file
from flux2_mlx.layout import NUMBERS
from flux2_mlx.weights import HEADER_LIMIT, START, TensorInfo, raise_problems, refuse_other

from .blocks import PLAIN, Kind, Stored, kind_names, kinds, read_stored

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Numbers in metadata, by the code of their type.
_NUMBERS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {10: "<Q", 11: "<q", 12: "<d"}
_TEXT = 8
_ARRAY = 9
_MAX_ITEMS = 2**20  # texts in a header; a vocabulary with its merges has half as many
_ENTRY = 16  # texts that a tensor or a piece of metadata counts as, of which a model has hundreds
_MAX_NAME = 255
_MAX_DIMENSIONS, _MAX_DIMENSION = 4, 2**31 - 1
_ALIGNMENT = 32
_ALIGNMENTS = tuple(2**n for n in range(17))
_SPLIT = re.compile(rf"(?P<stem>.+){NUMBERS}\.gguf")
_MAX_FILES = 999


class Gguf:
    """The tensors of a model in GGUF files; quantized ones are read in float32, bit by bit as the library has them.

    Attributes:
        infos: what they are then, by name, in the order of their bytes. Shapes are row-major: `[out, in]` of a layer.
        kinds: the types that they are stored in, such as `Q4_K`.
        sizes: the bytes that they are stored in.
        metadata: what the header says, as text: of an array, such as `tokenizer.ggml.tokens`, how many values it has.
    """

    def __init__(self, paths: Iterable[Path]):
        """Read the headers of all files of one model; `split_files` finds them.

        Raises:
            CheckpointError: a file is damaged, of a type that can't be read, or not one of a set with the others.
        """
        self._stored: dict[str, Stored] = {}
        self.metadata: dict[str, str] = {}
        paths = list(paths)
        for number, path in enumerate(paths):
            metadata, stored = read_header(path)
            _check_place(path, metadata, number, len(paths))
            raise_problems(f"{path} repeats tensors of another file", [name for name in stored if name in self._stored])
            self._stored |= stored
            self.metadata = metadata | self.metadata
        said = self.metadata.get("split.tensors.count", str(len(self._stored)))
        if said != str(len(self._stored)):
            raise CheckpointError(
                f"{paths[0]} is of a model of {said[:80]} tensors, of which {len(self._stored)} are there"
            )
        self.infos: Mapping[str, TensorInfo] = {name: stored.info for name, stored in self._stored.items()}
        self.kinds = {name: stored.kind.name for name, stored in self._stored.items()}
        self.sizes = {name: stored.nbytes for name, stored in self._stored.items()}

    def range_of(self, name: str) -> Range | None:
        """Where the bytes of a tensor are that is not quantized."""
        stored = self._stored[name]
        return Range(stored.file, stored.offset, stored.nbytes) if stored.kind.name in PLAIN else None

    @property
    def versions(self) -> list[FileVersion]:
        """The files whose headers were read."""
        return [*dict.fromkeys(stored.file for stored in self._stored.values())]

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        """The tensors of these `names`, in this order (see `Tensors.read`). CheckpointError, too, if a file became
        shorter or a scale is not finite."""
        for name in names:
            yield read_stored(name, self._stored[name])


def split_files(path: Path) -> list[Path]:
    """All files of the model that `path` is of: those numbered like `x-00001-of-00003.gguf`, or itself alone.

    Raises:
        CheckpointError: one of them is not there.
    """
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= _MAX_FILES:
        raise CheckpointError(f"{path} has numbers in its name that are of no set of files; rename it")
    paths = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    raise_problems(
        f"{path} is one file of several, of which some are missing", [x.name for x in paths if not x.is_file()]
    )
    return paths


def _check_place(path: Path, metadata: Mapping[str, str], number: int, count: int) -> None:
    """CheckpointError if the file is not the one that is due in a set of `count`; `number` counts from 0."""
    said = metadata.get("split.no", "0"), metadata.get("split.count", "1")
    if said != (str(number), str(count)):
        place = f"number {said[0]} of {said[1]} files, counted from 0, where {number} of {count} is due"
        raise CheckpointError(f"{path} is {place[:200]}; keep all files of the model together under their own names")


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """Metadata and tensors of a GGUF file, in the order of their bytes; no payload is read.

    Raises:
        CheckpointError: not a GGUF file, a damaged one, or one with a type that can't be read.
    """
    with open_model_file(path) as file:
        try:
            version = FileVersion.of(path, file)
            return _parse(_Header(file, version.size), version)
        except OSError as error:
            raise CheckpointError(f"can't read {path}: {error.strerror}") from error
        except (ValueError, struct.error) as error:
            raise CheckpointError(f"can't read {path} as a GGUF file: {error}") from error


def header_length(start: bytes, size: int) -> int:
    """The bytes that the header takes of a file of `size` that begins with `start`: more than are there, where it goes
    on behind that. What is wrong with it is said by who reads it."""
    header = _Header(io.BytesIO(start), size)
    with suppress(ValueError, struct.error):
        _parse(header, FileVersion(Path(), 0, 0, size, 0))
    return header.position


class _Header:
    """The bytes of a header one after another, and never more than there are or than one may have."""

    def __init__(self, file: BinaryIO, size: int):
        self._file = file
        self._items = _MAX_ITEMS
        self.size = size
        self.position = 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise ValueError(f"it ends at byte {self.size} in the middle of its header; fetch it again")
        self.position += count
        if self.position > HEADER_LIMIT:
            raise ValueError(f"its header has more than {HEADER_LIMIT} bytes")
        return self._file.read(count)

    def peek(self, count: int) -> bytes:
        """Bytes that come next, as far as there are so many, and are given again by `take`."""
        data = self._file.read(count)
        self._file.seek(-len(data), os.SEEK_CUR)
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def items(self, weight: int = 1) -> range:
        """A range over the items that the header says follow, each of which counts as `weight` texts."""
        count = self.number("<Q")
        self._items -= count * weight
        if self._items < 0:
            raise ValueError(f"its header speaks of {count} items, more than a model has")
        return range(count)

    def text(self) -> str:
        return decoded(self.take(self.number("<Q")))

    def name(self) -> str:
        """A text that can be the name of something."""
        data = self.take(self.number("<Q"))
        name = data[: 4 * _MAX_NAME].decode("utf-8", "replace")
        if not name.isprintable() or not 1 <= len(name) <= _MAX_NAME or name.encode() != data:
            raise ValueError(f"{name[:80]!r} in its header can't be a name")
        return name

    def value(self, kind: int) -> Any:
        """A number or text; of an array its length, for what is in vocabularies is not needed."""
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self._skip_array()
        return self.number(_code(kind))

    def _skip_array(self) -> int:
        kind = self.number("<I")
        if kind != _TEXT:
            count = self.number("<Q")
            self.take(count * struct.calcsize(_code(kind)))
            return int(count)
        texts = self.items()
        for _ in texts:
            self.take(self.number("<Q"))
        return len(texts)


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"its metadata has a value of the unknown type {kind}")
    return _NUMBERS[kind]


def _parse(header: _Header, file: FileVersion) -> tuple[dict[str, str], dict[str, Stored]]:
    _check_start(header)
    tensors = header.items(_ENTRY)
    entries = header.items(_ENTRY)
    metadata: dict[str, Any] = {}
    for _ in entries:
        name = header.name()
        if name in metadata:
            raise ValueError(f"its metadata has {name!r} twice")
        metadata[name] = header.value(header.number("<I"))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment not in _ALIGNMENTS:
        raise ValueError(f"general.alignment is {alignment!r:.80} in place of a power of two up to {_ALIGNMENTS[-1]}")
    stored: dict[str, Stored] = {}
    for _ in tensors:
        name = header.name()
        if name in stored:
            raise ValueError(f"it has {name!r} twice")
        stored[name] = _entry(header, file, name, alignment)
    return {name: str(value) for name, value in metadata.items()}, _placed(header, stored, alignment)


def _check_start(header: _Header) -> None:
    start = header.peek(START)
    if start[:4] != _MAGIC:
        refuse_other(start)
        raise ValueError(f"it begins with {start[:4]!r}, of {header.size} bytes, as no GGUF file does; fetch it again")
    header.take(4)
    version = header.number("<I")
    if version not in _VERSIONS:
        order = "big-endian" if version and version % 2**16 == 0 else f"of version {version}"
        raise ValueError(f"it is {order}; give a little-endian one of version 3")


def _entry(header: _Header, file: FileVersion, name: str, alignment: int) -> Stored:
    """The tensor that the header describes next; its offset counts from the end of the header still."""
    count = header.number("<I")
    if count > _MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has {count} dimensions, more than {_MAX_DIMENSIONS}")
    shape = tuple(header.number("<Q") for _ in range(count))[::-1]  # the fastest dimension comes first in the file
    code = header.number("<I")
    offset = header.number("<Q")
    kind = _kind(name, code)
    if not all(1 <= size <= _MAX_DIMENSION for size in shape) or (shape[-1] if shape else 1) % kind.values:
        raise ValueError(f"{name!r} is {kind.name} of the impossible shape {list(shape)}")
    if offset % alignment:
        raise ValueError(f"{name!r} begins at byte {offset}, which is no multiple of {alignment}")
    return Stored(file, kind, TensorInfo(kind.dtype, shape), offset, math.prod(shape) // kind.values * kind.nbytes)


def _kind(name: str, code: int) -> Kind:
    if code not in kinds():
        readable = ", ".join(kind.name for kind in kinds().values())
        raise ValueError(f"{name!r} is of type {kind_names().get(code, code)}, which is not one of {readable}")
    return kinds()[code]


def _placed(header: _Header, stored: Mapping[str, Stored], alignment: int) -> dict[str, Stored]:
    """The tensors where they are in the file, in this order; ValueError if they overlap, or it has no such size."""
    start = -(-header.position // alignment) * alignment
    placed = {}
    end = header.position
    for name, tensor in sorted(stored.items(), key=lambda item: item[1].offset):
        first = start + tensor.offset
        if first < end:
            raise ValueError(f"{name!r} begins at byte {first}, what is before it ends at {end}")
        placed[name] = Stored(tensor.file, tensor.kind, tensor.info, first, tensor.nbytes)
        end = first + tensor.nbytes
    if not end <= header.size <= end + alignment:  # most writers fill up to the alignment
        raise ValueError(f"it has {header.size} bytes where its header says {end}; fetch it again")
    return placed
