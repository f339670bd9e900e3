"""The one reader of safetensors headers and JSON files, compared with the safetensors library and with MLX."""

import json
import os
import random
import struct
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flux2_mlx.errors import CheckpointError
from flux2_mlx.json_files import read_json
from flux2_mlx.weights import Files, Renamed, TensorInfo, evaluated, part, read_header

X = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
FIELDS = b'"dtype":"F32","shape":[1],"data_offsets":[0,4]'


def file_of(header: object, data: bytes = bytes(4)) -> bytes:
    """A safetensors file; `header` is JSON already or becomes it."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def placed(first: int, last: int, **changes: object) -> dict[str, object]:
    return {**X, "data_offsets": [first, last], **changes}


# Whether the library takes a file and whether we do. Where these differ, the format forbids it or MLX can't read it.
FILES: dict[str, tuple[bytes, bool, bool]] = {
    "one tensor": (file_of({"x": X}), True, True),
    "nothing": (file_of({}, b""), True, True),
    "a scalar": (file_of({"x": {**X, "shape": []}}), True, True),
    "no elements": (file_of({"y": placed(4, 4, shape=[3, 0]), "x": X}), True, True),
    "another order": (file_of({"y": placed(4, 8), "x": X}, bytes(8)), True, True),
    "padding": (file_of(json.dumps({"x": X}).encode() + b" \n "), True, True),
    "metadata": (file_of({"__metadata__": {"a": "b"}, "x": X}), True, True),
    "no metadata": (file_of({"__metadata__": None, "x": X}), True, True),
    "one more field": (file_of({"x": {**X, "note": 1.5}}), True, True),
    "a hole": (file_of({"x": placed(4, 8)}, bytes(8)), False, False),
    "a hole between": (file_of({"x": X, "y": placed(8, 12)}, bytes(12)), False, False),
    "an overlap": (file_of({"x": X, "y": placed(2, 6)}, bytes(6)), False, False),
    "the same place": (file_of({"x": X, "y": X}), False, False),
    "a rest": (file_of({"x": X}, bytes(8)), False, False),
    "cut short": (file_of({"x": X}, bytes(3)), False, False),
    "backwards": (file_of({"x": placed(4, 0)}), False, False),
    "no elements elsewhere": (file_of({"y": placed(8, 8, shape=[0]), "x": X}), False, False),
    "negative": (file_of({"x": placed(-4, 0)}), False, False),
    "a negative shape": (file_of({"x": {**X, "shape": [-1, -1]}}), False, False),
    "a shape of floats": (file_of({"x": {**X, "shape": [1.0]}}), False, False),
    "a shape of truth": (file_of({"x": {**X, "shape": [True]}}), False, False),
    "a shape without end": (file_of({"x": placed(0, 0, shape=[2**64, 0])}, b""), False, False),
    "an overflowing shape": (file_of({"x": placed(0, 0, shape=[2**62, 2**62, 0])}, b""), False, False),
    "another size": (file_of({"x": {**X, "shape": [2]}}), False, False),
    "three offsets": (file_of({"x": {**X, "data_offsets": [0, 4, 4]}}), False, False),
    "no offsets": (file_of({"x": {"dtype": "F32", "shape": [1]}}), False, False),
    "a dtype of no one": (file_of({"x": {**X, "dtype": "F33"}}), False, False),
    "a dtype in a list": (file_of({"x": {**X, "dtype": ["F32"]}}), False, False),
    "an entry of text": (file_of({"x": "F32"}), False, False),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}, "x": X}), False, False),
    "metadata in a list": (file_of({"__metadata__": [], "x": X}), False, False),
    "metadata twice": (file_of(b'{"__metadata__":{},"__metadata__":{},"x":{%s}}' % FIELDS), False, False),
    "a field twice": (file_of(b'{"x":{"dtype":"F32",%s}}' % FIELDS), False, False),
    "UTF-16": (file_of(json.dumps({"x": X}).encode("utf-16")), False, False),
    "UTF-16 without mark": (file_of(json.dumps({"x": X}).encode("utf-16-le")), False, False),
    "UTF-32": (file_of(json.dumps({"x": X}).encode("utf-32")), False, False),
    "a byte order mark": (file_of(b"\xef\xbb\xbf" + json.dumps({"x": X}).encode()), False, False),
    "Latin-1": (file_of(b'{"\xe4":{%s}}' % FIELDS), False, False),
    "half a surrogate pair": (file_of(b'{"\\ud800":{%s}}' % FIELDS), False, False),
    "half of one in a field": (file_of(b'{"x":{%s,"a":"\\udfff"}}' % FIELDS), False, False),
    "NaN": (file_of(b'{"x":{%s,"a":NaN}}' % FIELDS), False, False),
    "infinity": (file_of(b'{"x":{%s,"a":-Infinity}}' % FIELDS), False, False),
    "a number too large": (file_of(b'{"x":{%s,"a":1e999}}' % FIELDS), False, False),
    "a NUL behind": (file_of(json.dumps({"x": X}).encode() + b"\0"), False, False),
    "deep": (file_of(b'{"x":' + b"[" * 99_999 + b"]" * 99_999 + b"}"), False, False),
    "a list": (file_of(b"[]"), False, False),
    "a name twice": (file_of(b'{"x":{%s},"x":{%s}}' % (FIELDS, FIELDS)), True, False),
    "space before": (file_of(b" " + json.dumps({"x": X}).encode()), True, False),
    "fields in a list": (file_of({"x": ["F32", [1], [0, 4]]}), True, False),
    "more than 32 bits": (file_of({"x": placed(0, 0, shape=[2**32, 0])}, b""), True, False),
    "F64": (file_of({"x": placed(0, 8, dtype="F64")}, bytes(8)), True, True),
    "F8_E5M2": (file_of({"x": placed(0, 1, dtype="F8_E5M2")}, bytes(1)), True, True),
    "F4": (file_of({"x": placed(0, 1, dtype="F4", shape=[2])}, bytes(1)), True, False),
}


def library_takes(path: Path) -> bool:
    try:
        with safe_open(path, "np") as file:
            file.keys()
    except SafetensorError:
        return False
    return True


def we_take(path: Path) -> bool:
    """The same of our reader; what it takes MLX must read, and as it was stated."""
    try:
        tensors = read_header(path)
    except CheckpointError:
        return False
    arrays = evaluated(Files([path]).read(tensors))
    assert [array.shape for array in arrays] == [tensor.shape for tensor in tensors.values()]
    return True


@pytest.mark.parametrize("case", FILES)
def test_headers(case, tmp_path):
    data, library, ours = FILES[case]
    (tmp_path / "x.safetensors").write_bytes(data)
    assert library_takes(tmp_path / "x.safetensors") == library
    assert we_take(tmp_path / "x.safetensors") == ours


def test_every_dtype_that_is_taken_is_read(tmp_path):
    for dtype, size in {
        "F64": 8,
        "F8_E5M2": 1,
        "C64": 8,
        "I64": 8,
        "U32": 4,
        "BF16": 2,
        "I8": 1,
        "BOOL": 1,
        "F8_E4M3": 1,
        "F8_E8M0": 1,
    }.items():
        (tmp_path / dtype).write_bytes(file_of({"x": placed(0, 3 * size, dtype=dtype, shape=[3])}, bytes(3 * size)))
        assert library_takes(tmp_path / dtype)
        assert we_take(tmp_path / dtype)


def test_no_mutated_header_is_taken_that_the_library_refuses(tmp_path):
    """A few hundred bytes changed at random: never more than the library takes, and no error of another kind."""
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.uint32), "c": np.zeros((), np.float16)}
    whole, chance, path = save(tensors, {"format": "mlx"}), random.Random(0), tmp_path / "x.safetensors"
    outcomes = set()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 1, 2))):
            data[chance.randrange(len(data) - 46)] = chance.choice((chance.randrange(256), *b'0123456789,:[]{}"'))
        path.write_bytes(data)
        outcomes.add((library_takes(path), we_take(path)))
    assert (False, True) not in outcomes
    assert {(False, False), (True, True)} <= outcomes


def test_a_header_of_more_tensors_than_any_model_has_is_not_parsed(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(b"{" + b'"data_offsets" ' * 100_001))
    with pytest.raises(CheckpointError, match="it lists 100,001 tensors, of which at most 100,000 are read"):
        read_header(path)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    (tmp_path / "x").write_bytes(file_of({"y": placed(4, 8), "x": X}, bytes(8)))
    assert list(read_header(tmp_path / "x").items()) == [("x", TensorInfo("F32", (1,))), ("y", TensorInfo("F32", (1,)))]


@pytest.mark.parametrize("read", [read_header, read_json])
def test_what_is_no_file_is_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    failures: list[str] = []

    def attempt() -> None:
        for name in ("fifo", "link", "loop", ".", "a\0b"):
            with pytest.raises(CheckpointError, match="can't read ") as caught:
                read(tmp_path / name)
            failures.append(str(caught.value))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(60)
    assert len(failures) == 5
    assert failures[0] == f"can't read {tmp_path}/fifo: it is a named pipe; give a file"
    assert not any("\n" in failure or "\0" in failure for failure in failures)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": NaN}',
        b'{"a": [Infinity]}',
        b'{"a": -1e999}',
        b'{"a": "\\ud800"}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": 1}'.encode("utf-16"),
        '{"a": 1}'.encode("utf-32-le"),
        b'{"a": ' + b"[" * 99_999,
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_only_python_takes_for_json(data, tmp_path):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON: ") as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_json(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "\\ud83e\\udd8a", "b": 1e-6, "c": 1000000000000000019884624838656}')
    assert read_json(tmp_path / "config.json") == {"a": "🦊", "b": 1e-6, "c": 1000000000000000019884624838656}


def test_json_without_end_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10_000_001)
    with pytest.raises(CheckpointError, match="has more than 10000000 bytes, so it is no part of a model"):
        read_json(tmp_path / "config.json")


def test_a_file_that_goes_away_after_it_was_looked_at(tmp_path):
    mx.save_safetensors(str(tmp_path / "gone.safetensors"), {"x": mx.zeros(1)})
    tensors = Files([tmp_path / "gone.safetensors"])
    assert list(tensors.infos) == ["x"]
    (tmp_path / "gone.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"can't read .*gone\.safetensors: "):
        next(tensors.read(["x"]))


# Of each dtype, in a file that MLX reads and in one that it refuses.
ARRAYS = {
    "BF16": mx.array([[1.5, -2.0], [0.0, 3e38]], mx.bfloat16),
    "F16": mx.array(0.1, mx.float16),
    "F32": mx.zeros((2, 0, 3)),
    "I8": mx.array([-128, 127], mx.int8),
    "I64": mx.array([-(2**62)], mx.int64),
    "U32": mx.array([2**32 - 1], mx.uint32),
    "BOOL": mx.array([True, False]),
    "C64": mx.array([1 + 2j], mx.complex64),
    "U8": mx.arange(256, dtype=mx.uint8).reshape(2, 128),
}


def with_f8_e5m2(path: Path) -> Path:
    """The same file with a tensor before all others and one behind, of a dtype that MLX does not know."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    places = {name: [place + 3 for place in entry["data_offsets"]] for name, entry in header.items() if "_" not in name}
    end = len(data) - 8 - length + 3
    header |= {name: {**header[name], "data_offsets": place} for name, place in places.items()}
    header |= {"e5m2": placed(0, 3, dtype="F8_E5M2", shape=[3]), "f64": placed(end, end + 8, dtype="F64", shape=[])}
    data = bytes([1, 128, 255]) + data[8 + length :] + struct.pack("<d", 0.1)
    path.with_suffix(".raw").write_bytes(file_of(header, data))
    return path.with_suffix(".raw")


