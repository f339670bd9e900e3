"""Make comfy.safetensors, given its path: layers by comfy-kitchen 0.2.40 (PyPI), and what it makes of them in float32.

Its metadata has, by the name of a layer, the SHA-256 of the weight; where a matrix product is in it, a tensor
`expected.…` holds the weight itself.
"""

import json
import sys
from hashlib import sha256

import torch
from comfy_kitchen.backends.eager import quantization as q
from safetensors.torch import save_file

torch.manual_seed(0)
tensors, layers, metadata = {}, {}, {}


def add(layer, config, weight, scales, result, exact=True):
    layers[layer] = config
    tensors[f"{layer}.weight"] = weight
    for end, scale in scales.items():
        tensors[f"{layer}.{end}"] = scale
    if exact:
        metadata[layer] = sha256(result.contiguous().numpy().tobytes()).hexdigest()
    else:
        tensors[f"expected.{layer}"] = result


w = torch.randn(40, 48) * 0.02
for name, dtype, largest in (("float8_e4m3fn", torch.float8_e4m3fn, 448), ("float8_e5m2", torch.float8_e5m2, 57344)):
    scale = w.abs().amax() / largest
    x = q.quantize_per_tensor_fp8(w, scale, dtype)
    add(
        f"blocks.{name}",
        {"format": name},
        x,
        {"weight_scale": scale},
        q.dequantize_per_tensor_fp8(x, scale, torch.float32),
    )
w = torch.randn(144, 96) * torch.logspace(-4, 2, 96)
w[:, :32] = 0
x, s = q.quantize_mxfp8(w)
add("blocks.mxfp8", {"format": "mxfp8"}, x, {"weight_scale": s}, q.dequantize_mxfp8(x, s, torch.float32))
w = torch.randn(144, 80) * torch.logspace(-4, 1, 80)
w[5] = 0
scale = w.abs().amax() / (448 * 6)
x, s = q.quantize_nvfp4(w, scale)
add(
    "blocks.nvfp4",
    {"format": "nvfp4"},
    x,
    {"weight_scale": s, "weight_scale_2": scale},
    q.dequantize_nvfp4(x, scale, s, torch.float32),
)
w = torch.randn(24, 64) * 0.1
x, s = q.quantize_int8_tensorwise(w)
add("blocks.int8", {"format": "int8_tensorwise"}, x, {"weight_scale": s}, q.dequantize_int8_simple(x, s))
x, s = q.quantize_int8_rowwise(w)
add("blocks.int8_rows", {"format": "int8_tensorwise"}, x, {"weight_scale": s}, q.dequantize_int8_simple(x, s))
for size in (64, 16):
    x, s = q.quantize_int8_convrot_weight(w[:8], size)
    r = q.dequantize_int8_convrot_weight(x, s, size)
    add(
        f"blocks.convrot_{size}",
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size},
        x,
        {"weight_scale": s},
        r,
        exact=False,
    )
metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
save_file({k: v.contiguous() for k, v in tensors.items()}, sys.argv[1], metadata)
