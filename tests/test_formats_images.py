"""Images of models that were converted from every format of weights, beside those of the model itself."""

import json
import struct
from collections.abc import Callable
from functools import partial
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
FP4 = tuple(sign * x / 12 for sign in (1, -1) for x in (0, 0.0625, 8, 12, 4, 6, 2, 3))
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


def exponents(weight: np.ndarray, most: float) -> tuple[np.ndarray, np.ndarray]:
    """Codes of powers of two, one for each 32 inputs, and the weight divided by them, up to `most`."""
    groups = weight.reshape(len(weight), -1, 32)
    codes = np.clip(np.ceil(np.log2(np.abs(groups).max(axis=-1) / most)) + 127, 1, 254).astype(np.uint8)
    return codes, (groups / np.exp2(codes.astype(np.float32) - 127)[..., None]).reshape(weight.shape)


def mxfp8(weight: np.ndarray) -> Ends:
    codes, values = exponents(weight, 448)
    return {
        ".weight": ("F8_E4M3", fp8(values)),
        ".weight_scale": ("U8", swizzled(codes)),
        ".comfy_quant": text({"format": "mxfp8"}),
    }


def fp8_by_blocks(weight: np.ndarray) -> Ends:
    rows, columns = (size // 128 for size in weight.shape)
    blocks = weight.reshape(rows, 128, columns, 128)
    scales = np.abs(blocks).max(axis=(1, 3), keepdims=True) / 448
    values = fp8((blocks / scales).reshape(weight.shape))
    return {".weight": ("F8_E4M3", values), ".weight_scale_inv": ("F32", scales.reshape(rows, columns))}


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


def rotated_int8(weight: np.ndarray) -> Ends:
    four = np.float32([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    turned = (weight.reshape(-1, 4, 4).transpose(0, 2, 1) @ four).transpose(0, 2, 1)  # the upper digit of 16
    codes, scale = by_rows((turned @ four).reshape(weight.shape))
    said = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 16}}
    return {".weight": ("I8", codes), ".weight_scale": ("F32", scale), ".comfy_quant": text(said)}


def nibbled(kind: str, table: tuple[float, ...], *, nested: bool = False) -> Callable[[np.ndarray], Ends]:
    def packed(weight: np.ndarray) -> Ends:
        blocks = weight.reshape(-1, 64)
        most = np.abs(blocks).max(axis=1)
        nibbles = nearest(blocks / most[:, None], table).reshape(-1)
        said = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        beside: Ends = {".weight.absmax": ("F32", most)}
        if nested:
            offset, steps = float(most.mean()), np.linspace(-1, 1, 256, dtype=np.float32)
            rest = np.pad(most - offset, (0, -len(most) % 256)).reshape(-1, 256)
            whole = np.abs(rest).max(axis=1)
            codes = np.rint((rest / whole[:, None] + 1) * 127.5).astype(np.uint8).reshape(-1)[: len(most)]
            beside = {
                ".weight.absmax": ("U8", codes),
                ".weight.nested_absmax": ("F32", whole),
                ".weight.nested_quant_map": ("F32", steps),
            }
            said |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
        return beside | {
            ".weight": ("U8", (nibbles[::2] << 4 | nibbles[1::2])[:, None]),
            ".weight.quant_map": ("F32", np.float32(table)),
            f".weight.quant_state.bitsandbytes__{kind}": text(said),
        }

    return packed


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


def quanto_float8(weight: np.ndarray) -> Ends:
    scale = np.abs(weight).max(axis=1, keepdims=True) / 448
    return {".weight._data": ("F8_E4M3", fp8(weight / scale)), ".weight._scale": ("F32", scale)}


def torchao(kind: str) -> Callable[[np.ndarray], Ends]:
    def packed(weight: np.ndarray) -> Ends:
        if kind == "Int8Tensor":
            codes, scale = by_rows(weight)
            return {"._weight_qdata": ("I8", codes), "._weight_scale": ("F32", scale)}
        scale = np.abs(weight).max(axis=1, keepdims=True) / 448
        return {"._weight_qdata": ("F8_E4M3", fp8(weight / scale)), "._weight_scale": ("F32", scale)}

    return packed


def floats(mode: str, bits: int, group: int) -> Callable[[np.ndarray], Ends]:
    def packed(weight: np.ndarray) -> Ends:
        arrays = map(np.array, mx.quantize(mx.array(weight), group, bits, mode))
        return dict(zip((".weight", ".scales"), zip(("U32", "U8"), arrays, strict=True), strict=True))

    return packed


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
    "fp8 by blocks": (fp8_by_blocks, {}, 0.006),
    "mxfp8": (mxfp8, {}, 0.004),
    "nvfp4": (nvfp4, {}, 0.014),
    "int8 of ComfyUI": (comfy_int8, {}, 0.0015),
    "rotated int8 of ComfyUI": (rotated_int8, {}, 0.0015),
    "nf4": (nibbled("nf4", NF4), {}, 0.01),
    "nf4 with nested scales": (nibbled("nf4", NF4, nested=True), {}, 0.01),
    "fp4 of bitsandbytes": (nibbled("fp4", FP4), {}, 0.01),
    "int8 of bitsandbytes": (bitsandbytes_int8, {}, 0.0015),
    "quanto qint8": (quanto_int8, {}, 0.0015),
    "quanto qint4": (quanto_int4, {}, 0.01),
    "quanto qfloat8": (quanto_float8, {}, 0.004),
    "torchao int8": (torchao("Int8Tensor"), "Int8Tensor", 0.0015),
    "torchao float8": (torchao("Float8Tensor"), "Float8Tensor", 0.004),
    "MLX 8 bits": (affine(8), {"quantization": '{"bits": 8, "group_size": 64}'}, 0.0015),
    "MLX 4 bits": (affine(4), {"quantization": '{"bits": 4, "group_size": 64}'}, 0.022),
    "MLX mxfp4": (floats("mxfp4", 4, 32), {}, 0.022),
    "MLX mxfp8": (floats("mxfp8", 8, 32), {}, 0.004),
    "MLX nvfp4": (floats("nvfp4", 4, 16), {}, 0.022),
}


