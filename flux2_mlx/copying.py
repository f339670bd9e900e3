"""Bytes on their way into a file, from memory or from other files; threads hash them meanwhile."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import BinaryIO

from .errors import CheckpointError
from .json_files import open_model_file

_PIECE = 1 << 19  # bytes that are read and hashed at a time
_PIECES = 4  # that are in memory at a time: threads need seldom wait, and a cache of a core holds them all
_WRITE = 1 << 18  # bytes that are written at a time: of two megabytes Linux takes up to ten times as long
_SYNC = 1 << 28  # bytes after which they are brought to the disk while the next ones are made


@dataclass(frozen=True)
class FileVersion:
    """A file at `path` as it was when its header was read. Another one may be there later, or the same one changed:
    offsets of the one mean nothing in the other."""

    path: Path
    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, file: BinaryIO) -> "FileVersion":
        """What is open as `file`, found at `path`."""
        return cls._stated(path, os.fstat(file.fileno()))

    @classmethod
    def _stated(cls, path: Path, found: os.stat_result) -> "FileVersion":
        return cls(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def open(self) -> BinaryIO:
        """Open it for reading; CheckpointError if it is not there any more as it was."""
        file = open_model_file(self.path)
        try:
            self._compare(os.fstat(file.fileno()))
        except BaseException:
            file.close()
            raise
        return file

    def check(self) -> None:
        """CheckpointError if it is not there any more as it was."""
        try:
            self._compare(os.stat(self.path))
        except OSError as error:
            raise CheckpointError(f"can't read {self.path}: {error.strerror}") from error

    def _compare(self, found: os.stat_result) -> None:
        if self._stated(self.path, found) != self:
            raise CheckpointError(f"{self.path} was changed while it was read; try again when nothing writes it")


@dataclass(frozen=True)
class Range:
    """Bytes `start` to `start + nbytes` of a file."""

    file: FileVersion
    start: int
    nbytes: int

    @property
    def halves(self) -> "tuple[Range, Range]":
        half = self.nbytes // 2
        return replace(self, nbytes=half), replace(self, start=self.start + half, nbytes=half)

    def pieces(self, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
        """The bytes, read into one buffer after the other; CheckpointError if the file has changed."""
        with self.file.open() as file:
            for start in range(self.start, self.start + self.nbytes, _PIECE):
                piece = next(buffers)[: self.start + self.nbytes - start]
                self._read(file, piece, start)
                yield piece

    def _read(self, file: BinaryIO, piece: memoryview, start: int) -> None:
        try:
            count = os.preadv(file.fileno(), [piece], start)
        except OSError as error:
            raise CheckpointError(f"can't read {self.file.path}: {error.strerror}") from error
        if count != len(piece):
            raise CheckpointError(f"{self.file.path} became shorter while it was read")


@dataclass(frozen=True)
class Copied:
    """A tensor whose bytes are those of `ranges`, one after the other; `check` sees each piece and raises what is wrong
    with it."""

    ranges: tuple[Range, ...]
    check: Callable[[memoryview], object] = lambda piece: None

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.ranges)

    def pieces(self, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
        """The bytes, read into one buffer after the other."""
        for one in self.ranges:
            for piece in one.pieces(buffers):
                self.check(piece)
                yield piece


def new_buffers() -> Iterator[memoryview]:
    """Memory for pieces: each one's is taken again when so many more have been asked for as there are in all."""
    return cycle([memoryview(bytearray(_PIECE)) for _ in range(_PIECES)])


class Hashed:
    """A file that is written part by part. One thread hashes the whole and one the parts, up to some pieces behind, and
    another brings what is written to the disk: it is there when the block of `new` ends."""

    def __init__(self, file: BinaryIO, threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor, ThreadPoolExecutor]):
        self._file = file
        self._of_whole, self._of_parts, self._of_disk = threads
        self._whole = hashlib.sha256()
        self._hashing: deque[list[Future[None]]] = deque()  # piece by piece
        self._syncing: Future[None] | None = None
        self._synced = 0
        self._buffers = new_buffers()

    @classmethod
    @contextmanager
    def new(cls, path: Path) -> Iterator["Hashed"]:
        """A new file at `path`."""
        with path.open("wb") as file, ExitStack() as threads:
            one, two, three = (threads.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
            hashed = cls(file, (one, two, three))
            yield hashed
            hashed._finish()

    @property
    def sha256(self) -> str:
        """Of all that was written, when the block of `new` has ended."""
        return self._whole.hexdigest()

    def write(self, data: memoryview | bytes) -> Future[str]:
        """Write a part that is in memory, and give its SHA-256. It need not last longer."""
        digest = self._write(data[start : start + _PIECE] for start in range(0, len(data), _PIECE))
        self._catch_up(0)
        return digest

    def copy(self, copied: Copied) -> Future[str]:
        """Write a part that is in files, and give its SHA-256."""
        return self._write(copied.pieces(self._buffers))

    def _write(self, pieces: Iterable[memoryview | bytes]) -> Future[str]:
        part = hashlib.sha256()
        for piece in pieces:
            hashing = [self._of_whole.submit(self._whole.update, piece), self._of_parts.submit(part.update, piece)]
            self._hashing.append(hashing)
            for start in range(0, len(piece), _WRITE):
                self._file.write(piece[start : start + _WRITE])
            self._sync()
            self._catch_up(_PIECES - 1)
        return self._of_parts.submit(part.hexdigest)

    def _catch_up(self, behind: int) -> None:
        """Wait until hashing is no more than so many pieces behind."""
        while len(self._hashing) > behind:
            wait(self._hashing.popleft())

    def _sync(self) -> None:
        """Have another thread bring what is written to the disk, if that is much and the thread has nothing to do."""
        if self._file.tell() - self._synced >= _SYNC and (self._syncing is None or self._syncing.done()):
            self._check_sync()
            self._synced = self._file.tell()
            self._syncing = self._of_disk.submit(os.fsync, self._file.fileno())

    def _check_sync(self) -> None:
        """Raise what went wrong: the system tells it only once."""
        if self._syncing is not None:
            self._syncing.result()

    def _finish(self) -> None:
        sync(self._file)
        self._check_sync()
        self._catch_up(0)


def sync(file: BinaryIO) -> None:
    """Make what was written to `file` durable."""
    file.flush()
    os.fsync(file.fileno())
