"""Only files are read, and no more of them than allowed; free names for new ones."""

import os
import socket

import pytest

from flux2_mlx.errors import InputError
from flux2_mlx.files import free_path, opened, read_bytes
from flux2_mlx.images import open_image, read_settings


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ([], "a.b.png"),
        (["a.b.png"], "a.b-2.png"),
        (["a.b.png", "a.b-2.png", "a.b-4.png"], "a.b-3.png"),
        (["a.b-2.png"], "a.b.png"),
    ],
)
def test_the_next_free_name(tmp_path, taken, expected):
    for name in taken:
        (tmp_path / name).touch()
    assert free_path(tmp_path / "a.b.png") == tmp_path / expected


@pytest.fixture(params=["a named pipe", "a socket", "a device"])
def special(request, tmp_path):
    """What it is called, and a path that is no file."""
    path = tmp_path / "a.png"
    if request.param == "a named pipe":
        os.mkfifo(path)
    elif request.param == "a device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)  # the path of a socket has little room
            server.bind("a.png")
    return request.param, path


@pytest.mark.parametrize("read", [open_image, read_settings, lambda path: read_bytes(path, 100)])
def test_only_files_are_read(special, read):
    kind, path = special
    with pytest.raises(InputError, match=rf"can't read .*a\.png: it is {kind}; give a file$"):
        read(path)


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    path, real = tmp_path / "a", os.open
    path.touch()

    def exchanged(*args, **options):
        path.unlink()
        os.mkfifo(path)
        return real(*args, **options)

    monkeypatch.setattr(os, "open", exchanged)
    with pytest.raises(InputError, match="it is a named pipe"):
        read_bytes(path, 100)


def test_no_more_than_the_limit_is_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    assert read_bytes(path, 100) == bytes(100)
    with pytest.raises(InputError, match=r"a is too large: 100 bytes, of which at most 99 are read$"), opened(path, 99):
        pass


def test_a_file_that_grows_is_not_read_on_and_on(tmp_path, monkeypatch):
    path, real = tmp_path / "a", os.fstat
    path.write_bytes(b"some")

    def growing(descriptor):
        info = real(descriptor)
        with path.open("ab") as file:
            file.write(b"more")
        return info

    monkeypatch.setattr(os, "fstat", growing)
    with pytest.raises(InputError, match=r"can't read .*a: it grows while it is read$"):
        read_bytes(path, 10**9)
