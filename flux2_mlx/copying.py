"""Bytes on their way into a file, from memory or from other files; threads hash them meanwhile."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import BinaryIO

from .errors import CheckpointError
from .json_files import open_model_file

_PIECE = 1 << 22  # bytes that are read and hashed at a time
_WRITE = 1 << 20  # bytes that are written at a time: of several megabytes Linux takes up to five times as long


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

    def pieces(self) -> Iterator[memoryview]:
        """The bytes; a piece lasts until the one after the next is asked for."""
        buffers = cycle([memoryview(bytearray(min(_PIECE, self.nbytes))) for _ in range(2)])
        for one in self.ranges:
            for piece in one.pieces(buffers):
                self.check(piece)
                yield piece


def pieces_of(data: memoryview) -> Iterator[memoryview]:
    """Bytes that are in memory."""
    return (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))


class Hashed:
    """A file that is written part by part. Two threads of `pool` hash, the whole and the part, while the next bytes are
    made."""

    def __init__(self, file: BinaryIO, pool: Executor):
        self._file = file
        self._pool = pool
        self._whole = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of all that was written."""
        return self._whole.hexdigest()

    def write(self, pieces: Iterable[memoryview | bytes]) -> str:
        """Write a part, and give its SHA-256. Each piece has to last until the one after the next is asked for."""
        part = hashlib.sha256()
        hashing: list[Future[None]] = []
        for piece in pieces:
            wait(hashing)
            hashing = [self._pool.submit(digest.update, piece) for digest in (self._whole, part)]
            for start in range(0, len(piece), _WRITE):
                self._file.write(piece[start : start + _WRITE])
        wait(hashing)
        return part.hexdigest()
