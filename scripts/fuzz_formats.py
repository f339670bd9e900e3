"""A kind of cases for each format of weights: a small file of it, by an independent tool where there is one, is damaged
and read.

    python scripts/fuzz.py 1000 1 --module fuzz_formats --kinds gguf

What a case may come to: the same weights, one clear error, other weights of the same names where nothing but bytes were
changed (`values`), or weights of other names or shapes (`others`), which are no model's then. A scale that is missing,
there twice or of another shape has to be told.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import gguf
import mlx.core as mx
import numpy as np
from flux2_mlx.convert import formats
from flux2_mlx.convert.formats import SETTINGS
from flux2_mlx.convert.rules import Finite
from fuzz import Finding
from fuzz_damage import VALUES, cut, damaged_header, mutated, scrambled

from flux2_mlx.weights import FLOATS, TensorInfo, Tensors, read_header

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
COMFY = "_quantization_metadata"
SHAPES = {"qint4.weight": (5, 256), "qint2.weight": (5, 256)}
CODES = {mx.uint32: "U32", mx.uint8: "U8", **FLOATS}
DTYPES = ("F32", "BF16", "F16", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U32", "I32", "F64")
PLAIN = "b.weight"
MOST = 2.0**20  # what no weight comes near
# Types of GGUF, and where in their blocks scales in half precision are.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,), "IQ4_XS": (0,)}
MODES = {layer: {"mode": mode} for layer, mode in (("m", "mxfp4"), ("n", "mxfp8"), ("o", "nvfp4"))}
HEADER = 600  # bytes of a GGUF file that are surely of its header


class Stored(NamedTuple):
    """A tensor of a file."""

    info: TensorInfo
    data: bytes


class Sample(NamedTuple):
    """What a file holds: tensors by name, and texts."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]

    def encoded(self) -> bytes:
        header: dict[str, object] = {"__metadata__": self.metadata}
        end = 0
        for name, (info, data) in self.tensors.items():
            header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [end, end := end + len(data)]}
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + b"".join(x.data for x in self.tensors.values())


class Bench:
    """A file of each format, and what it stands for."""

    def __init__(self, folder: Path):
        self.folder, self.size = folder, 0
        self.right: dict[str, dict[str, np.ndarray]] = {}
        for kind, sample in samples().items():
            self.right[kind] = self.read(sample.encoded())
        self.gguf = gguf_file(folder / "right.gguf")
        self.right["gguf"] = self.read(self.gguf)
        self.kinds: dict[str, Callable[[random.Random], str]] = {
            **{kind: partial(self.damaged, kind) for kind in samples()},
            "gguf": self.damaged_gguf,
        }

    def restore(self) -> None:
        """Nothing of a case is kept."""

    def damaged(self, kind: str, rng: random.Random) -> str:
        """A safetensors file with a tensor, a text or bytes changed."""
        sample = samples()[kind]
        action = rng.choice([*ACTIONS, *BYTES])
        if action in BYTES:
            return self.compared(kind, self.read(BYTES[action](rng, sample.encoded())))
        changed = ACTIONS[action](rng, sample)
        found = self.read(changed.encoded())
        if action in TOLD and (altered := self.altered(kind, found)):
            raise Finding("silent", f"{action} {difference(changed, sample)}: other values of {', '.join(altered)}")
        told = difference(changed, sample)
        return self.compared(kind, found, is_scale=action == "revalued" and ("F32" in told or "scale" in told))

    def damaged_gguf(self, rng: random.Random) -> str:
        """A GGUF file with bytes changed, half the time in its header, or with all scales of a type of one value."""
        if rng.random() < 0.1:
            return self.compared("gguf", self.read(rescaled(rng, self.folder / "right.gguf", self.gguf)), is_scale=True)
        start = len(self.gguf) // 2 if rng.random() < 0.5 else HEADER
        action = rng.choice([scrambled, scrambled, scrambled, cut])
        return self.compared("gguf", self.read(action(rng, self.gguf[:start]) + self.gguf[start:]))

    def read(self, data: bytes) -> dict[str, np.ndarray]:
        """All weights of a file, as a conversion reads them."""
        path = self.folder / ("a.gguf" if data[:4] == b"GGUF" else "a.safetensors")
        path.write_bytes(data)
        self.size = len(data)
        tensors, _ = formats.plain([path], None, SHAPES)
        names = [name for name, info in tensors.infos.items() if info.dtype in FLOATS.values()]
        rounded = Finite(Bfloat16(tensors), "{} is not finite".format)
        return {name: np.array(x.astype(mx.float32)) for name, x in zip(names, rounded.read(names), strict=True)}

    def altered(self, kind: str, found: Mapping[str, np.ndarray]) -> list[str]:
        """The weights that have their shapes and not their values."""
        return [
            name
            for name, array in self.right[kind].items()
            if name in found and found[name].shape == array.shape and not np.array_equal(found[name], array)
        ]

    def compared(self, kind: str, found: Mapping[str, np.ndarray], *, is_scale: bool = False) -> str:
        """What came of a case; `is_scale`: nothing but a scale was changed, so no weight is 0 throughout."""
        right, altered = self.right[kind], self.altered(kind, found)
        for name in altered:
            if name != PLAIN and ((is_scale and not found[name].any()) or np.abs(found[name]).max() > MOST):
                raise Finding("silent", f"{name} has values up to {np.abs(found[name]).max():g}")
        if {name: x.shape for name, x in found.items()} != {name: x.shape for name, x in right.items()}:
            return "others"
        return "values" if altered else "identical"


