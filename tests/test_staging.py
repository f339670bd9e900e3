"""Replacing a folder: whatever interrupts it, one of the two stays, and nothing of others is touched."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flux2_mlx.errors import InputError
from flux2_mlx.staging import bring_back, remove_leftovers, staged

CALLS = ("os.rename", "shutil.rmtree")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to replace, alone in its parent."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "file").write_text("old")
    return tmp_path / "models" / "mine"


def replace(place: Path) -> None:
    with staged(place, replace=True) as folder:
        (folder / "file").write_text("new")


def content(place: Path) -> str:
    return (place / "file").read_text()


def interrupt(monkeypatch: pytest.MonkeyPatch, first: int, last: int, when: str) -> list[str]:
    """Let the calls of that number raise KeyboardInterrupt before or after they do their work; gives the calls."""
    made: list[str] = []
    for call in CALLS:
        module, name = call.split(".")
        real = getattr({"os": os, "shutil": shutil}[module], name)

        def stand_in(*args, call=call, real=real, **options):
            made.append(call)
            now = first <= len(made) <= last
            if now and when == "before":
                raise KeyboardInterrupt
            real(*args, **options)
            if now:
                raise KeyboardInterrupt

        monkeypatch.setattr(call, stand_in)
    return made


def test_replacing(place, monkeypatch):
    made = interrupt(monkeypatch, 0, 0, "never")
    replace(place)
    assert made == ["os.rename", "os.rename", "shutil.rmtree", "shutil.rmtree"]
    assert content(place) == "new"
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_interruption_at_any_call_leaves_the_old_or_the_new(number, when, place):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, number, number, when)
        with pytest.raises(KeyboardInterrupt):
            replace(place)
    assert content(place) == ("old" if (number, when) in ((1, "before"), (1, "after"), (2, "before")) else "new")
    remove_leftovers(place.parent)
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_interruptions_that_do_not_end_leave_what_comes_back(number, when, place):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, number, 1000, when)
        with pytest.raises(KeyboardInterrupt):
            replace(place)
    bring_back(place)
    assert content(place) in ("old", "new")
    before = content(place)
    remove_leftovers(place.parent)
    assert list(place.parent.iterdir()) == [place]
    assert content(place) == before


KILLED = """
import os, shutil, sys
from pathlib import Path
from flux2_mlx.staging import staged

parent = Path(sys.argv[1])
real, calls = {"rename": os.rename, "rmtree": shutil.rmtree}, 0

def stand_in(name, number):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == number:
            os._exit(9)
        return real[name](*args, **options)
    return call

