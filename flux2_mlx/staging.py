"""Files and folders that appear whole or not at all, and what is left of them by processes that were killed.

A file is written beside its place, under a name that is ours alone. A folder is made inside a marked one beside its
place, and an old one is moved into that before the new one takes its place, so that there is no moment at which both
could be lost. The file, or the mark, is locked for as long as its process lives, so what a killed one left is known
without guessing, and nothing else is ever touched.
"""

import ctypes
import errno
import fcntl
import json
import logging
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from .errors import CheckpointError, InputError
from .files import candidates
from .json_files import open_model_file, read_json

_log = logging.getLogger(__name__)

_PART = re.compile(r"\.flux2-mlx-\d+-[0-9a-f]{16}\.part")  # of a file: a process and a random number
_PREFIX = ".flux2-mlx-convert-"
_NAME = re.compile(rf"{re.escape(_PREFIX)}[0-9a-f]{{16}}")
_MARK = "flux2-mlx-convert.json"
_OWNER = "flux2-mlx convert"
_NEW, _OLD = "new", "old"


def write(path: Path, data: bytes | memoryview, replace: bool = False) -> Path:
    """Write `data` to `path`, on the disk and whole or not at all, and give the path that it is at.

    Unless `replace`, what is at `path` already stays, and the data go to the next name of `free_path`.
    """
    with new_file(path.parent) as (new, descriptor):
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]  # a full disk may take a part without an error
        os.fsync(descriptor)
        targets = [path] if replace else candidates(path)
        return next(target for target in targets if put(new, target, replace=replace))


def check_writable(folder: Path) -> None:
    """Raise OSError if no file can be made in `folder`."""
    with new_file(folder):
        pass


@contextmanager
def new_file(folder: Path) -> Iterator[tuple[Path, int]]:
    """A new file in `folder` and its descriptor. `put` it in its place when it is complete; else it is removed at the
    end, or by a later run if this one is killed."""
    _remove_parts(folder)
    path = folder / f".flux2-mlx-{os.getpid()}-{os.urandom(8).hex()}.part"
    descriptor = None
    try:  # from before there is a file, since a signal may raise at any moment
        descriptor = _create_locked(path)
        yield path, descriptor
    finally:
        with suppress(OSError):
            os.unlink(path)
        if descriptor is not None:
            os.close(descriptor)


def put(part: Path, target: Path, *, replace: bool) -> bool:
    """Give a finished file its name. Unless `replace`, what has that name already stays, and False is returned."""
    if not replace:
        return _placed(part, target)
    os.replace(part, target)
    return True


