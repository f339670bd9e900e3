"""HTTP for downloads: bounded in size and time, checked by hash, and taken up again where it broke off.

`huggingface_hub` is imported inside the functions: it is slow, and reads its environment variables then. Its HTTP
client is used for its proxies and certificates; which one that is, and so the class of its errors, depends on its
version.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

_logger = logging.getLogger(__name__)

_TICK = 1.0  # seconds
# A server that sends fewer bytes than _LEAST in so many ticks is given up.
_TICKS = 60
_LEAST = 60_000
_WAITS = (1, 2, 4, 8)  # seconds before each further try of a file
_BUSY = (408, 429, 500, 502, 503, 504)
_REDIRECTS = 10
_QUOTED = 200  # characters of what a server says
_PIECE = 1 << 20


class RefusedError(Exception):
    """The server answered, but not with the file."""

    def __init__(self, status: int, code: str, said: str):
        super().__init__(f"HTTP {status}{said and ': '}{said}")
        self.status = status
        self.code = code


class BrokenError(Exception):
    """The transfer ended early, and may go on with another request."""


class _SlowError(BrokenError):
    """The server was too slow, so the transfer was given up."""


class _UnannouncedError(BrokenError):
    """The connection was closed where no length had been announced: this may or may not be the end."""


class DamagedError(Exception):
    """What arrived is not what was listed."""


@dataclass(frozen=True)
class Blob:
    """What the Hub lists of a file's content: size, and SHA-256 for an LFS file, else the SHA-1 that git gives it."""

    size: int
    digest: str

    def hasher(self) -> Any:
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def check(self, size: int, hasher: Any) -> None:
        """Raise `DamagedError` if so many bytes with this hash are not the listed ones."""
        if size != self.size:
            raise DamagedError(f"bytes: {'more than ' * (size > self.size)}{min(size, self.size)}, not {self.size}")
        if hasher.hexdigest() != self.digest:
            raise DamagedError(f"{hasher.name}: {hasher.hexdigest()}, not {self.digest}")


def read(url: str, headers: Mapping[str, str], limit: int) -> bytes:
    """Return the body of a small answer; raise `DamagedError` if it is longer than `limit`."""
    body = bytearray()
    with closing(_pieces(url, headers)) as pieces, suppress(_UnannouncedError):
        for _, piece in pieces:
            body += piece
            if len(body) > limit:
                raise DamagedError(f"more than {limit} bytes")
    return bytes(body)


def read_range(url: str, headers: Mapping[str, str], start: int, end: int) -> bytes:
    """Return the bytes of a file from `start` to `end`, or up to its end.

    Raises:
        RefusedError, BrokenError: the server does not send them.
    """
    waits = iter(_WAITS)
    while True:
        body = bytearray()
        try:
            with closing(_pieces(url, headers, start, end)) as pieces, suppress(_UnannouncedError):
                for offset, piece in pieces:  # from the first byte on, and all, where the server knows no ranges
                    body += piece[max(0, start - offset) :]
                    if len(body) >= end - start:
                        break
            return bytes(body[: end - start])
        except (BrokenError, RefusedError) as error:
            wait = next(waits, None)
            if wait is None or not _may_pass(error):
                raise
            time.sleep(wait)


def download(
    url: str, headers: Mapping[str, str], blob: Blob, partial: Path, target: Path, report: Callable[[int], object]
) -> bool:
    """Fetch a file to `partial`, on from what is there, and rename it to `target` once it is complete and right.

    `report` hears how many bytes of it are there. Gives whether it was this process that fetched it.

    Raises:
        RefusedError, BrokenError: `partial` is kept.
        DamagedError: `partial` is deleted.
    """
    with _claim(partial) as stream:
        if target.exists():  # another process was faster
            partial.unlink()
            return False
        resumed = stream.seek(0, os.SEEK_END) > 0
        try:
            try:
                _complete(url, headers, blob, stream, report)
            except DamagedError:
                if not resumed:
                    raise
                stream.truncate(0)
                _complete(url, headers, blob, stream, report)
        except DamagedError:
            partial.unlink()
            raise
        os.fsync(stream.fileno())
        os.replace(partial, target)
        return True