for number in range(1, 5):
    place = parent / f"{number}" / "mine"
    place.mkdir(parents=True)
    (place / "file").write_text("old")
    if os.fork() == 0:
        os.rename, shutil.rmtree = stand_in("rename", number), stand_in("rmtree", number)
        with staged(place, replace=True) as folder:
            (folder / "file").write_text("new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
"""


def test_a_kill_at_any_call_leaves_what_comes_back(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, timeout=120)
    there = [(tmp_path / number / "mine").exists() for number in "1234"]
    assert there == [True, False, True, True]
    for number, kept in zip("1234", ("old", "old", "new", "new"), strict=True):
        place = tmp_path / number / "mine"
        bring_back(place)
        assert content(place) == kept
        assert len(list(place.parent.iterdir())) == 2
        remove_leftovers(place.parent)
        assert list(place.parent.iterdir()) == [place]
        assert content(place) == kept


STARTS = [(call, when) for call in ("os.mkdir", "os.open", "fcntl.flock") for when in ("before", "after")]


def at_the_start(monkeypatch: pytest.MonkeyPatch, call: str, when: str, act: Callable[[], object]) -> None:
    """Act once, before or after the first call of that name."""
    module, name = call.split(".")
    real, done = getattr({"os": os, "fcntl": fcntl}[module], name), []

    def stand_in(*args, **options):
        first = not done
        done.append(call)
        if first and when == "before":
            act()
        result = real(*args, **options)
        if first and when == "after":
            act()
        return result

    monkeypatch.setattr(call, stand_in)


@pytest.mark.parametrize(("call", "when"), STARTS)
def test_an_interruption_before_the_mark_leaves_nothing(call, when, place):
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        at_the_start(patch, call, when, stop)
        with pytest.raises(KeyboardInterrupt):
            replace(place)
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize(("call", "when"), STARTS)
def test_what_is_killed_before_its_mark_is_removed_by_the_next(call, when, place):
    script = "import os, sys; sys.path.append(sys.argv.pop()); from test_staging import *\n"
    script += "_, call, when, place = sys.argv\n"
    script += "at_the_start(pytest.MonkeyPatch(), call, when, lambda: os._exit(9)); replace(Path(place))"
    command = [sys.executable, "-c", script, call, when, str(place), str(Path(__file__).parent)]
    assert subprocess.run(command, timeout=120, check=False).returncode == 9
    assert len(list(place.parent.iterdir())) == (1 if (call, when) == ("os.mkdir", "before") else 2)
    remove_leftovers(place.parent)
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize(("call", "when"), STARTS)
def test_what_another_takes_for_a_leftover_is_made_again(call, when, place, monkeypatch):
    at_the_start(monkeypatch, call, when, lambda: remove_leftovers(place.parent))
    replace(place)
    assert content(place) == "new"
    assert list(place.parent.iterdir()) == [place]


def test_an_empty_folder_of_another_name_stays(place):
    names = [f".flux2-mlx-convert-{ending}" for ending in ("mine", "0" * 15, "0" * 17, "g" * 16)]
    for name in names:
        place.with_name(name).mkdir()
    place.with_name(f".flux2-mlx-convert-{'0' * 16}").symlink_to(place.with_name(names[0]))
    before = sorted(place.parent.iterdir())
    remove_leftovers(place.parent)
    assert sorted(place.parent.iterdir()) == before


@pytest.mark.parametrize("taken", ["empty folder", "folder", "file"])
def test_an_old_folder_whose_place_is_taken_is_never_removed(taken, place, caplog):
    work = place.parent / ".flux2-mlx-convert-killed"
    work.mkdir()
    values = {"made_by": "flux2-mlx convert", "target": place.name, "pid": 1, "host": ""}
    (work / "flux2-mlx-convert.json").write_text(json.dumps(values))
    place.rename(work / "old")
    (work / "new").mkdir()
    if taken == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "letter").write_text("mine") if taken == "folder" else None
    bring_back(place)
    remove_leftovers(place.parent)
    if taken == "empty folder":
        assert content(place) == "old"
        assert not work.exists()
    else:
        assert content(work / "old") == "old"
        assert "something else has taken; move it where you want it" in caplog.text


def test_a_failure_at_the_last_moment_brings_the_old_one_back(place, monkeypatch):
    real = os.rename

    def rename(source, target):
        if Path(source).name == "new":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr("os.rename", rename)
    with pytest.raises(OSError, match="No space left"):
        replace(place)
    assert content(place) == "old"
    assert list(place.parent.iterdir()) == [place]


def test_what_runs_is_let_be(place):
    with staged(place, replace=True) as folder:
        (folder / "file").write_text("new")
        place.rename(place.with_name("elsewhere"))
        remove_leftovers(place.parent)
        bring_back(place)
        assert content(folder) == "new"
    assert content(place) == "new"


@pytest.mark.parametrize(
    "mark",
    [
        None,
        b"",
        b"{",
        b"[]",
        b'{"made_by": "flux2-mlx convert"}',
        b'{"made_by": "flux2-mlx convert", "target": ["mine"]}',
        b'{"made_by": "flux2-mlx convert", "target": ""}',
        b'{"made_by": "flux2-mlx convert", "target": "../mine"}',
        b'{"made_by": "flux2-mlx convert", "target": "%2fmine"}',
        b'{"made_by": "another", "target": "mine"}',
    ],
)
def test_what_has_no_mark_of_ours_is_let_be(mark, place):
    yours = place.with_name(".flux2-mlx-convert-yours")
    for name in ("old", "new"):
        (yours / name).mkdir(parents=True)
        (yours / name / "file").write_text("yours")
    if mark is not None:
        (yours / "flux2-mlx-convert.json").write_bytes(mark)
    place.rename(place.with_name("elsewhere"))
    bring_back(place)
    remove_leftovers(place.parent)
    assert not place.exists()
    assert [content(yours / name) for name in ("old", "new")] == ["yours", "yours"]


def test_a_link_with_a_mark_is_let_be(place):
    (place / "flux2-mlx-convert.json").write_text(json.dumps({"made_by": "flux2-mlx convert", "target": "mine"}))
    (place / "old").mkdir()
    place.with_name(".flux2-mlx-convert-link").symlink_to(place)
    remove_leftovers(place.parent)
    assert (place / "old").exists()


def test_what_someone_put_beside_the_mark_stays(place):
    work = place.with_name(".flux2-mlx-convert-x")
    (work / "new").mkdir(parents=True)
    (work / "flux2-mlx-convert.json").write_text(json.dumps({"made_by": "flux2-mlx convert", "target": "mine"}))
    (work / "letter.txt").write_text("precious")
    remove_leftovers(place.parent)
    assert (work / "letter.txt").read_text() == "precious"
    assert not (work / "new").exists()


def test_odd_names_come_back(place):
    odd = place.with_name("".join(map(chr, range(1, 47))) + " %41 ä🦊")
    place.rename(odd)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 2, 1000, "before")
        with pytest.raises(KeyboardInterrupt):
            replace(odd)
    assert not odd.exists()
    bring_back(odd)
    assert content(odd) == "old"


def test_names_that_are_none_are_no_trouble(tmp_path):
    for place in (Path("a\0b"), tmp_path / "no" / "parent", tmp_path / ("x" * 999), Path(), Path("/")):
        bring_back(place)
    (tmp_path / "loop").symlink_to("loop")
    bring_back(tmp_path / "loop")


def test_what_can_not_be_put_back_is_told(place, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 2, 1000, "before")
        with pytest.raises(KeyboardInterrupt):
            replace(place)

    def rename(source, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.rename", rename)
    with pytest.raises(InputError, match=r"can't put .*/old back to .*mine: Read-only file system; move it yourself"):
        bring_back(place)