@contextmanager
def staged(place: Path, check: Callable[[], object] = lambda: None, *, replace: bool) -> Iterator[Path]:
    """An empty folder that is moved to `place` when the block ends without an exception, and removed otherwise.

    Args:
        place: where it goes; its parent exists.
        check: called when all is ready to be moved; what it raises prevents that.
        replace: take the place of what is there then.
    """
    with scratch(place.parent, place.name) as new:
        try:
            yield new
            check()
            _sync_folders(new)
            if replace and place.exists():
                os.rename(place, new.parent / _OLD)
            os.rename(new, place)
            _sync(place.parent)
        finally:
            _put_back(new.parent, place)


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder in `parent` that is removed at the end, or with `remove_leftovers` if this process is killed.

    `name` is what it is to become, for `leftovers`.
    """
    work = parent / f"{_PREFIX}{os.urandom(8).hex()}"
    try:  # from before there is a folder, since a signal may raise at any moment
        with _marked(work, name):
            (work / _NEW).mkdir(mode=0o755)
            yield work / _NEW
    finally:
        _remove(work, parent / name)


def bring_back(place: Path) -> None:
    """Put an old folder back to `place` if a replacement was killed before the new one was there.

    Raises:
        InputError: that can't be done.
    """
    if os.path.islink(place):
        place = Path(os.path.realpath(place))
    if _is_free(place):
        for work in _works(place.parent):
            with _dead(work) as name:
                if name == place.name:
                    _put_back(work, place)


def bring_all_back(parent: Path) -> None:
    """Put old folders back to all places in `parent` whose replacement was killed before it was there."""
    for work in _works(parent):
        with _dead(work) as name:
            if name:
                _put_back(work, parent / name)


def remove_leftovers(parent: Path) -> None:
    """Remove files and folders that killed processes left in `parent`, after putting back what they had moved aside."""
    _remove_parts(parent)
    for work in _works(parent):
        with _dead(work) as name:
            if name:
                _put_back(work, parent / name)
                _remove(work, parent / name)
        _remove_bare(work)


def remove_abandoned(path: Path, *, empty: bool = False) -> None:
    """Remove a file that its process holds locked while it lives, if that is gone; with `empty` only if nothing is in
    it."""
    with suppress(OSError):  # BlockingIOError: it is being written
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not empty or os.fstat(descriptor).st_size == 0:
                os.unlink(path)
        finally:
            os.close(descriptor)


def is_work(path: Path) -> bool:
    """Whether `path` has the name of a folder in which something is made."""
    return path.name.startswith(_PREFIX)


def leftovers(parent: Path) -> list[tuple[Path, str]]:
    """What killed processes left in `parent`, each with the name of what it was to become."""
    found = []
    for work in _works(parent):
        with _dead(work) as name:
            if name:
                found.append((work, name))
    return found


def _works(parent: Path) -> list[Path]:
    try:
        return sorted(parent.glob(f"{_PREFIX}*"))
    except (OSError, ValueError):  # a folder that can't be listed, or a name that is none
        return []


@contextmanager
def _marked(work: Path, name: str) -> Iterator[None]:
    """`work`, made with a locked mark."""
    with open(_create(work), "w", encoding="utf-8") as file:
        values = {"made_by": _OWNER, "target": quote(os.fsencode(name)), "pid": os.getpid(), "host": platform.node()}
        file.write(json.dumps(values))
        file.flush()
        yield


def _create(work: Path) -> int:
    """Make `work` and its mark, which is empty until it is locked."""
    while True:
        work.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):  # another process took the empty folder for a leftover
            return _create_locked(work / _MARK)


@contextmanager
def _dead(work: Path) -> Iterator[str | None]:
    """The name of the place that `work` was made for, if it is marked and its process is gone."""
    try:
        file = open_model_file(work / _MARK)
    except CheckpointError:
        yield None
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            values = read_json(work / _MARK)
        except (OSError, CheckpointError):
            values = {}
        target = values.get("target")
        name = os.fsdecode(unquote_to_bytes(target)) if isinstance(target, str) else ""
        ours = values.get("made_by") == _OWNER and Path(name).name == name
        yield name if ours and not work.is_symlink() else None


def _is_half_done(work: Path) -> bool:
    """Whether the old folder is aside and the new one has not left `work` for its place."""
    return (work / _OLD).exists() and (work / _NEW).exists()


def _is_free(place: Path) -> bool:
    """Whether a folder can be moved to `place`: an empty one gives way."""
    return not os.path.lexists(place) or (place.is_dir() and not place.is_symlink() and not any(place.iterdir()))


def _put_back(work: Path, place: Path) -> None:
    """Undo half a replacement, unless something else has taken the place."""
    if _is_half_done(work) and _is_free(place):
        try:
            os.rename(work / _OLD, place)
        except OSError as error:
            raise InputError(f"can't put {work / _OLD} back to {place}: {error.strerror}; move it yourself") from error


def _remove(work: Path, place: Path) -> None:
    """Remove what was made in `work`, the mark last, so that what could not be removed can be another time. An old
    folder that nothing has replaced stays."""
    if _is_half_done(work):
        _log.warning("%s was at %s, which something else has taken; move it where you want it", work / _OLD, place)
        return
    for name in (_OLD, _NEW):
        shutil.rmtree(work / name, ignore_errors=True)
    if not any(os.path.lexists(work / name) for name in (_OLD, _NEW)):
        with suppress(OSError):
            (work / _MARK).unlink(missing_ok=True)
            work.rmdir()


def _remove_bare(work: Path) -> None:
    """Remove what was killed before its mark was written, or after it was removed: it holds nothing else."""
    if _NAME.fullmatch(work.name) and not work.is_symlink():
        with suppress(OSError):
            if os.listdir(work) == [_MARK]:
                remove_abandoned(work / _MARK, empty=True)
            work.rmdir()


def _sync_folders(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            _sync(path)


def _sync(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems can't do that for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _placed(part: Path, target: Path) -> bool:
    """Give `part` the name `target`; False if something has that name."""
    try:
        os.link(part, target)
    except FileExistsError:
        return False
    except OSError:  # exFAT and some network disks have no hard links
        return _placed_without_links(part, target)
    return True


def _placed_without_links(part: Path, target: Path) -> bool:
    with suppress(OSError, AttributeError):  # of the disk, or of the system
        return _renamed(part, target)
    try:  # who is killed from here on leaves an empty file
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except FileExistsError:
        return False
    try:
        os.replace(part, target)
    except BaseException:
        os.unlink(target)
        raise
    return True


def _renamed(part: Path, target: Path) -> bool:
    """Rename `part` to a free `target` in one call, which not every system has and not every disk knows."""
    library = ctypes.CDLL(None, use_errno=True)
    here = -100  # AT_FDCWD
    only_new = 1  # RENAME_NOREPLACE
    old, new = os.fsencode(part), os.fsencode(target)
    if sys.platform == "darwin":
        failed = library.renamex_np(old, new, ctypes.c_uint(4))  # RENAME_EXCL
    else:
        failed = library.renameat2(here, old, here, new, ctypes.c_uint(only_new))
    if failed and ctypes.get_errno() != errno.EEXIST:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
    return not failed


def _create_locked(path: Path) -> int:
    """Open a new file for writing, locked, with the rights of any new file."""
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system may have no locks, and then has nothing removed either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # another run took it for a leftover before it was locked


def _remove_parts(folder: Path) -> None:
    """Remove the unfinished files in `folder` whose processes are gone."""
    with suppress(OSError):  # what can't be listed or removed is in nobody's way
        for name in filter(_PART.fullmatch, os.listdir(folder)):
            remove_abandoned(folder / name)
