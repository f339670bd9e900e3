"""The one door to weights: tensors by name, what they are, and reading them. Knows bytes, no model.

Loading, streaming, converting and quantizing are `Tensors` around those of `Files`.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard, cast

import mlx.core as mx
import numpy as np

from .copying import Copied, FileVersion, Hashed, Range, sync
from .errors import CheckpointError
from .json_files import open_model_file, parse_json

FLOATS = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
# The codes of the safetensors library, and what is read of each: of floats of 8 bits their bytes.
_DTYPES = (
    {code: dtype for dtype, code in FLOATS.items()}
    | {"F64": mx.float64, "C64": mx.complex64, "BOOL": mx.bool_}
    | {"I64": mx.int64, "I32": mx.int32, "I16": mx.int16, "I8": mx.int8}
    | {"U64": mx.uint64, "U32": mx.uint32, "U16": mx.uint16}
    | dict.fromkeys(("U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), mx.uint8)
)
CODES = {dtype: code for code, dtype in reversed(_DTYPES.items())}  # of bytes U8, which stands first
_UNKNOWN_TO_MLX = {"F64", "F8_E5M2"}  # it refuses a whole file for one of them
_MAX_DIMENSION = 2**31 - 1  # MLX keeps sizes in 32 bits and would wrap greater ones
START = 64  # bytes at the beginning of a file that tell of what kind it is
HEADER_LIMIT = 100_000_000  # the limit of the safetensors library
_MAX_TENSORS = 100_000  # of a file; models have a few thousand
_MAX_PROBLEMS = 8  # told by name in one error, which is to stay readable
# Files are read, and what they hold is cast, on a stream of the CPU of its own: a computation would queue behind it.
READER = mx.new_thread_local_stream(mx.cpu)
POINTER = b"version "  # so begins a Git LFS pointer, which stands for a file in a clone without its weights
# What else is given for a file of weights, by how it begins.
_OTHERS = {
    re.escape(POINTER): "it is a Git LFS pointer; fetch the file itself with `git lfs pull`",
    rb"(?s).{3}\0{5}\{": "it is a safetensors file; give it a name that ends in .safetensors",
    rb"GGUF": "it is a GGUF file; give it a name that ends in .gguf",
    rb"PK\x03\x04": "it is a zip, in which a pickle may lie, which could run code; fetch it as .safetensors",
    rb"\x80[\x02-\x05]": "it is a pickle, which could run code; fetch it as .safetensors",
    rb"(?i)\s*<(!doctype|html)": "it is a web page; fetch the file itself, signed in if its repo asks for that",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header states it; `dtype` is the safetensors code, such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].size


class _Header(NamedTuple):
    """Of a safetensors file: its tensors in the order of their bytes, where each begins, its length, its texts, and
    the file that it was read from."""

    tensors: dict[str, TensorInfo]
    starts: dict[str, int]
    size: int
    metadata: dict[str, str]
    file: FileVersion

    def called(self, called: Callable[[str], str]) -> "_Header":
        """The same with other names; CheckpointError if two tensors would have one."""
        tensors = {called(name): info for name, info in self.tensors.items()}
        if len(tensors) < len(self.tensors):
            raise CheckpointError(f"{self.file.path} has two tensors of one name; fetch or save it again")
        return self._replace(tensors=tensors, starts={called(name): x for name, x in self.starts.items()})


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes in a safetensors file, in the order of their bytes.

    What the safetensors library refuses is refused, and so is what can't be read here.

    Raises:
        CheckpointError: not a safetensors file, or one that is cut short or too long.
    """
    return _read_header(path).tensors


