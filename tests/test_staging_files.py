"""Files appear whole or not at all, replace nothing unasked, and leave nothing behind. Folders: test_staging.py."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from flux2_mlx import staging
from flux2_mlx.images import open_image, save
from flux2_mlx.staging import check_writable, remove_leftovers, write

MARKED = ".flux2-mlx-123-0123456789abcdef.part"
WRITE = """
import sys
from pathlib import Path
from PIL import Image
from flux2_mlx.images import save
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def child(script, *arguments, **options):
    command = [sys.executable, "-c", WRITE + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.fixture
def noisy():
    """A picture that takes more than 64 kB in any format."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))


FULL = """
import resource
from flux2_mlx.errors import InputError
image, path = Image.effect_noise((256, 256), 200).convert("RGB"), Path(sys.argv[1])
save(image, path)
limit = path.stat().st_size - 100
path.write_bytes(b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save(image, path, replace=True)
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_disk_that_takes_only_a_part_keeps_the_old_image(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    result = child(FULL, path)
    assert result.stdout == f"can't write {path}: File too large\n", result.stderr
    assert names(tmp_path) == [path.name]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_short_writes_are_gone_on_with(tmp_path, monkeypatch, noisy, suffix):
    save(noisy, tmp_path / f"whole{suffix}")
    whole, written = (tmp_path / f"whole{suffix}").read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: written(descriptor, data[:1000]))
    save(noisy, tmp_path / f"a{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == whole


def test_what_is_on_the_disk_is_put_in_place(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "link", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (done.append(name), real(*args)))
    write(tmp_path / "a", b"new")
    write(tmp_path / "a", b"newer", replace=True)
    assert done == ["fsync", "link", "fsync", "replace"]


def no_links(*_):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


@pytest.fixture(params=["links", "no links", "nothing of the kind"])
def disk(request, monkeypatch):
    if request.param != "links":
        monkeypatch.setattr(os, "link", no_links)
    if request.param == "nothing of the kind":
        monkeypatch.setattr(staging, "_renamed", no_links)


@pytest.mark.usefixtures("disk")
def test_a_file_that_appears_meanwhile_stays(tmp_path, image, caplog):
    (tmp_path / "a.png").write_bytes(b"another's")
    (tmp_path / "a-2.png").symlink_to("nowhere")
    assert save(image, tmp_path / "a.png") == tmp_path / "a-3.png"
    assert (tmp_path / "a.png").read_bytes() == b"another's"
    assert np.array_equal(np.asarray(open_image(tmp_path / "a-3.png")), np.asarray(image))
    assert names(tmp_path) == ["a-2.png", "a-3.png", "a.png"]
    assert caplog.messages == [
        f"{tmp_path / 'a.png'} has appeared meanwhile and stays as it is; the image is {tmp_path / 'a-3.png'}"
    ]
    assert save(image, tmp_path / "a.png", replace=True) == tmp_path / "a.png"
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(image))


@pytest.mark.usefixtures("disk")
def test_threads_with_one_path_get_a_file_each(tmp_path):
    def made(shade):
        return shade, save(Image.new("RGB", (64, 64), (shade, 0, 0)), tmp_path / "a.png")

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(made, range(0, 240, 10)))
    assert names(tmp_path) == sorted(path.name for _, path in paths)
    assert len(names(tmp_path)) == 24
    assert all(open_image(path).getpixel((0, 0)) == (shade, 0, 0) for shade, path in paths)


def test_processes_with_one_path_get_a_file_each(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        paths = pool.starmap(write, [(tmp_path / "a.png", bytes([number])) for number in range(8)], chunksize=1)
    assert len(set(paths)) == 8
    assert [path.read_bytes() for path in paths] == [bytes([number]) for number in range(8)]
    assert names(tmp_path) == sorted(path.name for path in paths)


def test_without_links_there_is_no_moment_with_an_empty_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "replace", None)
    (tmp_path / "a").write_bytes(b"old")
    assert write(tmp_path / "a", b"new") == tmp_path / "a-2"
    assert names(tmp_path) == ["a", "a-2"]
    assert (tmp_path / "a-2").read_bytes() == b"new"


def test_a_disk_without_links_that_fails_keeps_no_empty_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(staging, "_renamed", no_links)
    monkeypatch.setattr(os, "replace", no_links)
    with pytest.raises(OSError, match="not supported"):
        write(tmp_path / "a", b"new")
    assert names(tmp_path) == []


def test_the_next_free_name_of_the_longest_one(tmp_path):
    for stem in ("a" * 251, "狐" * 83):
        (tmp_path / f"{stem}.png").touch()
        assert write(tmp_path / f"{stem}.png", b"new").name == f"{stem[: 249 // len(stem[0].encode())]}-2.png"


@pytest.mark.parametrize("place", ["fcntl.flock", "os.fstat", "os.write", "os.fsync", "os.link"])
def test_a_signal_at_any_moment_leaves_nothing(place, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert names(tmp_path) == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", ["os.open", "fcntl.flock", "os.close"])
def test_a_signal_during_a_trial_leaves_nothing(place, when, tmp_path, monkeypatch):
    module, name = place.split(".")
    real = getattr({"os": os, "fcntl": fcntl}[module], name)

    def stop(*args):
        if when == "after":
            real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(place, stop)
    with pytest.raises(KeyboardInterrupt):
        check_writable(tmp_path)
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_what_a_killed_trial_leaves_is_removed_by_the_next(tmp_path):
    (tmp_path / MARKED).touch()
    check_writable(tmp_path)
    assert names(tmp_path) == []


KILLED = """
import os, signal
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
save(Image.new("RGB", (64, 64)), Path(sys.argv[1]))
"""


def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path, image):
    assert child(KILLED, tmp_path / "a.png").returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    save(image, tmp_path / "b.png")
    assert names(tmp_path) == ["b.png"]


def test_only_what_carries_the_mark_is_removed(tmp_path):
    others = [".flux2-mlx-abc", ".flux2-mlx-1.part", f"{MARKED}.png", f"a{MARKED}", ".flux2-mlx-12-zz.part"]
    for name in others:
        (tmp_path / name).write_text("theirs")
    (tmp_path / MARKED.replace("123", "4")).symlink_to(others[0])
    (tmp_path / MARKED.replace("123", "5")).mkdir()
    (tmp_path / MARKED).touch()
    before = names(tmp_path)
    remove_leftovers(tmp_path)
    assert set(before) - set(names(tmp_path)) == {MARKED}
    assert all((tmp_path / name).read_text() == "theirs" for name in others)


def test_what_another_run_is_writing_is_not_removed(tmp_path, monkeypatch):
    seen, real = [], os.fsync

    def inspect(descriptor):
        before = names(tmp_path)
        remove_leftovers(tmp_path)
        seen.append((before, names(tmp_path)))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", inspect)
    write(tmp_path / "a", b"new")
    ((before, after),) = seen
    assert before == after
    assert len(before) == 1


def test_a_folder_that_can_not_be_looked_into_is_no_obstacle(tmp_path, monkeypatch):
    def fail(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", fail)
    assert write(tmp_path / "a", b"new").read_bytes() == b"new"
