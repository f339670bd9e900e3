"""Files read within a size, free names for new ones, and holds on folders."""

import errno
import fcntl
import itertools
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from typing import BinaryIO, cast

from .errors import InputError

_MAX_NAME_BYTES = 255  # of the file systems of macOS and Linux
_KINDS = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; nothing else is waited for or read.

    Raises:
        InputError: it is something else. OSError: it can't be opened. ValueError: no file can have this name.
    """
    _check_regular(path, os.stat(path).st_mode)
    file = open(path, "rb", opener=open_without_waiting)  # noqa: SIM115
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)  # it may have been exchanged meanwhile
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def opened(path: Path, limit: int) -> Iterator[BinaryIO]:
    """A regular file that is open for reading inside; raises as `open_regular` does.

    Raises:
        InputError: it is larger than `limit` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise InputError(f"{path} is too large: {size:,} bytes, of which at most {limit:,} are read")
        yield file


def file_sha256(path: Path, limit: int = sys.maxsize) -> str:
    """The SHA-256 of a regular file of at most `limit` bytes; raises as `opened` does."""
    with opened(path, limit) as file:
        return file_digest(cast("BinaryIO", file), "sha256").hexdigest()  # type: ignore[arg-type]


def sha256_if_there(path: Path, limit: int = sys.maxsize) -> str | None:
    """That of a file which may not be there, or be something else; None then."""
    try:
        return file_sha256(path, limit)
    except (OSError, ValueError, InputError):  # ValueError: a name that no file can have
        return None


def open_without_waiting(path: str, flags: int) -> int:
    """Open what may be a pipe, to which nobody need be writing."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise InputError(f"can't read {path}: it is {_kind(mode)}; give a file")


def _kind(mode: int) -> str:
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")


def check_kind(path: Path) -> None:
    """InputError if something is at `path` that is neither a file nor a folder."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path} is no file or folder of a model but {_kind(path.stat().st_mode)}; give one of these")


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a regular file of at most `limit` bytes; raises what `opened` does."""
    with opened(path, limit) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1)
    if len(data) > size:
        raise InputError(f"can't read {path}: it grows while it is read")
    return data


def bounded(file: BinaryIO, path: Path | str, limit: int) -> bytes:
    """The rest of an open `file`; InputError where that is more than `limit` bytes."""
    data = bytearray()
    while chunk := file.read(min(2**20, limit + 1 - len(data))):
        data += chunk
        if len(data) > limit:
            raise InputError(f"{path} is too large: it has more than {limit:,} bytes")
    return bytes(data)


def _is_free(path: Path) -> bool:
    return not os.path.lexists(path)


def free_path(path: Path, is_free: Callable[[Path], bool] = _is_free) -> Path:
    """`path`, or if that is not free, the first free one with -2, -3 and so on before the suffix."""
    return next(filter(is_free, candidates(path)))


def candidates(path: Path) -> Iterator[Path]:
    """`path`, and then the same with -2, -3 and so on before the suffix."""
    yield path
    for number in itertools.count(2):
        ending = f"-{number}{path.suffix}"
        room = _MAX_NAME_BYTES - len(os.fsencode(ending))
        stem = path.stem
        while len(os.fsencode(stem)) > room:
            stem = stem[:-1]
        yield path.with_name(stem + ending)


class Claim:
    """A hold on a folder, so that nobody removes what is in it. It ends when it is closed or forgotten, and with its
    process.

    Args:
        folder: what is held, and made first with `make`. A move takes the hold along.
        alone: have it for oneself in order to remove it; otherwise others may hold it too.

    Raises:
        InputError: it is to be had `alone`, and another holds it. OSError: there is no such folder.
    """

    def __init__(self, folder: Path, *, alone: bool = False, make: bool = False):
        self._folder = folder
        self._descriptor = -1
        while not self._hold(alone, make):  # whoever had it alone has removed it
            self.close()

    def _hold(self, alone: bool, make: bool) -> bool:
        """Lock what is there now; False if that has been removed meanwhile."""
        folder = self._folder
        try:
            if make:
                folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileExistsError, FileNotFoundError):
            if make and not os.path.lexists(folder):
                return False
            raise
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError as error:
            self.close()
            raise InputError(f"{folder} is in use by a download, conversion or run; try again later") from error
        except OSError:  # some network disks have no locks
            return True
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(folder))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type, tuple[Path]]:  # a copy of who holds it holds it too
        return Claim, (self._folder,)

    __del__ = close
