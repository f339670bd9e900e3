"""Headers of files as tools write them: the tensors of a listing as a format stores them, and no payload."""

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from flux2_mlx.convert.formats import unpacked

from flux2_mlx.weights import TensorInfo, Tensors

Infos = dict[str, TensorInfo]
NOTHING: Mapping[str, str] = {}
NUMBER = TensorInfo("F32", ())
# The layers that a format packs, by the ends of their names in any naming and with any prefix.
_BLOCK = ("double_blocks.", "single_blocks.", "transformer_blocks.", "layers.")
# Values and bytes of a block.
GGML = {"Q2_K": (256, 84), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "Q8_0": (32, 34)}


@dataclass(frozen=True)
class Headers:
    """Tensors of which there is nothing but what a header says."""

    infos: Mapping[str, TensorInfo]
    kinds: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def read(self, names: Iterable[str]) -> Iterator[mx.array]:
        raise AssertionError("a payload was read")


def in_blocks(name: str) -> bool:
    return any(block in name for block in _BLOCK)


def is_mlp(name: str) -> bool:
    """Whether the MLPs of double blocks and the linear layers of single blocks have this name in the original naming:
    what the mixed file of ComfyUI has in fp8."""
    return "_mlp." in name or ".linear" in name


def is_no_text_attention(name: str) -> bool:
    """Whether a layer of a block has this name that is in NVFP4 in the releaser's file of dev."""
    return in_blocks(name) and ".txt_attn." not in name


def plain(infos: Infos, metadata: Mapping[str, str] = NOTHING) -> Tensors:
    """What the tensors of a file stand for."""
    return unpacked(Headers(infos), metadata)


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


def gguf(infos: Infos, kind: str, others: str = "BF16") -> Headers:
    """As GGUF files have them: block layers of one type, other matrices of another, the rest in float32."""
    kinds = {
        name: (kind if in_blocks(name) or name.startswith("blk.") else others) if len(info.shape) > 1 else "F32"
        for name, info in infos.items()
    }
    sizes = {}
    for name, info in infos.items():
        values, nbytes = GGML.get(kinds[name], (1, 4 if kinds[name] == "F32" else 2))
        sizes[name] = math.prod(info.shape) // values * nbytes
    dtypes = {name: kind if kind in ("BF16", "F16") else "F32" for name, kind in kinds.items()}
    return Headers({name: TensorInfo(dtypes[name], info.shape) for name, info in infos.items()}, kinds, sizes)


def lora(module: str, width: int, out: int, ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight")) -> Infos:
    return {
        f"{module}.{ends[0]}": TensorInfo("BF16", (16, width)),
        f"{module}.{ends[1]}": TensorInfo("BF16", (out, 16)),
    }


def write(path: Path, infos: Infos, metadata: Mapping[str, str] = NOTHING) -> Path:
    """A file of these tensors that takes no space but for its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header(infos, metadata))
        file.truncate(file.tell() + sum(info.nbytes for info in infos.values()))
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