class Bfloat16:
    """Tensors as a conversion rounds them."""

    def __init__(self, tensors: Tensors):
        self._tensors, self.infos = tensors, tensors.infos

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        return (array.astype(mx.bfloat16) for array in self._tensors.read(names))


def rescaled(rng: random.Random, path: Path, data: bytes) -> bytes:
    """A GGUF file with other scales in all blocks of a tensor."""
    kind, value = rng.choice(list(SCALES)), rng.choice([0.0, -1.0, 6e-8, 65504.0, np.nan, np.inf, -np.inf])
    (tensor,) = (x for x in gguf.GGUFReader(path).tensors if x.name == f"{kind}.weight")
    nbytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    end = tensor.data_offset + tensor.n_bytes
    blocks = np.frombuffer(data[tensor.data_offset : end], np.uint8).reshape(-1, nbytes).copy()
    for place in SCALES[kind]:
        blocks[:, place : place + 2] = np.array([value], np.float16).view(np.uint8)
    return data[: tensor.data_offset] + blocks.tobytes() + data[end:]


def dropped(rng: random.Random, sample: Sample) -> Sample:
    name = rng.choice(list(sample.tensors))
    return sample._replace(tensors={key: x for key, x in sample.tensors.items() if key != name})


def doubled(rng: random.Random, sample: Sample) -> Sample:
    """A tensor once more, under a name that another tool, or the same for something else, would give it."""
    name = rng.choice(list(sample.tensors))
    layer, _, end = name.rpartition(".")
    ends = {key.rpartition(".")[2] for x in samples().values() for key in x.tensors} - {end}
    other = f"{layer}.{rng.choice(sorted(ends))}"
    return sample._replace(tensors={other: sample.tensors[name], **sample.tensors})


