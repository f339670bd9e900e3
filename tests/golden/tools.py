"""Make bitsandbytes.safetensors, quanto.safetensors and torchao.safetensors in a given folder.

With bitsandbytes 0.50.2, optimum-quanto 0.2.7 and torchao 0.18.0 (PyPI). The metadata has the shape of each weight and
the SHA-256 of what the tool makes of it in float32.
"""

import hashlib
import sys

import bitsandbytes.functional as F
import torch
from optimum.quanto import freeze, qfloat8, qfloat8_e5m2, qint2, qint4, qint8, quantize
from safetensors.torch import save_file
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerGroup, PerTensor, quantize_

torch.manual_seed(0)


def save(name, tensors, weights, metadata):
    sums = {
        x: hashlib.sha256(w.detach().float().contiguous().numpy().tobytes()).hexdigest() for x, w in weights.items()
    }
    shapes = {f"shape of {x}": str(list(w.shape)) for x, w in weights.items()}
    save_file(
        tensors, f"{sys.argv[1]}/{name}.safetensors", metadata | shapes | {f"sha256 of {x}": s for x, s in sums.items()}
    )


def linear(rows, columns, dtype):
    layer = torch.nn.Linear(columns, rows, bias=False).to(dtype)
    return torch.nn.ModuleDict({"layer": layer})


tensors, weights = {}, {}
CASES = {
    "nf4": ((6, 64), "nf4", 64, False, torch.float32, torch.uint8),
    "nf4_nested": ((130, 64), "nf4", 32, True, torch.bfloat16, torch.uint8),
    "nf4_odd": ((3, 35), "nf4", 64, False, torch.float16, torch.uint8),
    "nf4_stored_bf16": ((4, 64), "nf4", 64, True, torch.bfloat16, torch.bfloat16),
    "fp4": ((3, 128), "fp4", 128, False, torch.float32, torch.uint8),
    "fp4_nested": ((6, 64), "fp4", 64, True, torch.bfloat16, torch.uint8),
}
for name, (shape, kind, block, nested, dtype, storage) in CASES.items():
    data, state = F.quantize_4bit(
        torch.randn(shape, dtype=dtype),
        blocksize=block,
        quant_type=kind,
        compress_statistics=nested,
        quant_storage=storage,
    )
    weight = f"transformer_blocks.0.{name}.weight"
    tensors[weight] = data
    tensors |= {f"{weight}.{key}": value for key, value in state.as_dict(packed=True).items()}
    state.dtype = torch.float32
    weights[weight] = F.dequantize_4bit(data, state)
data, scales, _ = F.int8_vectorwise_quant(torch.randn(5, 24).half())
layer = "model.layers.0.mlp.up_proj"
tensors |= {
    f"{layer}.weight": data,
    f"{layer}.SCB": scales,
    f"{layer}.weight_format": torch.tensor(0, dtype=torch.uint8),
}
weights[f"{layer}.weight"] = F.int8_vectorwise_dequant(data, scales)
save("bitsandbytes", {x: t.contiguous() for x, t in tensors.items()}, weights, {})

tensors, weights = {}, {}
for name, kind in {
    "qint8": qint8,
    "qfloat8": qfloat8,
    "qfloat8_e5m2": qfloat8_e5m2,
    "qint4": qint4,
    "qint2": qint2,
}.items():
    model = linear(5, 256, torch.float32)
    quantize(model, weights=kind)
    freeze(model)
    tensors |= {x.replace("layer", name): t for x, t in model.state_dict().items()}
    weights[f"{name}.weight"] = model["layer"].weight.dequantize()
save("quanto", tensors, weights, {})

tensors, weights, metadata = {}, {}, {}
CONFIGS = {
    "int8": Int8WeightOnlyConfig(),
    "int8_groups": Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "float8": Float8WeightOnlyConfig(),
    "float8_tensor": Float8WeightOnlyConfig(granularity=PerTensor()),
}
for name, config in CONFIGS.items():
    model = linear(6, 64, torch.float32)
    quantize_(model, config)
    flat, said = flatten_tensor_state_dict({f"{name}.weight": model["layer"].weight})
    tensors, metadata = tensors | flat, metadata | said
    weights[f"{name}.weight"] = model["layer"].weight.dequantize(torch.float32)
save("torchao", tensors, weights, metadata)