@pytest.fixture
def refused_by_mlx(tmp_path):
    mx.save_safetensors(str(tmp_path / "x.safetensors"), ARRAYS, {"format": "mlx"})
    path = with_f8_e5m2(tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError):
        mx.load(str(path), format="safetensors")
    return path


def test_a_file_that_mlx_refuses_is_read(refused_by_mlx):
    tensors = Files([refused_by_mlx])
    names = [*ARRAYS, "e5m2", "f64"]
    read = dict(zip(names, evaluated(tensors.read(names)), strict=True))
    for name, array in ARRAYS.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert mx.array_equal(read[name].flatten().view(mx.uint8), array.flatten().view(mx.uint8))
        assert tensors.infos[name] == TensorInfo(name, array.shape)
    assert (read["e5m2"].dtype, read["e5m2"].tolist()) == (mx.uint8, [1, 128, 255])
    assert (read["f64"].dtype, read["f64"].shape, np.array(read["f64"]).item()) == (mx.float64, (), 0.1)


def test_of_a_file_that_mlx_refuses_one_tensor_at_a_time_is_in_memory(tmp_path):
    arrays = {str(number): mx.zeros((2**18,)) for number in range(8)}
    mx.save_safetensors(str(tmp_path / "x.safetensors"), arrays)
    tensors = Files([with_f8_e5m2(tmp_path / "x.safetensors")])
    del arrays
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for array in evaluated(tensors.read(tensors.infos)):
        del array
    assert mx.get_peak_memory() - before <= 2.1 * 2**20