def misshaped(rng: random.Random, sample: Sample) -> Sample:
    """A tensor of another shape: as many values, or a row more or less."""
    name = rng.choice(list(sample.tensors))
    info, data = sample.tensors[name]
    shape = info.shape
    rows, size = (shape[0] if shape else 1), len(data)
    options = [
        ((*shape[1:], rows), data),
        ((1, *shape), data),
        (shape[:-1], data[: size // (shape[-1] if shape else 1)]),
    ]
    options += [((rows * 2, *shape[1:]), data * 2), ((rows - 1, *shape[1:]), data[: size - size // rows])]
    shape, data = rng.choice(options)
    return sample._replace(tensors={**sample.tensors, name: Stored(TensorInfo(info.dtype, shape), data)})


def recoded(rng: random.Random, sample: Sample) -> Sample:
    """A tensor of which the header says another dtype, with as many bytes as that takes."""
    name, dtype = rng.choice(list(sample.tensors)), rng.choice(DTYPES)
    info = TensorInfo(dtype, sample.tensors[name].info.shape)
    data = (sample.tensors[name].data * 8)[: info.nbytes]
    return sample._replace(tensors={**sample.tensors, name: Stored(info, data)})


def renamed(rng: random.Random, sample: Sample) -> Sample:
    name = rng.choice(list(sample.tensors))
    other = rng.choice([scrambled(rng, name.encode()).decode(errors="replace"), f"{name}.tekken_model", f"x.{name}"])
    return sample._replace(tensors={other if key == name else key: x for key, x in sample.tensors.items()})


def revalued(rng: random.Random, sample: Sample) -> Sample:
    """A tensor with one value, or all, of another size."""
    name = rng.choice(list(sample.tensors))
    code, (info, data) = sample.tensors[name].info.dtype, sample.tensors[name]
    if code == "F32":
        values = np.frombuffer(data, np.float32).copy()
        value = rng.choice([0.0, -1.0, 1e30, -1e30, 1e38, 1e-45, np.nan, np.inf, -np.inf])
    else:
        values, value = np.frombuffer(data, np.uint8).copy(), rng.choice([0, 0x7F, 0x80, 0xFE, 0xFF])
    values[rng.choice([slice(None), rng.randrange(len(values))])] = value
    return sample._replace(tensors={**sample.tensors, name: Stored(info, values.tobytes())})


def retold(rng: random.Random, sample: Sample) -> Sample:
    """A text of the header, or JSON in a tensor, with a value changed."""
    places = [*sample.metadata, *(name for name, x in sample.tensors.items() if x.data[:1] == b"{")]
    if not places:
        return sample._replace(metadata={"quantization": json.dumps({"bits": rng.choice(VALUES)})})
    name = rng.choice(places)
    if name not in sample.metadata:
        data = json.dumps(mutated(rng, json.loads(sample.tensors[name].data))).encode()
        stored = Stored(TensorInfo("U8", (len(data),)), data)
        return sample._replace(tensors={**sample.tensors, name: stored})
    text = sample.metadata[name]
    changed = json.dumps(mutated(rng, json.loads(text))) if text[:1] == "{" else str(rng.choice(VALUES))
    return sample._replace(metadata={**sample.metadata, name: changed})


ACTIONS: dict[str, Callable[[random.Random, Sample], Sample]] = {
    "dropped": dropped,
    "doubled": doubled,
    "misshaped": misshaped,
    "recoded": recoded,
    "renamed": renamed,
    "revalued": revalued,
    "retold": retold,
}
BYTES = {"header": damaged_header, "bytes": scrambled, "cut": cut}
TOLD = ("dropped", "doubled", "misshaped")  # what must not change a weight in silence


def difference(changed: Sample, sample: Sample) -> str:
    now = changed.tensors
    names = [name for name in {**sample.tensors, **now} if now.get(name) != sample.tensors.get(name)]
    return ", ".join(f"{name} {now[name].info if name in now else 'gone'}" for name in names)


def golden(tool: str, *layers: str) -> Sample:
    """Some layers of a file in `tests/golden`."""
    path = GOLDEN / f"{tool}.safetensors"
    data, infos = path.read_bytes(), read_header(path)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    places = {name: header[name]["data_offsets"] for name in infos}
    tensors = {name: Stored(infos[name], data[start + a : start + b]) for name, (a, b) in places.items()}
    chosen = {name: x for name, x in tensors.items() if any(name.startswith(f"{layer}.") for layer in layers)}
    texts = header["__metadata__"]
    said = {f"{layer}.weight": texts[f"{layer}.weight"] for layer in layers if f"{layer}.weight" in texts}
    if COMFY in texts:
        table = json.loads(texts[COMFY])
        table["layers"] = {layer: table["layers"][layer] for layer in layers}
        said[COMFY] = json.dumps(table)
    return Sample(chosen, said | {"modelspec.title": "FLUX.2 klein 4B"})


@cache
def samples() -> dict[str, Sample]:
    """A file of each format that safetensors hold, each with a plain weight besides."""
    found = {
        "fp8": fp8("weight_scale"),
        "fp8_old": fp8("scale_weight", {"scaled_fp8": Stored(TensorInfo("F8_E4M3", (2,)), bytes(2))}),
        "fp8_marked": marked(golden("comfy", "blocks.float8_e4m3fn", "blocks.float8_e5m2")),
        "fp8_cast": cast(),
        "fp8_rows": fp8_of_blocks(),
        "nvfp4": golden("comfy", "blocks.nvfp4"),
        "mxfp8": golden("comfy", "blocks.mxfp8"),
        "int8": golden("comfy", "blocks.int8", "blocks.int8_rows", "blocks.convrot_16"),
        "nf4": golden("bitsandbytes", *(f"transformer_blocks.0.{x}" for x in ("nf4", "nf4_odd", "nf4_nested", "fp4"))),
        "bnb_int8": golden("bitsandbytes", "model.layers.0.mlp.up_proj"),
        "quanto": golden("quanto", "qint8", "qfloat8", "qfloat8_e5m2", "qint4", "qint2"),
        "torchao": golden("torchao", "int8", "int8_groups", "float8", "float8_tensor"),
        "mlx": packed_by_mlx({"quantization": json.dumps({"bits": 4, "group_size": 64} | MODES)}),
        "mflux": packed_by_mlx({"mflux_version": "0.24.0", "quantization_level": "4"}),
    }
    plain = stored("BF16", mx.random.normal((8, 32), key=mx.random.key(9)).astype(mx.bfloat16))
    return {kind: Sample(x.tensors | {PLAIN: plain}, x.metadata) for kind, x in found.items()}


def stored(code: str, array: mx.array) -> Stored:
    data = np.array(array.view(mx.uint8) if array.size * array.itemsize else array)
    return Stored(TensorInfo(code, array.shape), data.tobytes())


def fp8(end: str, more: Mapping[str, Stored] | None = None) -> Sample:
    """Layers that nothing is said of but their scales, as the releaser and older files have them."""
    sample = golden("comfy", "blocks.float8_e4m3fn")
    tensors = {name.replace("weight_scale", end): x for name, x in sample.tensors.items()}
    again = {name.replace("blocks.", "more."): x for name, x in tensors.items()}
    return Sample(tensors | again | dict(more or {}), {"title": "FLUX.2"})


def marked(sample: Sample) -> Sample:
    """With what the metadata says in a tensor of each layer."""
    layers = json.loads(sample.metadata[COMFY])["layers"]
    texts = {f"{layer}.comfy_quant": json.dumps(said).encode() for layer, said in layers.items()}
    return Sample(sample.tensors | {x: Stored(TensorInfo("U8", (len(t),)), t) for x, t in texts.items()}, {})


def cast() -> Sample:
    codes = mx.to_fp8(mx.random.normal((16, 32), key=mx.random.key(2)))
    return Sample({"a.weight": stored("F8_E4M3", codes), "c.weight": stored("F8_E4M3", codes)}, {})


def fp8_of_blocks() -> Sample:
    """Scales of rows, and of blocks of 128 · 128."""
    codes = mx.to_fp8(100 * mx.random.normal((160, 160), key=mx.random.key(3)))
    rows, blocks = (mx.random.uniform(0.001, 0.01, shape, key=mx.random.key(4)) for shape in ((160, 1), (2, 2)))
    weights = {f"{x}.weight": stored("F8_E4M3", codes) for x in "ac"}
    return Sample(weights | {"a.weight_scale": stored("F32", rows), "c.weight_scale_inv": stored("F32", blocks)}, {})


def packed_by_mlx(metadata: dict[str, str]) -> Sample:
    tensors = {}
    forms = {"a": (64, 4, "affine"), "c": (64, 4, "affine")}
    if SETTINGS in metadata:
        forms |= {"m": (32, 4, "mxfp4"), "n": (32, 8, "mxfp8"), "o": (16, 4, "nvfp4")}
    for layer, (group, bits, mode) in forms.items():
        weight = mx.random.normal((6, 256), key=mx.random.key(1)).astype(mx.bfloat16)
        for end, array in zip(("weight", "scales", "biases"), mx.quantize(weight, group, bits, mode), strict=False):
            tensors[f"{layer}.{end}"] = stored(CODES[array.dtype], array)
    return Sample(tensors, metadata)


def gguf_file(path: Path) -> bytes:
    """A file by the library with a tensor of each of some types, whose scales are sane."""
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_name("FLUX.2 klein 4B")
    rng = np.random.default_rng(0)
    for kind in SCALES:
        values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        blocks = rng.integers(0, 256, (4 * 512 // values, nbytes), np.uint8)
        for place in SCALES[kind]:  # of half precision, about 0.01
            blocks[:, place : place + 2] = np.frombuffer(b"\x1f\x21", np.uint8)
        writer.add_tensor(f"{kind}.weight", blocks.reshape(4, -1), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor(PLAIN, rng.standard_normal((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()
