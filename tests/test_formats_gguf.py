"""GGUF files, compared with what the `gguf` library wrote into them and reads out of them."""

import re
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import gguf as library
import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.dialects import unpermute
from flux2_mlx.convert.formats import blocks as block_types
from flux2_mlx.convert.formats import gguf
from flux2_mlx.convert.formats.gguf import Gguf, split_files

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo

Type = library.GGMLQuantizationType
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")  # the library can quantize these
GIVEN = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
GIVEN += ("IQ4_NL", "IQ4_XS")
NAME = "double_blocks.0.img_attn.qkv.weight"


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def blocks(kind: str, rows: int, values: int) -> np.ndarray:
    """Rows of random bytes of a type, none of whose scales is infinite, no number, or such that no weight has it."""
    per, nbytes = library.GGML_QUANT_SIZES[Type[kind]]
    found = np.random.default_rng(0).integers(0, 256, (4 * rows * values // per, nbytes), np.uint8)
    with np.errstate(all="ignore"):
        finite = (np.abs(library.quants.dequantize(found, Type[kind])) <= 2**20).all(1)
    return found[finite][: rows * values // per].reshape(rows, -1)


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]], arch: str = "flux", **options) -> Path:
    """A file by the library, of `tensors` as the bytes of a type."""
    writer = library.GGUFWriter(path, arch, **options)
    writer.add_name("FLUX.2 klein 4B")
    writer.add_token_list(["a", "b\n", "\N{GRINNING FACE}"])
    writer.add_float32("x.y", 0.5)
    for name, (kind, array) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bits(array: mx.array | np.ndarray) -> np.ndarray:
    return np.asarray(array).view(np.uint32)


def read(path: Path, name: str = NAME) -> mx.array:
    (array,) = Gguf([path]).read([name])
    return array


@contextmanager
def allocating() -> Iterator[Callable[[], int]]:
    """Gives what tells, afterwards, the most bytes that Python and NumPy held inside."""
    peak = 0
    tracemalloc.start()
    try:
        yield lambda: peak
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [*WRITTEN, *GIVEN])
def test_quantized_weights_are_those_of_the_library(kind, any_size, tmp_path):
    stored = library.quants.quantize(random(6, 512), Type[kind]) if kind in WRITTEN else blocks(kind, 6, 512)
    path = write(tmp_path / "a.gguf", {NAME: (kind, stored)})
    (tensor,) = library.GGUFReader(path).tensors
    expected = library.quants.dequantize(tensor.data, tensor.tensor_type)
    assert Gguf([path]).infos == {NAME: TensorInfo("F32", (6, 512))}
    assert Gguf([path]).kinds == {NAME: kind}
    array = read(path)
    assert (array.dtype, array.shape) == (mx.float32, (6, 512))
    np.testing.assert_array_equal(bits(array), bits(expected))


def test_every_type_of_the_library_is_read_or_refused():
    unread = set(Type.__members__) - {kind.name for kind in block_types.kinds().values()}
    assert unread == {"Q8_1", "Q8_K", "Q1_0", "F64", "NVFP4"}
    assert {kind.name for kind in block_types.kinds().values()} == {*WRITTEN, *GIVEN, *block_types.PLAIN}


def half(data: bytes) -> float:
    return struct.unpack("<e", data)[0]


def q8_0(block: bytes) -> list[float]:
    return [half(block[:2]) * x for x in struct.unpack("32b", block[2:])]


