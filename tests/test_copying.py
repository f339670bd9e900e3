"""What is written as it was read: whole, hashed, and looked at piece by piece."""

import hashlib
import os
from pathlib import Path

import mlx.core as mx
import pytest
from flux2_mlx.convert import rules

from flux2_mlx import copying
from flux2_mlx.copying import Copied, FileVersion, Hashed, Range, new_buffers
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import Files, TensorInfo, write_safetensors

DATA = bytes(range(256)) * 5


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(copying, "_PIECE", 96)
    monkeypatch.setattr(copying, "_WRITE", 40)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def range_in(path: Path, start: int, nbytes: int) -> Range:
    with path.open("rb") as opened:
        return Range(FileVersion.of(path, opened), start, nbytes)


def test_ranges_and_memory_go_into_a_file_and_are_hashed(file, tmp_path):
    upper, lower = range_in(file, 100, 1000).halves
    parts = [b"start", DATA[600:1100] + DATA[100:600], DATA, b""]
    seen = []
    with Hashed.new(tmp_path / "made") as hashed:
        digests = [hashed.write(parts[0])]
        digests.append(hashed.copy(Copied((lower, upper), lambda piece: seen.append(bytes(piece)))))
        digests.append(hashed.write(memoryview(DATA)))
        digests.append(hashed.copy(Copied((range_in(file, 7, 0),))))
    assert (tmp_path / "made").read_bytes() == b"".join(parts)
    assert [digest.result() for digest in digests] == [hashlib.sha256(part).hexdigest() for part in parts]
    assert hashed.sha256 == hashlib.sha256(b"".join(parts)).hexdigest()
    assert b"".join(seen) == parts[1]


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(DATA[::-1])
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(DATA + b"x"),
        lambda path: os.utime(path, ns=(0, 5)),  # as when something is written into it
        replaced,
    ],
    ids=["longer", "written", "replaced by another of its size and time"],
)
def test_a_file_that_changes_is_refused(change, file):
    whole = range_in(file, 0, len(DATA))
    whole.file.check()
    change(file)
    with pytest.raises(CheckpointError, match=f"{file} was changed while it was read; try again"):
        list(Copied((whole,)).pieces(new_buffers()))
    with pytest.raises(CheckpointError, match=f"{file} was changed while it was read; try again"):
        whole.file.check()


def test_a_file_that_becomes_shorter_is_refused(file):
    whole = range_in(file, 0, len(DATA))
    pieces = Copied((whole,)).pieces(new_buffers())
    next(pieces)
    file.write_bytes(DATA[:150])
    with pytest.raises(CheckpointError, match=f"{file} became shorter while it was read"):
        list(pieces)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"can't read {file}: No such file"):
        whole.file.check()


def test_rules_that_move_bytes_give_the_same_as_with_arrays(tmp_path):
    arrays = {name: mx.random.normal((6, 40), key=mx.random.key(i)).astype(mx.bfloat16) for i, name in enumerate("qkv")}
    infos = {name: TensorInfo("BF16", array.shape) for name, array in arrays.items()}
    write_safetensors(tmp_path / "source", infos, arrays.values(), {}, lambda count: None)
    files = Files([tmp_path / "source"])
    made = {
        "copied": rules.copy("k"),
        "joined": rules.join_rows("q", "k", "v"),
        "swapped": rules.swap_halves("v"),
    }
    expected = {name: rule.apply(*(arrays[x] for x in rule.sources)) for name, rule in made.items()}
    infos = {name: TensorInfo("BF16", array.shape) for name, array in expected.items()}
    copied = rules.copied(made, made, files.range_of, "{} is not finite".format)
    assert copied.keys() == made.keys()
    whole = [
        write_safetensors(tmp_path / name, infos, contents, {"a": "b"}, lambda count: None)
        for name, contents in (("computed", expected.values()), ("copied", copied.values()))
    ]
    assert whole[0] == whole[1]
    assert (tmp_path / "computed").read_bytes() == (tmp_path / "copied").read_bytes()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_copied_has_to_be_finite(value, tmp_path):
    array = mx.zeros((4, 60), mx.bfloat16)
    array[3, 59] = float(value)
    info = {"a": TensorInfo("BF16", array.shape)}
    write_safetensors(tmp_path / "source", info, [array], {}, lambda count: None)
    place = Files([tmp_path / "source"]).range_of
    one = rules.copied(info, {"a": rules.copy("a")}, place, "{} is not finite".format)["a"]
    with pytest.raises(CheckpointError, match="a is not finite"):
        list(one.pieces(new_buffers()))


def test_what_is_computed_is_not_copied(file):
    made = {"kernel": rules.channels_last("a"), "elsewhere": rules.copy("b")}
    place = {"a": range_in(file, 0, 2), "b": None}.get
    assert rules.copied(made, made, place, str) == {}


def test_much_is_brought_to_the_disk_meanwhile_and_a_failure_is_told(file, tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "_SYNC", 200)
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:  # a system tells it once, and later calls know nothing of it
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"), Hashed.new(tmp_path / "made") as hashed:
        hashed.copy(Copied((range_in(file, 0, 250),)))
    assert len(calls) == 2