def _read_header(path: Path) -> _Header:
    with open_model_file(path) as file:
        version = FileVersion.of(path, file)
        size = version.size
        try:
            length = _header_length(file.read(START), size)
            file.seek(8)
            header = _parse_header(file.read(length), 8 + length, version)
        except OSError as error:
            raise CheckpointError(f"can't read {path}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if size != header.size:
        raise CheckpointError(f"{path} has {size} bytes where its header says {header.size}; fetch or convert it again")
    return header


def _header_length(start: bytes, size: int) -> int:
    """The bytes of the header of a file of `size` that begins with `start`; ValueError if it can have none."""
    length = int.from_bytes(start[:8], "little")
    brace = start[8:9]
    if brace != b"{" or length > HEADER_LIMIT:
        refuse_other(start)
    if size < 8:
        raise ValueError(f"it has {size} bytes, so its download was cut short; fetch it again")
    if brace not in (b"", b"{"):
        raise ValueError("the header does not begin with {; fetch the file again")
    if length > HEADER_LIMIT:
        raise ValueError(f"its header has {length:,} bytes, of which at most {HEADER_LIMIT:,} are read")
    if length > size - 8:
        raise ValueError(
            f"its header has {length:,} bytes, of which {size - 8:,} are there: its download was cut short; "
            "fetch it again"
        )
    return length


def refuse_other(start: bytes) -> None:
    """ValueError says which other kind of file begins with `start`, if that is known."""
    for pattern, reason in _OTHERS.items():
        if re.match(pattern, start):
            raise ValueError(reason)


def _parse_header(data: bytes, start: int, file: FileVersion) -> _Header:
    """The header of a file whose tensors begin at byte `start`; ValueError if it is none."""
    if data[:1] != b"{":
        raise ValueError("the header does not begin with {")
    if (count := data.count(b'"data_offsets"')) > _MAX_TENSORS:  # before each of them takes time and memory
        raise ValueError(f"it lists {count:,} tensors, of which at most {_MAX_TENSORS:,} are read")
    try:
        header = parse_json(data, unique=True)
    except ValueError as error:
        raise ValueError(f"its header is no valid JSON: {error}") from error
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_table_of_texts(metadata):
        raise ValueError("__metadata__ is not a table of texts")
    entries = [(*_parse_entry(name, entry), name) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[:2])
    tensors = {}
    starts = {}
    end = 0
    for first, last, tensor, name in entries:
        if first != end:
            raise ValueError(f"{name} begins at byte {first}, the tensor before it ends at {end}")
        if last - first != tensor.nbytes:
            raise ValueError(f"{name} has {last - first} bytes in place of {tensor.nbytes}")
        tensors[name] = tensor
        starts[name] = start + first
        end = last
    return _Header(tensors, starts, start + end, metadata or {}, file)


def _is_table_of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _parse_entry(name: str, entry: Any) -> tuple[int, int, TensorInfo]:
    """Where the bytes of a tensor begin and end, and what it is; ValueError if its `entry` does not say."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is not described")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} is of dtype {dtype!r}, which is not one of {', '.join(_DTYPES)}")
    if not _are_counts(shape) or max(shape, default=0) > _MAX_DIMENSION:
        raise ValueError(f"{name} has no proper shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has no proper data_offsets")
    return offsets[0], offsets[1], TensorInfo(dtype, tuple(shape))


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    """Whether `values` is a list of whole numbers, none of them negative."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


class Tensors(Protocol):
    """Tensors by name."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of each, in the order in which they are best read."""

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        """The tensors of these `names`, each asked for once, in this order. None of them is kept here.

        They may be unread still, on the stream `READER`. Evaluate each before another stream touches it: macOS stops a
        GPU that waits some seconds for a file.

        Raises:
            CheckpointError: a file can't be opened any more.
        """


class Files:
    """The tensors of safetensors files, as these are when they are read; `called` gives a name of theirs here."""

    def __init__(self, paths: Iterable[Path], called: Callable[[str], str] = str):
        self._paths = tuple(paths)
        self._called = called

    @cached_property
    def _headers(self) -> dict[Path, _Header]:
        return {path: _read_header(path).called(self._called) for path in self._paths}

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Dtypes and shapes; CheckpointError if a file is damaged, or two of them hold the same tensor."""
        infos: dict[str, TensorInfo] = {}
        for path, header in self._headers.items():
            repeated = [name for name in header.tensors if name in infos]
            raise_problems(f"{path} repeats tensors of another file", repeated)
            infos |= header.tensors
        return infos

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The texts of the headers by their names. Where files differ, a text has a line for each."""
        texts: dict[str, list[str]] = {}
        for header in self._headers.values():
            for name, text in header.metadata.items():
                texts.setdefault(name, []).append(text)
        return {name: "\n".join(dict.fromkeys(lines)) for name, lines in texts.items()}

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        opened = cache(self._reader)
        for name in names:
            yield opened(self._places[name])(name)
        for file in self.versions:
            file.check()

    def range_of(self, name: str) -> Range:
        """Where the bytes of a tensor are."""
        header = self._headers[self._places[name]]
        return Range(header.file, header.starts[name], header.tensors[name].nbytes)

    @property
    def versions(self) -> list[FileVersion]:
        """The files whose headers were read."""
        return [header.file for header in self._headers.values()]

    @cached_property
    def _places(self) -> dict[str, Path]:
        return {name: path for path, header in self._headers.items() for name in header.tensors}

    def _reader(self, path: Path) -> Callable[[str], mx.array]:
        header = self._headers[path]
        if _UNKNOWN_TO_MLX.isdisjoint(info.dtype for info in header.tensors.values()):
            return {self._called(name): array for name, array in _load_arrays(header.file).items()}.pop
        return partial(_read_array, header)


class Renamed:
    """Tensors under other names; `names` maps the new ones to theirs."""

    def __init__(self, tensors: Tensors, names: Mapping[str, str]):
        self._tensors = tensors
        self._names = names

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: self._tensors.infos[theirs] for name, theirs in self._names.items()}

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        return self._tensors.read(self._names[name] for name in names)