def q4_0(block: bytes) -> list[float]:
    return [half(block[:2]) * ((block[2 + i % 16] >> 4 * (i // 16) & 15) - 8) for i in range(32)]


def q4_k(block: bytes) -> list[float]:
    """256 values: eight groups of 32 with a scale and a minimum of 6 bits each, packed as llama.cpp packs them."""
    scales, values = block[4:16], []
    for group in range(8):
        if group < 4:
            scale, least = scales[group] & 63, scales[group + 4] & 63
        else:
            low = scales[group + 4]
            scale, least = low & 15 | scales[group - 4] >> 6 << 4, low >> 4 | scales[group] >> 6 << 4
        nibbles = [x >> 4 * (group % 2) & 15 for x in block[16 + group // 2 * 32 :][:32]]
        values += [half(block[:2]) * scale * x - half(block[2:4]) * least for x in nibbles]
    return values


@pytest.mark.parametrize("define", [q8_0, q4_0, q4_k])
def test_blocks_by_their_definition(define: Callable[[bytes], list[float]], any_size, tmp_path):
    kind = define.__name__.upper()
    stored = blocks(kind, 4, 256)
    nbytes = library.GGML_QUANT_SIZES[Type[kind]][1]
    expected = [x for block in stored.reshape(-1, nbytes) for x in define(block.tobytes())]
    array = read(write(tmp_path / "a.gguf", {NAME: (kind, stored)}))
    np.testing.assert_array_equal(np.asarray(array).reshape(-1), np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", np.float32), ("F16", np.float16), ("I8", np.int8), ("I64", np.int64)]
)
@pytest.mark.parametrize("shape", [(3,), (1, 5), (2, 3, 1, 2)])
def test_plain_tensors_stay_as_they_are(kind, dtype, shape, tmp_path):
    values = (10 * random(*shape)).astype(dtype)
    path = write(tmp_path / "a.gguf", {NAME: (kind, values)})
    assert Gguf([path]).infos == {NAME: TensorInfo(kind, shape)}
    assert np.asarray(read(path)).dtype == dtype
    np.testing.assert_array_equal(np.asarray(read(path)), values)


def test_bfloat16_stays_as_it_is(tmp_path):
    values = mx.array(random(4, 8)).astype(mx.bfloat16)
    stored = np.asarray(values.view(mx.uint16)).view(np.uint8)
    path = write(tmp_path / "a.gguf", {NAME: ("BF16", stored)})
    assert Gguf([path]).infos == {NAME: TensorInfo("BF16", (4, 8))}
    assert read(path).dtype == mx.bfloat16
    assert mx.array_equal(read(path), values)


@pytest.mark.parametrize("kind", ["Q5_K", "F16"])
def test_large_tensors_are_read_in_pieces_and_little_memory(kind, any_size, tmp_path, monkeypatch):
    for name, value in {"_JOB": 2**15, "_STEP": 2**12, "_THREADS": 2}.items():
        monkeypatch.setattr(block_types, name, value)
    stored = blocks(kind, 300, 4096) if kind == "Q5_K" else random(300, 4096).astype(np.float16)
    path = write(tmp_path / "a.gguf", {"a": ("F32", random(3)), NAME: (kind, stored)})
    tensors = Gguf([path])
    with allocating() as peak:
        (array,) = tensors.read([NAME])
    expected = library.quants.dequantize(stored, Type[kind]) if kind == "Q5_K" else stored
    assert np.array_equal(np.asarray(array), expected)
    assert peak() < array.nbytes / 8


def test_tensors_come_as_they_are_asked_for(tmp_path):
    tensors = Gguf([write(tmp_path / "a.gguf", {x: ("F32", np.full(3, i, np.float32)) for i, x in enumerate("abc")})])
    assert list(tensors.infos) == ["a", "b", "c"]
    assert [array[0].item() for array in tensors.read(["c", "a"])] == [2, 0]


def test_metadata(tmp_path):
    metadata = Gguf([write(tmp_path / "a.gguf", {})]).metadata
    assert metadata == {
        "general.architecture": "flux",
        "general.name": "FLUX.2 klein 4B",
        "tokenizer.ggml.tokens": "3",
        "x.y": "0.5",
    }


def test_rows_of_mistral_come_back_in_their_order():
    def permute(weights: np.ndarray, heads: int) -> np.ndarray:  # as llama.cpp does when it converts
        return weights.reshape(heads, 2, len(weights) // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)

    original = random(3 * 128, 5)
    stored = permute(original, 3)
    assert not np.array_equal(stored, original)
    assert np.array_equal(unpermute(NAME, 128).apply(mx.array(stored)), original)
    assert np.array_equal(stored.reshape(3, 64, 2, -1).swapaxes(1, 2).reshape(original.shape), original)
    assert np.array_equal(stored[2 * 7 + 1], original[7 + 64])


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    tensors = {name: ("F32", random(4)) for name in "abcde"}
    write(tmp_path / "a.gguf", tensors, split_max_tensors=2)
    return sorted(tmp_path.glob("*.gguf"))


def test_split_files_are_one_model(parts):
    assert [path.name for path in parts] == [f"a-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for path in parts:
        assert split_files(path) == parts
    tensors = Gguf(parts)
    assert (list(tensors.infos), tensors.metadata["general.architecture"]) == (list("abcde"), "flux")
    assert all(np.array_equal(array, random(4)) for array in tensors.read("abcde"))


def test_a_file_alone(tmp_path):
    assert split_files(tmp_path / "a.gguf") == [tmp_path / "a.gguf"]


def test_split_files_that_are_not_a_set(parts):
    with refused("00001-of-00003.gguf is number 0 of 3 files, counted from 0, where 0 of 1 is due"):
        Gguf(parts[:1])
    with refused("where 0 of 3 is due"):
        Gguf(parts[::-1])
    parts[1].unlink()
    with refused("of which some are missing: a-00002-of-00003.gguf"):
        split_files(parts[0])


@pytest.mark.parametrize("name", ["a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-00001-of-99999.gguf"])
def test_split_files_with_odd_numbers(name, tmp_path):
    with refused("of no set of files"):
        split_files(tmp_path / name)


def test_files_that_repeat_or_lack_tensors(tmp_path):
    def part(number: int, name: str, total: int) -> Path:
        counts = text("split.no") + pack("IH", 2, number) + text("split.count") + pack("IH", 2, 2)
        counts += text("split.tensors.count") + pack("II", 4, total)
        return save(tmp_path / f"{number}.gguf", entries=(counts, 3), tensors=(entry(name), 1))

    with refused("1.gguf repeats tensors of another file: a"):
        Gguf([part(0, "a", 2), part(1, "a", 2)])
    with refused("0.gguf is of a model of 3 tensors, of which 2 are there"):
        Gguf([part(0, "a", 3), part(1, "b", 3)])


def refused(message: str):
    """Inside, a CheckpointError of one line is raised that has `message` in it."""
    return pytest.raises(CheckpointError, match=rf"\A[^\n]*{re.escape(message)}[^\n]*\Z")


def pack(codes: str, *values) -> bytes:
    return struct.pack("<" + codes, *values)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return pack("Q", len(data)) + data


def entry(name: str | bytes = "a", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    """How a header describes a tensor; by default of 8 values in float32, which are the first."""
    return text(name) + pack(f"I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def save(
    path: Path,
    start: bytes = b"GGUF" + pack("I", 3),
    entries: tuple[bytes, int] = (b"", 0),
    tensors: tuple[bytes, int] = (entry(), 1),
    payload: bytes = bytes(32),
    alignment: int = 32,
) -> Path:
    """A file of bytes and of what it says how many of them there are."""
    header = start + pack("QQ", tensors[1], entries[1]) + entries[0] + tensors[0]
    path.write_bytes(header + bytes(-len(header) % alignment) + payload)
    return path


HUGE = 2**63
KEY = text("k")
BROKEN = {
    "nothing": ({"start": b"", "tensors": (b"", 0), "payload": b""}, "it begins with"),
    "magic": ({"start": b"GGML" + pack("I", 3)}, "it begins with b'GGML'"),
    "pointer": ({"start": b"version https://git-lfs"}, "it is a Git LFS pointer"),
    "version 1": ({"start": b"GGUF" + pack("I", 1)}, "it is of version 1; give a little-endian one of version 3"),
    "version 0": ({"start": b"GGUF" + pack("I", 0)}, "it is of version 0;"),
    "big-endian": ({"start": b"GGUF" + struct.pack(">I", 3)}, "it is big-endian"),
    "tensors": ({"tensors": (entry(), HUGE)}, f"speaks of {HUGE} items, more than a model has"),
    "more tensors": ({"tensors": (entry(), 2)}, "in its header can't be a name"),
    "too many tensors": ({"tensors": (entry(), 2**16 + 1)}, "speaks of 65537 items"),
    "entries": ({"entries": (b"", HUGE)}, f"speaks of {HUGE} items"),
    "long key": ({"entries": (pack("Q", HUGE), 1)}, "in the middle of its header"),
    "empty key": ({"entries": (text(""), 1)}, "'' in its header can't be a name"),
    "key twice": ({"entries": ((KEY + pack("IB", 0, 1)) * 2, 2)}, "its metadata has 'k' twice"),
    "type of a value": ({"entries": (KEY + pack("I", 13), 1)}, "a value of the unknown type 13"),
    "long text": ({"entries": (KEY + pack("IQ", 8, HUGE), 1)}, "in the middle of its header"),
    "text not UTF-8": ({"entries": (KEY + pack("I", 8) + text(b"\xff"), 1)}, "it is no text in UTF-8 from byte 0 on"),
    "array of arrays": ({"entries": (KEY + pack("IIQ", 9, 9, 1), 1)}, "a value of the unknown type 9"),
    "long array": ({"entries": (KEY + pack("IIQ", 9, 12, HUGE), 1)}, "in the middle of its header"),
    "many texts": ({"entries": (KEY + pack("IIQ", 9, 8, HUGE), 1)}, f"speaks of {HUGE} items"),
    "long text of many": ({"entries": (KEY + pack("IIQQ", 9, 8, 1, HUGE), 1)}, "in the middle of its header"),
    "alignment 0": ({"entries": (text("general.alignment") + pack("II", 4, 0), 1)}, "general.alignment is 0"),
    "alignment 48": ({"entries": (text("general.alignment") + pack("II", 4, 48), 1)}, "general.alignment is 48"),
    "alignment 1.0": ({"entries": (text("general.alignment") + pack("If", 6, 1), 1)}, "general.alignment is 1.0"),
    "great alignment": ({"entries": (text("general.alignment") + pack("IQ", 10, HUGE), 1)}, "general.alignment is 92"),
    "long name": ({"tensors": (pack("Q", HUGE), 1)}, "in the middle of its header"),
    "name too long": ({"tensors": (entry("é" * 256), 1)}, "in its header can't be a name"),
    "name with a NUL": ({"tensors": (entry("a\0b"), 1)}, r"'a\x00b' in its header can't be a name"),
    "name of two lines": ({"tensors": (entry("a\nb"), 1)}, r"'a\nb' in its header can't be a name"),
    "name not UTF-8": ({"tensors": (entry(b"a\xff"), 1)}, "in its header can't be a name"),
    "name twice": ({"tensors": (entry() + entry(offset=32), 2), "payload": bytes(64)}, "it has 'a' twice"),
    "dimensions": ({"tensors": (entry(shape=(1, 1, 1, 1, 8)), 1)}, "'a' has 5 dimensions, more than 4"),
    "many dimensions": ({"tensors": (text("a") + pack("I", 2**32 - 1), 1)}, "'a' has 4294967295 dimensions"),
    "no values": ({"tensors": (entry(shape=(0, 8)), 1)}, "'a' is F32 of the impossible shape [8, 0]"),
    "negative": ({"tensors": (entry(shape=(2**64 - 8,)), 1)}, f"the impossible shape [{2**64 - 8}]"),
    "large": ({"tensors": (entry(shape=(2**31,)), 1)}, f"the impossible shape [{2**31}]"),
    "wraps to 8": ({"tensors": (entry(shape=(2**31 - 1,) * 4), 1)}, "bytes where its header says"),
    "half a block": ({"tensors": (entry(shape=(8, 4), kind=8), 1)}, "'a' is Q8_0 of the impossible shape [4, 8]"),
    "unknown type": ({"tensors": (entry(kind=31), 1)}, "'a' is of type 31, which is not one of F32, F16, Q4_0"),
    "removed type": ({"tensors": (entry(kind=4), 1)}, "'a' is of type 4, which"),
    "unread type": ({"tensors": (entry(shape=(256,), kind=15), 1)}, "'a' is of type Q8_K, which is not one of"),
    "NVFP4, with scales elsewhere": ({"tensors": (entry(shape=(64,), kind=40), 1)}, "'a' is of type NVFP4, which"),
    "far offset": ({"tensors": (entry(offset=HUGE), 1)}, "bytes where its header says 9223372036854775"),
    "odd offset": ({"tensors": (entry(offset=4), 1)}, "'a' begins at byte 4, which is no multiple of 32"),
    "overlap": ({"tensors": (entry() + entry("b"), 2)}, "'b' begins at byte 96, what is before it ends at 128"),
    "cut payload": ({"payload": bytes(31)}, "it has 95 bytes where its header says 96; fetch it again"),
    "long payload": ({"payload": bytes(65)}, "it has 129 bytes where its header says 96; fetch it again"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers(case, tmp_path):
    changes, message = BROKEN[case]
    path = save(tmp_path / "a.gguf", **changes)
    block_types.kinds()  # the library is not what is measured
    with allocating() as peak, refused(message) as caught:
        Gguf([path])
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500
    assert peak() < 2**20


def test_what_the_broken_ones_are_made_of_is_read(tmp_path):
    assert Gguf([save(tmp_path / "a.gguf")]).infos == {"a": TensorInfo("F32", (8,))}
    entries = (text("general.alignment") + pack("II", 4, 64), 1)
    aligned = save(tmp_path / "b.gguf", entries=entries, alignment=64, payload=bytes(63) + b"\1")
    assert np.array_equal(read(aligned, "a"), np.zeros(8))


def test_a_header_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "HEADER_LIMIT", 1000)
    with refused("its header has more than 1000 bytes"):
        Gguf([save(tmp_path / "a.gguf", entries=(KEY + pack("I", 8) + text("x" * 2000), 1))])


def test_every_cut_is_noticed(tmp_path):
    path = write(tmp_path / "a.gguf", {"a": ("F32", random(3)), NAME: ("Q4_K", blocks("Q4_K", 1, 256))})
    data, cut = path.read_bytes(), tmp_path / "b.gguf"
    for length in range(len(data) - 16):  # the last bytes fill up to the alignment
        cut.write_bytes(data[:length])
        with refused(str(cut)):
            Gguf([cut])


def test_damage_is_an_error_or_another_number(tmp_path):
    path = write(tmp_path / "a.gguf", {"a": ("F32", random(3)), NAME: ("Q4_K", blocks("Q4_K", 1, 256))})
    data, random_bytes = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for place in random_bytes.integers(0, len(data) - 160, 2):
            damaged[place] = random_bytes.choice([0, 1, 0x7F, 0x80, 0xFF])
        path.write_bytes(damaged)
        with suppress(CheckpointError):
            tensors = Gguf([path])
            assert len(list(tensors.read(tensors.infos))) == len(tensors.infos)


@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan, 300.0])
def test_scales_that_no_weight_has(scale, tmp_path):
    stored = blocks("Q8_0", 4, 64)
    stored[2, :2] = np.array([scale], np.float16).view(np.uint8)
    with refused(f"{NAME} in {tmp_path / 'a.gguf'} has scales that no weight has"):
        read(write(tmp_path / "a.gguf", {NAME: ("Q8_0", stored)}))


@pytest.mark.parametrize("kind", ["Q8_0", "F32"])
def test_a_file_that_becomes_shorter(kind, tmp_path):
    stored = blocks("Q8_0", 4, 64) if kind == "Q8_0" else random(4, 64)
    path = write(tmp_path / "a.gguf", {NAME: (kind, stored)})
    tensors = Gguf([path])
    path.write_bytes(path.read_bytes()[:-64])
    with refused("was changed while it was read"):
        list(tensors.read([NAME]))
    path.unlink()
    with refused(f"can't read {path}"):
        list(tensors.read([NAME]))


def test_no_file(tmp_path):
    with refused("can't read"):
        Gguf([tmp_path])