def test_a_file_that_is_cut_short_after_it_was_looked_at(refused_by_mlx):
    tensors = Files([refused_by_mlx])
    assert len(tensors.infos) == len(ARRAYS) + 2
    with refused_by_mlx.open("rb+") as file:
        file.truncate(refused_by_mlx.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"x\.raw was changed while it was read"):
        next(tensors.read(["e5m2"]))
    refused_by_mlx.unlink()
    with pytest.raises(CheckpointError, match=r"can't read .*x\.raw: "):
        next(tensors.read(["e5m2"]))


def test_metadata_of_files(tmp_path):
    for name, texts in {"1": {"format": "pt", "a": "1"}, "2": {"format": "pt", "a": "2", "b": ""}, "3": None}.items():
        (tmp_path / name).write_bytes(file_of({"__metadata__": texts, name: X}))
    assert Files([tmp_path / "1"]).metadata == {"format": "pt", "a": "1"}
    assert Files(tmp_path / name for name in "123").metadata == {"format": "pt", "a": "1\n2", "b": ""}


@pytest.fixture
def two_files(tmp_path):
    """Tensors of which each is its number, and the door to them."""
    mx.save_safetensors(str(tmp_path / "1.safetensors"), {"a.0.x": mx.array([0]), "a.0.y": mx.array([1])})
    mx.save_safetensors(str(tmp_path / "2.safetensors"), {"a.1.x": mx.array([2]), "a.10.x": mx.array([3])})
    return Files([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


def test_tensors_come_in_the_order_that_they_are_asked_for_in(two_files):
    names = ["a.10.x", "a.0.y", "a.1.x", "a.0.x"]
    for _ in range(2):
        assert [array.item() for array in two_files.read(names)] == [3, 1, 2, 0]
    assert [array.item() for array in two_files.read(["a.1.x"])] == [2]
    assert {tensor.shape for tensor in two_files.infos.values()} == {(1,)}


def test_tensors_under_other_names(two_files):
    assert [sorted(part(two_files, prefix).infos) for prefix in ("a.0.", "a.1.")] == [["x", "y"], ["x"]]
    assert [array.item() for array in part(two_files, "a.0.").read(["y", "x"])] == [1, 0]
    renamed = Renamed(part(two_files, "a."), {"first": "0.x", "last": "10.x"})
    assert [array.item() for array in renamed.read(renamed.infos)] == [0, 3]


def test_what_was_read_is_not_kept(tmp_path):
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {str(number): mx.zeros((2**18,)) for number in range(8)})
    tensors = Files([tmp_path / "x.safetensors"])
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for array in evaluated(tensors.read(tensors.infos)):
        del array
    assert mx.get_peak_memory() - before <= 2.1 * 2**20
    assert mx.get_active_memory() - before < 2**20


def test_a_pointer_in_place_of_the_file_is_told(tmp_path):
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n")
    with pytest.raises(CheckpointError, match="it is a Git LFS pointer; fetch the file itself with `git lfs pull`"):
        read_header(tmp_path / "a.safetensors")


CUT = "its download was cut short; fetch it again"
STARTS = {
    b"": f"it has 0 bytes, so {CUT}",
    b"1234567": f"it has 7 bytes, so {CUT}",
    struct.pack("<Q", 640) + b'{"a": ': f"its header has 640 bytes, of which 6 are there: {CUT}",
    struct.pack("<Q", 2**40) + b"{": "its header has 1,099,511,627,776 bytes, of which at most 100,000,000 are read",
    bytes(16): "the header does not begin with {; fetch the file again",
    b"PK\3\4" + bytes(30): "it is a zip, in which a pickle may lie, which could run code; fetch it as .safetensors",
    b"\x80\2}q\0.": "it is a pickle, which could run code; fetch it as .safetensors",
    b"GGUF\3\0\0\0" + bytes(20): "it is a GGUF file; give it a name that ends in .gguf",
    b"\n<!DOCTYPE html>": "it is a web page; fetch the file itself, signed in if its repo asks for that",
    b"<html>": "it is a web page; fetch the file itself, signed in if its repo asks for that",
}


@pytest.mark.parametrize("data", STARTS, ids=lambda data: repr(data[:12]))
def test_what_else_a_file_is_or_where_it_was_cut_is_told(data, tmp_path):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "a")
    assert str(caught.value) == f"{tmp_path}/a is not a safetensors file: {STARTS[data]}"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"[" * 99_999, "it is nested too deep"),
        (b"1" * 5000, "a number has 5,000 digits, of which at most 640 are read"),
        (b'"\\ud800"', "\\ud800 is half a character"),
        (b'"\xff"', "it is no text in UTF-8 from byte 6 on"),
    ],
    ids=lambda value: repr(value[:9]),
)
def test_json_is_refused_without_words_of_python(value, reason, tmp_path):
    data = b'{"a":' + value + b"}"
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "a")
    assert str(caught.value) == f"{tmp_path}/a is not JSON: {reason}"
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(data)) + data)
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "a")
    assert str(caught.value) == f"{tmp_path}/a is not a safetensors file: its header is no valid JSON: {reason}"
