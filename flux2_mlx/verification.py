"""Is a checkpoint still what the converter wrote? All of its bytes are read, and none of them is kept."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .checkpoint import DIGEST, MANIFEST, TENSOR_HASHES, Checkpoint, is_checkpoint, recorded
from .device import foreign
from .errors import CheckpointError, Flux2Error, InputError, one_line
from .json_files import NONSENSE, open_model_file, read_json
from .staging import write
from .weights import TensorInfo, raise_problems, read_header

_MEMORY = "verified.json"
_CHUNK = 1 << 19  # bytes that are looked at a time, so few that a core's cache holds them
_CHANGED = "is not what was converted"
_Progress = Callable[[int, int], object]


class _Float(NamedTuple):
    """How a dtype lies in bits: those of the exponent are all set in what is not finite."""

    bits: type
    exponent: int
    sign: int


_FLOATS = {
    "F32": _Float(np.uint32, 0x7F800000, 0x80000000),
    "F16": _Float(np.uint16, 0x7C00, 0x8000),
    "BF16": _Float(np.uint16, 0x7F80, 0x8000),
}


class Problem(NamedTuple):
    """What is wrong with a file of the checkpoint, or with one tensor in it; without a file, with the whole."""

    file: str | None
    tensor: str | None
    what: str

    def __str__(self) -> str:
        return one_line(" ".join(filter(None, [self.file and f"{self.file}:", self.tensor, self.what])))


@dataclass(frozen=True)
class Report:
    """What a verification found.

    `hashed` says whether there were hashes to compare with; without them other finite values pass. `sealed` says
    whether the manifest has a digest of itself.
    """

    folder: Path
    problems: list[Problem]
    hashed: bool
    sealed: bool
    files: dict[str, list[int]]  # size and times of change of each file, as they were before it was read

    def remember(self) -> bool:
        """Note in the folder that it was found good, or forget that it once was; gives whether that could be done."""
        memory = self.folder / _MEMORY
        time = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            if self.problems:
                memory.unlink(missing_ok=True)
            else:
                values = {"time": time, "hashed": self.hashed, "states": self.files}
                write(memory, json.dumps(values, indent=2).encode(), replace=True)
        except OSError:
            return False
        return True


class Memory(NamedTuple):
    """When a checkpoint was found good, whether by hashes, and which files have changed since, by sizes and times."""

    time: str
    changed: list[str]
    hashed: bool


def remembered(folder: Path) -> Memory | None:
    """What was noted of the last verification that found the folder good; None: there is no such note."""
    if not (folder / _MEMORY).exists():
        return None
    try:
        values = read_json(folder / _MEMORY)
        time = datetime.fromisoformat(values["time"]).isoformat(timespec="seconds")
        before = dict(values["states"])
    except (*NONSENSE, CheckpointError):
        return None
    now = _states(folder)
    changed = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
    return Memory(time, changed, values.get("hashed") is True)


def verify(folder: Path, progress: _Progress | None = None) -> Report:
    """Read every file of a checkpoint and compare it with what the converter recorded; look at every value.

    Args:
        folder: an MLX checkpoint folder.
        progress: called with bytes read and bytes in all.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if not is_checkpoint(folder):
        raise CheckpointError(f"{folder} is not an MLX checkpoint: it has no {MANIFEST}")
    states = _states(folder)
    problems: list[Problem] = []
    manifest = _manifest(folder)
    records = _records(manifest, problems)
    hashes = _tensor_hashes(folder) if TENSOR_HASHES in records else {}
    weights = {name for name in states if name.endswith(".safetensors")}
    meter = Meter(sum(states[name][0] for name in {*records, *weights} if name in states), progress)
    for name in sorted({*records, *weights}):
        if name not in records and records:
            problems.append(Problem(name, None, "was not there after the conversion"))
        problems += _check_file(folder, name, records.get(name), hashes.get(name, {}), meter)
    try:
        Checkpoint.open(folder)
    except Flux2Error as error:
        known = tuple(f"{folder / (problem.file or '')} {problem.what}" for problem in problems)
        if not str(error).startswith(known):
            problems.append(Problem(None, None, str(error)))
    return Report(folder, problems, bool(records), DIGEST in manifest, states)


def hashed_bytes(folder: Path, parts: Collection[str] | None = None) -> int:
    """The bytes of the files of a checkpoint, or of those of some `parts`, for which a hash was recorded."""
    return sum(_size(folder / name) for name in _records(_manifest(folder), []) if _is_of(name, parts))


def _is_of(name: str, parts: Collection[str] | None) -> bool:
    return parts is None or name.partition("/")[0] in parts


