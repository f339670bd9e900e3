"""How fast the disk of the models folder is read, and whether computing waits for it."""

import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlx.core as mx

from ..staging import remove_leftovers, scratch
from ..weights import Files
from .finding import Finding, UnmeasurableError, judged

_SLOW = 0.3e9  # bytes a second
_ROOM = 4  # times the size of the file must be free, so that no disk is filled to the brim
_CHUNK = 2**23
_ELSEWHERE = "make room, or name another folder with models_dir"


@contextmanager
def large_file(folder: Path, nbytes: int = 10**9) -> Iterator[Path]:
    """A file of weights on the disk of `folder`, which is made. If this process is killed, the next check-up removes
    the file, and so does `models rm --leftovers`.

    Raises:
        UnmeasurableError: it can't be written.
    """
    with ExitStack() as kept:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            _check_room(folder, _ROOM * nbytes)
            file = kept.enter_context(scratch(folder, "doctor")) / "large.safetensors"
            _write(file, nbytes)
        except OSError as error:
            raise UnmeasurableError(f"can't write to {folder}: {error.strerror or error}; {_ELSEWHERE}") from error
        yield file


def _check_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise UnmeasurableError(f"{folder} has {free / 1e9:.1f} GB free, this needs {nbytes / 1e9:.1f}; {_ELSEWHERE}")


def _write(path: Path, nbytes: int) -> None:
    header = json.dumps({"weight": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        _bypass(file.fileno())
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, nbytes, _CHUNK):
            file.write(os.urandom(min(_CHUNK, nbytes - start)))
        file.flush()
        os.fsync(file.fileno())


def check_reading(file: Callable[[], Path]) -> Finding:
    """How fast the disk of a `large_file` is read, by what the system does not remember of it."""
    path = file()
    _forget(path)
    start = time.perf_counter()
    weight = next(Files([path]).read(["weight"]))
    mx.eval(weight)
    rate = weight.nbytes / (time.perf_counter() - start)
    advice = "loading and streaming models will be slow; keep them on a faster disk with models_dir"
    return judged("reading from disk", f"{rate / 1e9:.2f} GB/s", "> 0.3 GB/s", rate > _SLOW, advice, "warn")


def check_overlap(file: Callable[[], Path]) -> Finding:
    """Whether a computation ends while a `large_file`, which it does not need, is still being read."""
    path = file()
    x = mx.ones((64, 64))
    mx.eval(x @ x)
    _forget(path)
    start = time.perf_counter()
    weight = next(Files([path]).read(["weight"]))
    mx.async_eval(weight)
    mx.eval(x @ x)
    computed = time.perf_counter() - start
    mx.eval(weight)
    whole = time.perf_counter() - start
    figure = f"{computed:.2f} s beside a file of {whole:.2f} s"
    advice = "the computation waits for files; models that are streamed will be slow"
    return judged("computing while reading", figure, "< half of it", computed < whole / 2, advice)


def _forget(file: Path) -> None:
    """Have the system read a file from its disk, not from its memory."""
    if sys.platform == "linux":
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bypass(descriptor: int) -> None:
    """Have macOS, which can't be told to forget, not remember what is written."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
