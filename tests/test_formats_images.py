"""Images of models that were converted from every format of weights, beside those of the model itself."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert import assembled, write_checkpoint

from flux2_mlx import Flux2Pipeline
from flux2_mlx.store import demo_folder

DEMO = demo_folder()
SETTINGS = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 0, "output_type": "np"}
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
Ends = dict[str, tuple[str, np.ndarray]]  # of a weight's name without `.weight`, with the code of a file


def fp8(values: np.ndarray) -> np.ndarray:
    return np.array(mx.to_fp8(mx.array(values.astype(np.float32))))


def nearest(values: np.ndarray, table: tuple[float, ...]) -> np.ndarray:
    return np.abs(values[..., None] - np.float32(table)).argmin(axis=-1).astype(np.uint8)


def fp8_cast(weight: np.ndarray) -> Ends:
    return {".weight": ("F8_E4M3", fp8(weight))}


def fp8_scaled(weight: np.ndarray) -> Ends:
    scale = np.abs(weight).max() / 448
    return {".weight": ("F8_E4M3", fp8(weight / scale)), ".weight_scale": ("F32", np.float32(scale))}


def fp8_by_rows(weight: np.ndarray) -> Ends:
    scale = np.abs(weight).max(axis=1, keepdims=True) / 448
    return {".weight": ("F8_E4M3", fp8(weight / scale)), ".scale_weight": ("F32", scale)}


def e5m2(weight: np.ndarray) -> Ends:
    halves = (weight.astype(np.float16).view(np.uint16).astype(np.uint32) + 0x80) >> 8
    return {".weight": ("F8_E5M2", halves.astype(np.uint8))}


def swizzled(scales: np.ndarray) -> np.ndarray:
    """Scales of groups as a tensor core takes them: tiles of 128 rows and 4 groups, in which rows 32 apart follow."""
    rows, groups = scales.shape
    tiles = scales.reshape(rows // 128, 4, 32, groups // 4, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(tiles).reshape(rows, groups)


def nvfp4(weight: np.ndarray) -> Ends:
    groups = weight.reshape(len(weight), -1, 16)
    whole = np.float32(np.abs(weight).max() / 6 / 448)
    codes = fp8(np.abs(groups).max(axis=-1) / 6 / whole)
    scales = np.array(mx.from_fp8(mx.array(codes), mx.float32)) * whole
    nibbles = nearest(groups / np.maximum(scales, 1e-9)[..., None], E2M1).reshape(len(weight), -1)
    return {
        ".weight": ("U8", nibbles[:, ::2] << 4 | nibbles[:, 1::2]),
        ".weight_scale": ("F8_E4M3", swizzled(codes)),
        ".weight_scale_2": ("F32", whole),
        ".comfy_quant": text({"format": "nvfp4"}),
    }


def text(value: object) -> tuple[str, np.ndarray]:
    return "U8", np.frombuffer(json.dumps(value).encode(), np.uint8)


def by_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    return np.rint(weight / scale).astype(np.int8), scale


def comfy_int8(weight: np.ndarray) -> Ends:
    codes, scale = by_rows(weight)
    return {
        ".weight": ("I8", codes),
        ".weight_scale": ("F32", scale),
        ".comfy_quant": text({"format": "int8_tensorwise"}),
    }


def nf4(weight: np.ndarray) -> Ends:
    blocks = weight.reshape(-1, 64)
    most = np.abs(blocks).max(axis=1)
    nibbles = nearest(blocks / most[:, None], NF4).reshape(-1)
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        ".weight": ("U8", (nibbles[::2] << 4 | nibbles[1::2])[:, None]),
        ".weight.absmax": ("F32", most),
        ".weight.quant_map": ("F32", np.float32(NF4)),
        ".weight.quant_state.bitsandbytes__nf4": text(said),
    }


def bitsandbytes_int8(weight: np.ndarray) -> Ends:
    codes, scale = by_rows(weight)
    return {
        ".weight": ("I8", codes),
        ".SCB": ("F32", scale[:, 0] * 127),
        ".weight_format": ("U8", np.uint8(0)),
    }


def quanto_int8(weight: np.ndarray) -> Ends:
    codes, scale = by_rows(weight)
    return {".weight._data": ("I8", codes), ".weight._scale": ("F32", scale)}


def quanto_int4(weight: np.ndarray) -> Ends:
    groups = weight.reshape(-1, 128)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    scale = (high - low) / 15
    codes = np.clip(np.rint((groups - low) / scale), 0, 15).astype(np.uint8)
    half = len(codes) // 2
    return {
        ".weight._data._data": ("U8", codes[:half] | codes[half:] << 4),
        ".weight._scale": ("F32", scale),
        ".weight._shift": ("F32", -low),
    }


def affine(bits: int) -> Callable[[np.ndarray], Ends]:
    def packed(weight: np.ndarray) -> Ends:
        arrays = map(np.array, mx.quantize(mx.array(weight), 64, bits))
        return dict(
            zip((".weight", ".scales", ".biases"), zip(("U32", "F32", "F32"), arrays, strict=True), strict=True)
        )

    return packed


# How a weight is packed, what the file says besides, and how far numbers of an image of 0 to 1 are off, as measured.
FORMATS = {
    "fp8 without scales": (fp8_cast, {}, 0.0035),
    "fp8": (fp8_scaled, {}, 0.0035),
    "fp8 by rows": (fp8_by_rows, {}, 0.004),
    "fp8 E5M2": (e5m2, {}, 0.005),
    "nvfp4": (nvfp4, {}, 0.014),
    "int8 of ComfyUI": (comfy_int8, {}, 0.0015),
    "nf4": (nf4, {}, 0.01),
    "int8 of bitsandbytes": (bitsandbytes_int8, {}, 0.0015),
    "quanto qint8": (quanto_int8, {}, 0.0015),
    "quanto qint4": (quanto_int4, {}, 0.01),
    "MLX 8 bits": (affine(8), {"quantization": '{"bits": 8, "group_size": 64}'}, 0.0015),
    "MLX 4 bits": (affine(4), {"quantization": '{"bits": 4, "group_size": 64}'}, 0.022),
}
GGUF = {"Q8_0": 0.0012, "Q5_1": 0.005, "Q4_0": 0.014, "BF16": 0}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    tensors = mx.load(str(DEMO / "transformer" / "model.safetensors"))
    return {name: np.array(array.astype(mx.float32)) for name, array in tensors.items()}


@pytest.fixture(scope="module")
def states() -> mx.array:
    return Flux2Pipeline.from_pretrained(DEMO).encode_prompt("a red ring")


@pytest.fixture(scope="module")
def expected(states) -> np.ndarray:
    return image(DEMO, states)


def image(folder: Path, states: mx.array) -> np.ndarray:
    return np.array(Flux2Pipeline.from_pretrained(folder)(prompt_embeds=states, **SETTINGS).images[0])


def is_packed(name: str, weight: np.ndarray) -> bool:
    return "_blocks." in name and weight.ndim == 2


def difference(path: Path, states: mx.array, expected: np.ndarray) -> float:
    """The root mean square of how far the image is off that the weights at `path` make."""
    write_checkpoint(assembled(DEMO, {"transformer": path}), path.with_name("made"), "bf16", "bf16")
    return float(np.sqrt(np.square(image(path.with_name("made"), states) - expected).mean()))


@pytest.mark.parametrize("name", FORMATS)
def test_safetensors(name, weights, states, expected, tmp_path):
    pack, said, most = FORMATS[name]
    header, data = {"__metadata__": said}, b""
    for key, weight in weights.items():
        packed = (
            {key.removesuffix(".weight") + end: x for end, x in pack(weight).items()} if is_packed(key, weight) else {}
        )
        for stored, (code, values) in (packed or {key: ("F32", weight)}).items():
            span = [len(data), len(data) + values.nbytes]
            header[stored] = {"dtype": code, "shape": values.shape, "data_offsets": span}
            data += np.ascontiguousarray(values).tobytes()
    encoded = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    off = difference(path, states, expected)
    print(f"{name}: {off:.4f}")
    assert off < most


@pytest.mark.parametrize("kind", GGUF)
def test_gguf(kind, weights, states, expected, tmp_path):
    code = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "flux")
    for key, weight in weights.items():
        if is_packed(key, weight):
            writer.add_tensor(key, gguf.quants.quantize(weight, code), raw_dtype=code)
        else:
            writer.add_tensor(key, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    off = difference(tmp_path / "x.gguf", states, expected)
    print(f"{kind}: {off:.4f}")
    assert off <= GGUF[kind]
