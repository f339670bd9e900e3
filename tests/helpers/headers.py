"""Headers of files as tools write them: the tensors of a listing as a format stores them, and no payload."""

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import mlx.core as mx
from flux2_mlx.convert.formats import unpacked
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from flux2_mlx.weights import TensorInfo, Tensors

Infos = dict[str, TensorInfo]
STATE = ".quant_state.bitsandbytes__nf4"
NOTHING: Mapping[str, str] = {}
NUMBER = TensorInfo("F32", ())
# The layers that a format packs, by the ends of their names in any naming and with any prefix.
_BLOCK = ("double_blocks.", "single_blocks.", "transformer_blocks.", "layers.", "blk.")


@dataclass(frozen=True)
class Headers:
    """Tensors of which there is nothing but what a header says, and the `texts` that describe some."""

    infos: Mapping[str, TensorInfo]
    texts: Mapping[str, bytes] = field(default_factory=dict)

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        return (mx.array(list(self.texts[name]), mx.uint8) for name in names)


def in_blocks(name: str) -> bool:
    return any(block in name for block in _BLOCK)


def is_mlp(name: str) -> bool:
    """Whether the MLPs of double blocks and the linear layers of single blocks have this name in the original naming:
    what the mixed file of ComfyUI has in fp8."""
    return "_mlp." in name or ".linear" in name


def is_no_text_attention(name: str) -> bool:
    """Whether a layer of a block has this name that is in NVFP4 in the releaser's file of dev."""
    return in_blocks(name) and ".txt_attn." not in name


def plain(stored: Infos | Headers, metadata: Mapping[str, str] = NOTHING) -> Tensors:
    """What the tensors of a file stand for."""
    return unpacked(stored if isinstance(stored, Headers) else Headers(stored), metadata)


def cast(infos: Infos, dtype: str, chosen: Callable[[str], bool] = lambda name: True) -> Infos:
    """The same tensors, whole numbers apart, in another dtype."""
    return {
        name: TensorInfo(dtype, info.shape) if chosen(name) and info.dtype != "I64" else info
        for name, info in infos.items()
    }


def scaled(
    infos: Infos,
    chosen: Callable[[str], bool] = in_blocks,
    dtype: str = "F8_E4M3",
    beside: Callable[[tuple[int, ...]], Infos] = lambda shape: {".weight_scale": NUMBER, ".input_scale": NUMBER},
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape,
) -> Infos:
    """The matrices that are `chosen` in another dtype and shape, with what stands `beside` each."""
    found: Infos = {}
    for name, info in infos.items():
        if len(info.shape) == 2 and chosen(name):
            found[name] = TensorInfo(dtype, shape(info.shape))
            found |= {name.removesuffix(".weight") + end: more for end, more in beside(info.shape).items()}
        else:
            found[name] = info
    return found