def part(tensors: Tensors, prefix: str) -> Renamed:
    """The tensors whose names start with `prefix`, under their names without it."""
    names = [name for name in tensors.infos if name.startswith(prefix)]
    return Renamed(tensors, {name.removeprefix(prefix): name for name in names})


def evaluated(arrays: Iterable[mx.array]) -> Iterator[mx.array]:
    """The arrays, each put into memory before the next one, so that a tensor and its cast never wait beside others."""
    for array in arrays:
        mx.eval(array)
        yield array


def _load_arrays(file: FileVersion) -> dict[str, mx.array]:
    """The unread arrays of a safetensors file."""
    try:
        arrays = mx.load(str(file.path), format="safetensors", stream=READER)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"can't read {file.path}: {error}") from error
    file.check()  # or what MLX has opened may be other weights of the same shapes
    return cast("dict[str, mx.array]", arrays)  # which it is of this format


def _read_array(header: _Header, name: str) -> mx.array:
    """A tensor of a file that MLX refuses."""
    info = header.tensors[name]
    unit = np.dtype(f"u{_DTYPES[info.dtype].size}")
    with header.file.open() as file:
        try:
            file.seek(header.starts[name])
            values = np.fromfile(file, unit, math.prod(info.shape)).reshape(info.shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"can't read {header.file.path}: {error}") from error
    return mx.array(values).view(_DTYPES[info.dtype], stream=READER)


def mismatches(expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]) -> list[str]:
    """A line for each tensor that is missing, left over, or of another shape or dtype."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    for name, want in expected.items():
        have = found.get(name, want)
        if have != want:
            problems.append(f"{name} is {have.dtype} {list(have.shape)} instead of {want.dtype} {list(want.shape)}")
    return problems


def raise_problems(what: str, problems: list[str]) -> None:
    """Raise one CheckpointError that lists `problems`, if there are any."""
    if problems:
        more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise CheckpointError(f"{what}: {'; '.join(problems[:_MAX_PROBLEMS])}{more}")


class Written(NamedTuple):
    """What was written to a file, as it was written: its length, its SHA-256, and that of each tensor's bytes."""

    nbytes: int
    sha256: str
    tensors: dict[str, str]


def write_safetensors(
    path: Path,
    tensors: dict[str, TensorInfo],
    contents: Iterable[mx.array | Copied],
    metadata: dict[str, str],
    report: Callable[[int], None],
) -> Written:
    """Write a safetensors file of `tensors`, whose `contents` come in the same order and are dropped one by one."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = struct.pack("<Q", len(encoded)) + encoded
    digests = {}
    with Hashed.new(path) as file:
        file.write(start)
        for (name, tensor), content in zip(tensors.items(), contents, strict=True):
            digests[name] = _write(file, tensor, content)
            report(tensor.nbytes)
    return Written(len(start) + offset, file.sha256, {name: digest.result() for name, digest in digests.items()})


def _write(file: Hashed, tensor: TensorInfo, content: mx.array | Copied) -> Future[str]:
    """Write the bytes of a tensor; AssertionError if it is not what was planned."""
    if isinstance(content, Copied):
        if content.nbytes != tensor.nbytes:
            raise AssertionError(f"planned {tensor.nbytes} bytes, found {content.nbytes}")
        return file.copy(content)
    mx.eval(content)
    values = np.ascontiguousarray(content.view(mx.uint16) if tensor.dtype == "BF16" else content)
    if values.shape != tensor.shape:
        raise AssertionError(f"planned {tensor.shape}, made {values.shape}")
    return file.write(values.reshape(-1).view(np.uint8).data)


def write_bytes(path: Path, data: bytes) -> Written:
    """Write a small file of another kind."""
    with path.open("wb") as file:
        file.write(data)
        sync(file)
    return Written(len(data), hashlib.sha256(data).hexdigest(), {})