def check_hashes(folder: Path, report: Callable[[int], None], parts: Collection[str] | None = None) -> None:
    """Compare every file of a checkpoint, or of some `parts`, with the hash that the converter recorded, if it did.
    `report` is called with bytes read.

    Raises:
        CheckpointError: a file is not what was recorded.
    """
    problems: list[Problem] = []
    records = _records(_manifest(folder), problems)
    for name, record in records.items():
        if not _is_of(name, parts):
            continue
        digest = hashlib.sha256()
        size = 0
        with open_model_file(folder / name) as file:
            while data := file.read(_CHUNK):
                digest.update(data)
                report(len(data))
                size += len(data)
        if (record["bytes"], record["sha256"]) != (size, digest.hexdigest()):
            problems.append(Problem(name, None, _CHANGED))
    raise_problems(f"{folder} is damaged, convert the model again", [str(problem) for problem in problems])


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


class Meter:
    """Adds up the bytes that are done; `report` is called with them and those in all."""

    def __init__(self, total: int, report: _Progress | None):
        self._done = 0
        self._total = total
        self._report = report

    def add(self, count: int) -> None:
        self._done += count
        if self._report:
            with foreign():
                self._report(self._done, self._total)


def _states(folder: Path) -> dict[str, list[int]]:
    """Size and both times of change of every file that a checkpoint may consist of: the one of its content can be set
    back."""
    found = {}
    for path in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        if path.suffix in (".json", ".safetensors", ".jinja") and path.name != _MEMORY:
            with suppress(OSError):  # a link to nothing
                status = path.stat()
                found[path.relative_to(folder).as_posix()] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / MANIFEST)
    except CheckpointError:  # opening will say so
        return {}


def _records(manifest: dict[str, Any], problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """The manifest's record of each file that lies in the folder; what is wrong with it is added to `problems`."""
    try:
        return recorded(manifest)
    except InputError as error:
        problems.append(Problem(MANIFEST, None, str(error)))
        return {}


def _tensor_hashes(folder: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of the tensors of each file, as far as they can be read: they only say where a file has changed."""
    try:
        values = read_json(folder / TENSOR_HASHES)
    except CheckpointError:
        return {}
    return {name: hashes for name, hashes in values.items() if isinstance(hashes, dict)}


def _check_file(
    folder: Path, name: str, record: dict[str, Any] | None, hashes: dict[str, str], meter: Meter
) -> list[Problem]:
    if not os.path.lexists(folder / name):
        return [Problem(name, None, "is missing")]
    whole = hashlib.sha256()
    problems = []
    changed = []
    try:
        with open_model_file(folder / name) as file:
            size = os.fstat(file.fileno()).st_size
            if name.endswith(".safetensors"):
                try:
                    tensors = read_header(folder / name)
                except CheckpointError as error:  # what it says of tensors is worth nothing
                    tensors = {}
                    problems.append(Problem(name, None, str(error).removeprefix(f"{folder / name} ")))
                start = size - sum(tensor.nbytes for tensor in tensors.values())
                _read(file, start, [whole], meter)
                for key, tensor in tensors.items():
                    digest, flaws = _read_tensor(file, key, tensor, whole, meter)
                    problems += [Problem(name, key, flaw) for flaw in flaws]
                    if hashes.keys() == tensors.keys() and hashes[key] != digest:
                        changed.append(Problem(name, key, _CHANGED))
            else:
                _read(file, size, [whole], meter)
    except (OSError, CheckpointError) as error:
        return [*problems, Problem(name, None, str(error))]
    if record and (record["bytes"], record["sha256"]) != (size, whole.hexdigest()):
        problems += changed or [Problem(name, None, _CHANGED)]
    return problems


def _read_tensor(file: BinaryIO, name: str, tensor: TensorInfo, whole: Any, meter: Meter) -> tuple[str, set[str]]:
    """SHA-256 of the tensor that comes next in `file`, and what is wrong with its values."""
    own = hashlib.sha256()
    flaws = set()
    kind = _FLOATS.get(tensor.dtype)
    for data in _pieces(file, tensor.nbytes, [whole, own], meter):
        if kind:
            bits: np.ndarray = np.frombuffer(data, kind.bits)
            if ((bits & kind.exponent) == kind.exponent).any():
                flaws.add("has values that are not finite")
            if name.endswith("running_var") and (bits > kind.sign).any():
                flaws.add("has negative values, which a variance can't have")
    return own.hexdigest(), flaws


def _read(file: BinaryIO, count: int, digests: list[Any], meter: Meter) -> None:
    for _ in _pieces(file, count, digests, meter):
        pass


def _pieces(file: BinaryIO, count: int, digests: list[Any], meter: Meter) -> Iterator[bytes]:
    """The next `count` bytes of `file`, piece by piece; all `digests` see them."""
    while count:
        data = file.read(min(count, _CHUNK))
        if not data:
            raise CheckpointError("became shorter while it was read")
        for digest in digests:
            digest.update(data)
        meter.add(len(data))
        count -= len(data)
        yield data