def in_nvfp4(infos: Infos, chosen: Callable[[str], bool] = is_no_text_attention) -> Infos:
    def beside(shape: tuple[int, ...]) -> Infos:
        rows, groups = shape[0], shape[1] // 16
        scales = TensorInfo("F8_E4M3", (rows + -rows % 128, groups + -groups % 4))
        return {".weight_scale": scales, ".weight_scale_2": NUMBER, ".input_scale": NUMBER}

    return scaled(infos, chosen, "U8", beside, lambda shape: (shape[0], shape[1] // 2))


def declared(infos: Infos, format: str, end: str = ".weight_scale") -> dict[str, str]:
    """The metadata that says of each layer with a scale in which format it is."""
    layers = {name.removesuffix(end): {"format": format} for name in infos if name.endswith(end)}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def in_nf4(infos: Infos, chosen: Callable[[str], bool] = in_blocks) -> Headers:
    """As bitsandbytes stores nf4, with scales that are packed themselves."""

    def beside(shape: tuple[int, ...]) -> Infos:
        blocks = math.prod(shape) // 64
        return {
            ".weight.absmax": TensorInfo("U8", (blocks,)),
            ".weight.quant_map": TensorInfo("F32", (16,)),
            ".weight.nested_absmax": TensorInfo("F32", (-(-blocks // 256),)),
            ".weight.nested_quant_map": TensorInfo("F32", (256,)),
            f".weight{STATE}": TensorInfo("U8", (len(state(shape)),)),
        }

    def state(shape: tuple[int, ...]) -> bytes:
        said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
        nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
        return json.dumps(said | nested).encode()

    stored = scaled(infos, chosen, "U8", beside, lambda shape: (math.prod(shape) // 2, 1))
    names = [name for name in stored if name.endswith(STATE)]
    return Headers(stored, texts={name: state(infos[name.removesuffix(STATE)].shape) for name in names})


def in_int8(infos: Infos) -> Infos:
    """As bitsandbytes stores int8."""
    return scaled(infos, dtype="I8", beside=lambda shape: {".SCB": TensorInfo("F32", shape[:1])})


def by_quanto(infos: Infos, dtype: str = "I8") -> Infos:
    found: Infos = {}
    for name, info in infos.items():
        if len(info.shape) == 2 and in_blocks(name):
            found |= {f"{name}._data": TensorInfo(dtype, info.shape)}
            found |= {f"{name}._scale": TensorInfo("BF16", (info.shape[0], 1))}
            found |= {name.removesuffix("weight") + end: NUMBER for end in ("input_scale", "output_scale")}
        else:
            found[name] = info
    return found


def by_torchao(infos: Infos) -> tuple[Infos, dict[str, str]]:
    """Tensors in int8 with a scale a row, and the metadata that says so."""
    found: Infos = {}
    said = {}
    for name, info in infos.items():
        if len(info.shape) == 2 and in_blocks(name):
            layer = name.removesuffix("weight")
            found[f"{layer}_weight_qdata"] = TensorInfo("I8", info.shape)
            found[f"{layer}_weight_scale"] = TensorInfo("BF16", (info.shape[0], 1))
            said[name] = json.dumps({"_type": "Int8Tensor", "_data": {"block_size": [1, info.shape[1]]}})
        else:
            found[f"{name}:_data"] = info
            said[name] = json.dumps({"_type": "Tensor"})
    return found, said


def by_mlx(infos: Infos, bits: int) -> Infos:
    def beside(shape: tuple[int, ...]) -> Infos:
        groups = TensorInfo("BF16", (shape[0], shape[1] // 64))
        return {".scales": groups, ".biases": groups}

    return scaled(infos, lambda name: True, "U32", beside, lambda shape: (shape[0], shape[1] * bits // 32))


def write_gguf(
    path: Path,
    infos: Infos,
    kind: str,
    others: str = "BF16",
    metadata: Mapping[str, str | float] = MappingProxyType({}),
) -> Path:
    """A GGUF file that takes no space but for its header: matrices in blocks of one type, others of another, and the
    rest in float32."""
    data = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(metadata))
    for key, value in metadata.items():
        data += struct.pack("<Q", len(key)) + key.encode()
        if isinstance(value, str):
            data += struct.pack("<IQ", 8, len(value)) + value.encode()
        else:
            data += struct.pack("<If", 6, value)
    end = 0
    for name, info in infos.items():
        chosen = (kind if in_blocks(name) else others) if len(info.shape) > 1 else "F32"
        values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[chosen]]
        data += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(info.shape))
        data += struct.pack(f"<{len(info.shape)}Q", *reversed(info.shape))
        data += struct.pack("<IQ", GGMLQuantizationType[chosen], end)
        end += -(-(math.prod(info.shape) // values * nbytes) // 32) * 32
    with path.open("wb") as file:
        file.write(data + bytes(-len(data) % 32))
        file.truncate(file.tell() + end)
    return path


def lora(module: str, width: int, out: int, ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight")) -> Infos:
    return {
        f"{module}.{ends[0]}": TensorInfo("BF16", (16, width)),
        f"{module}.{ends[1]}": TensorInfo("BF16", (out, 16)),
    }


def write(path: Path, stored: Infos | Headers, metadata: Mapping[str, str] = NOTHING) -> Path:
    """A file of these tensors that takes no space but for its header and texts."""
    infos, texts = (stored.infos, stored.texts) if isinstance(stored, Headers) else (stored, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        end = file.write(header(infos, metadata))
        file.truncate(end + sum(info.nbytes for info in infos.values()))
        for name, info in infos.items():
            if name in texts:
                file.seek(end)
                file.write(texts[name])
            end += info.nbytes
    return path


def header(infos: Infos, metadata: Mapping[str, str] = NOTHING) -> bytes:
    """The first bytes of such a file."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, info in infos.items():
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [end, end + info.nbytes]}
        end += info.nbytes
    data = json.dumps(entries).encode()
    return struct.pack("<Q", len(data)) + data