def q6_k(weight: np.ndarray) -> np.ndarray:
    groups = weight.reshape(-1, 16, 16)
    steps = np.abs(groups).max(axis=2) / 31
    whole = (steps.max(axis=1, keepdims=True) / 127).astype(np.float16)
    scales = np.maximum(np.rint(steps / whole.astype(np.float32)), 1)
    codes = np.clip(np.rint(groups / (whole * scales)[..., None]), -32, 31) + 32
    codes = codes.astype(np.uint8).reshape(-1, 2, 4, 32)  # of each half four quarters, two of which share nibbles
    low = codes[:, :, :2] & 15 | (codes[:, :, 2:] & 15) << 4
    high = np.bitwise_or.reduce((codes >> 4) << np.uint8([0, 2, 4, 6])[:, None], axis=2)
    parts = (low, high, scales.astype(np.int8), whole)
    return np.hstack([np.ascontiguousarray(x).reshape(len(codes), -1).view(np.uint8) for x in parts])


def q4_k(weight: np.ndarray) -> np.ndarray:
    groups = weight.reshape(-1, 8, 32)
    low, high = np.minimum(groups.min(axis=2), 0), groups.max(axis=2)
    ends = [(high - low) / 15, -low]
    whole = [(x.max(axis=1, keepdims=True) / 63).astype(np.float16) for x in ends]
    scales, least = (np.rint(x / y.astype(np.float32)).astype(np.uint8) for x, y in zip(ends, whole, strict=True))
    steps = np.maximum((whole[0] * scales)[..., None].astype(np.float32), 1e-9)
    codes = np.clip(np.rint((groups + (whole[1] * least)[..., None]) / steps), 0, 15).astype(np.uint8)
    first = (x[:, :4] | x[:, 4:] >> 4 << 6 for x in (scales, least))
    parts = (*whole, *first, scales[:, 4:] & 15 | (least[:, 4:] & 15) << 4, codes[:, ::2] | codes[:, 1::2] << 4)
    return np.hstack([np.ascontiguousarray(x).reshape(len(groups), -1).view(np.uint8) for x in parts])


GGUF = {"Q8_0": 0.0012, "Q5_1": 0.005, "Q4_0": 0.014, "BF16": 0, "Q6_K": 0.0015, "Q4_K": 0.008}
BY_HAND = {"Q6_K": q6_k, "Q4_K": q4_k}  # which the library only reads


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
    if isinstance(said, str):
        shapes = {key: weight.shape for key, weight in weights.items() if is_packed(key, weight)}
        kinds = {key: {"_type": said, "_data": {"block_size": [1, shape[1]]}} for key, shape in shapes.items()}
        said = {key: json.dumps(kind) for key, kind in kinds.items()}
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
        if is_packed(key, weight) and weight.shape[1] % gguf.GGML_QUANT_SIZES[code][0] == 0:
            pack = BY_HAND.get(kind, partial(gguf.quants.quantize, qtype=code))
            writer.add_tensor(key, pack(weight).reshape(len(weight), -1), raw_dtype=code)
        else:
            writer.add_tensor(key, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    off = difference(tmp_path / "x.gguf", states, expected)
    print(f"{kind}: {off:.4f}")
    assert off <= GGUF[kind]