@contextmanager
def _claim(partial: Path) -> Iterator[BinaryIO]:
    """Open `partial` for this process alone."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", str(partial))
        with open(descriptor, "r+b") as stream:
            with suppress(OSError):  # some network disks know no locks: what two processes wrote fails its check
                _lock(stream, partial)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(partial)):  # else the last owner has renamed it
                    yield stream
                    return


def _lock(stream: BinaryIO, partial: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _logger.warning("another process is fetching %s; waiting for it", partial.name)
        fcntl.flock(stream, fcntl.LOCK_EX)


def _complete(
    url: str, headers: Mapping[str, str], blob: Blob, stream: BinaryIO, report: Callable[[int], object]
) -> None:
    """Append what `stream` lacks of the file, in as many requests as it takes, and check the whole."""
    size = 0
    hasher = blob.hasher()
    stream.seek(0)
    while size <= blob.size and (piece := stream.read(_PIECE)):
        hasher.update(piece)
        size += len(piece)
    report(size)
    waits = iter(_WAITS)
    while size < blob.size:
        before = size
        end = 0
        try:
            with closing(_pieces(url, headers, size)) as pieces:
                for offset, piece in pieces:
                    end = offset + len(piece)
                    new = piece[size - offset :] if offset < size else piece  # where the server knows no ranges
                    size += len(new)
                    if size > blob.size:
                        break
                    stream.write(new)
                    hasher.update(new)
                    report(size)
            if end < before:  # not the file, maybe a page to log in
                raise BrokenError(f"{end} bytes came, fewer than an earlier call got")
            break
        except (BrokenError, RefusedError) as error:
            if size - before > _PIECE:
                waits = iter(_WAITS)
            wait = next(waits, None)
            if size < blob.size:
                if wait is None or not _may_pass(error):
                    raise
                time.sleep(wait)
    stream.flush()
    blob.check(size, hasher)


def _may_pass(error: Exception) -> bool:
    return error.status in _BUSY if isinstance(error, RefusedError) else not isinstance(error, _SlowError)


def _pieces(
    url: str, headers: Mapping[str, str], start: int = 0, end: int | None = None
) -> Generator[tuple[int, bytes], None, None]:
    """Yield the body from `start` to `end`, or all of it where the server knows no ranges, in pieces with their
    offsets."""
    with _Watchdog() as watchdog:
        try:
            with closing(_send(url, headers, start, end, watchdog)) as response:
                offset = _offset(response, start, headers, url)
                for piece in response.iter_raw():
                    watchdog.received += len(piece)
                    yield offset, piece
                    offset += len(piece)
                    watchdog.check()
            watchdog.check()
        except (RefusedError, BrokenError, DamagedError):
            raise
        except Exception as error:  # of the HTTP client
            watchdog.check()
            raise BrokenError(quoted(first_line(error), headers, url)) from error
        if not {"content-length", "transfer-encoding"} & {name.lower() for name in response.headers}:
            raise _UnannouncedError("the connection was closed")


def _send(url: str, headers: Mapping[str, str], start: int, end: int | None, watchdog: "_Watchdog") -> Any:
    from huggingface_hub import constants, get_session

    session = get_session()
    # A range of a compressed body would be another one. The watchdog knows new connections only.
    sent = {**headers, "Accept-Encoding": "identity", "Connection": "close"}
    if start or end is not None:
        sent["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    tracing = {"trace": watchdog.trace}
    patience = constants.HF_HUB_DOWNLOAD_TIMEOUT
    request = session.build_request("GET", url, headers=sent, timeout=patience, extensions=tracing)
    for _ in range(_REDIRECTS):
        # Left to itself, the client reads the whole body of a redirect. It drops the token where the host changes.
        response = session.send(request, stream=True, follow_redirects=False)
        if response.next_request is None:
            return response
        response.close()
        request = response.next_request
    raise BrokenError(f"more than {_REDIRECTS} redirects")


def _offset(response: Any, start: int, headers: Mapping[str, str], url: str) -> int:
    """Return where in its file the body of an answer begins; raise an error if it is another answer."""
    status = response.status_code
    facts = response.headers
    if status == 416 and start:
        raise DamagedError(f"the server has fewer than {start} bytes")
    if status not in (200, 206):
        said = quoted(facts.get("X-Error-Message", ""), headers, url)
        raise RefusedError(status, facts.get("X-Error-Code", ""), said)
    first = re.match(r"bytes (\d{1,18})-", facts.get("Content-Range", "")) if status == 206 else None
    offset = int(first[1]) if first else start if status == 206 else 0
    if offset not in (0, start):
        raise DamagedError(f"the server sent bytes from {offset} on, not from {start}")
    return offset


class _Watchdog(threading.Thread):
    """Ends a transfer that gets nowhere: the client's own timeouts start anew with every byte."""

    def __init__(self) -> None:
        super().__init__(name="flux2-mlx-watchdog", daemon=True)
        self.received = 0
        self._complaint = ""
        self._streams: list[Any] = []
        self._over = threading.Event()

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Learn of every connection that the client opens."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._streams.append(info["return_value"])

    def check(self) -> None:
        if self._complaint:
            raise _SlowError(self._complaint)

    def __enter__(self) -> "_Watchdog":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        before = 0
        # Ticks, not the clock: a process that was stopped for an hour is not to blame the server.
        while not any(self._over.wait(_TICK) for _ in range(_TICKS)):
            if self.received - before < _LEAST:
                self._complaint = f"fewer than {_LEAST} bytes came in {_TICK * _TICKS:.0f} seconds"
                for stream in self._streams:
                    with suppress(OSError):
                        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
                return
            before = self.received


def quoted(text: str, headers: Mapping[str, str], url: str) -> str:
    """Return what a server or its client said, on one short line without credentials."""
    line = " ".join(redacted(text, headers, url).split())
    return line if len(line) <= _QUOTED else f"{line[:_QUOTED]}…"


def redacted(text: str, headers: Mapping[str, str], url: str) -> str:
    """Return `text` without the credentials that a request with these headers to this URL carries, and their like."""
    account = re.match(r"[a-z]+://([^/\s]*)@", url, re.IGNORECASE)
    secrets = account[1].split(":")[1:] if account else []
    secrets += headers.get("authorization", "").split()[1:]
    for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
        text = text.replace(secret, "***") if len(secret) > 3 else text
    text = re.sub(r"(?<=://)[^/\s]*@", "", text)
    text = re.sub(r"(://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", text)  # signed addresses
    text = re.sub(r"\b(bearer|basic)\s+[^\s'\",]+", r"\1 ***", text, flags=re.IGNORECASE)
    return re.sub(r"\bhf_\w{8,}", "hf_***", text)


def first_line(error: BaseException) -> str:
    return next((line.strip(" .") for line in str(error).splitlines() if line.strip()), type(error).__name__)
