"""Codes, scales and errors of quantized weights, and what `config.json` says about them."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flux2_mlx.checkpoint import Component, variant_components
from flux2_mlx.config import VARIANTS, TransformerConfig, check_quant
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.loading import module_tensors
from flux2_mlx.quantization import (
    BITS,
    GROUP_SIZE,
    Quantized,
    is_quantizable,
    quantize_array,
    quantize_module,
    quantizing_bytes,
    statement,
)
from flux2_mlx.transformer import image_ids, rope_table, text_ids
from flux2_mlx.weights import Files, TensorInfo

DEMO = VARIANTS["demo"]
CONFIGS = {"transformer": DEMO.transformer, "text_encoder": DEMO.text, "vae": DEMO.vae}
# ‖quantized − float32‖ / ‖float32‖ of whole networks of the demo's geometry with random weights, as measured.
NETWORK_ERRORS = {
    ("transformer", "qint8"): 0.0072,
    ("transformer", "qint4"): 0.114,
    ("text_encoder", "qint8"): 0.0186,
    ("text_encoder", "qint4"): 0.286,
}


def normal(*shape: int, seed: int = 0) -> mx.array:
    """Normal weights as they come to quantization: bfloat16 values, here in float32."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16).astype(mx.float32)


def dequantize(arrays: dict[str, mx.array], bits: int) -> mx.array:
    scales, biases = (arrays[name].astype(mx.float32) for name in ("scales", "biases"))
    return mx.dequantize(arrays["weight"], scales, biases, group_size=GROUP_SIZE, bits=bits)


def relative_error(a: mx.array, b: mx.array) -> float:
    return (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()


def layers_of(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    tensors = module_tensors(module).items()
    return [(name.removesuffix(".weight"), tensor.shape) for name, tensor in tensors if len(tensor.shape) == 2]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_representable_weights_come_back_exactly(bits):
    top = 2**bits - 1
    codes = np.random.default_rng(0).integers(0, top + 1, (6, 3, GROUP_SIZE))
    codes[..., :2] = (0, top)  # so that each group spans the whole range
    scale = np.float32(2.0) ** np.arange(-3, 3)[:, None, None]
    weight = ((codes - 2 ** (bits - 1)) * scale).reshape(6, -1)
    arrays = quantize_array(mx.array(weight, dtype=mx.float32), bits)
    assert [(name, arrays[name].dtype, arrays[name].shape) for name in ("weight", "scales", "biases")] == [
        ("weight", mx.uint32, (6, 3 * GROUP_SIZE * bits // 32)),
        ("scales", mx.bfloat16, (6, 3)),
        ("biases", mx.bfloat16, (6, 3)),
    ]
    np.testing.assert_array_equal(np.array(dequantize(arrays, bits)), weight)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_every_code_is_the_nearest_for_the_stored_scale(bits):
    weight = normal(32, 256)
    arrays = quantize_array(weight, bits)
    scales, biases = (np.array(arrays[name].astype(mx.float32))[..., None] for name in ("scales", "biases"))
    groups = np.array(weight).reshape(32, -1, GROUP_SIZE)
    choices = biases[..., None] + scales[..., None] * np.arange(2**bits)
    nearest = np.abs(groups[..., None] - choices).min(axis=-1)
    chosen = np.abs(groups - np.array(dequantize(arrays, bits)).reshape(groups.shape))
    np.testing.assert_allclose(chosen, nearest, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("bits", "gain"), [(4, 1.0), (6, 0.985), (8, 0.85)])
def test_error_is_not_larger_than_that_of_mlx(bits, gain, seed):
    weight = normal(96, 512, seed=seed)
    names = ("weight", "scales", "biases")
    theirs = dict(zip(names, mx.quantize(weight.astype(mx.bfloat16), group_size=GROUP_SIZE, bits=bits), strict=True))
    assert theirs["scales"].dtype == mx.bfloat16
    ours = relative_error(dequantize(quantize_array(weight, bits), bits), weight)
    assert ours < gain * relative_error(dequantize(theirs, bits), weight)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_flat_groups(bits):
    values = mx.array([0.0, 1.0, -1.0, 0.015625, -300.0, 1e-3, 3.14159])[:, None]
    weight = mx.broadcast_to(values, (7, 2 * GROUP_SIZE))
    arrays = quantize_array(weight, bits)
    assert all(mx.isfinite(arrays[name]).all().item() for name in ("scales", "biases"))
    got = np.array(dequantize(arrays, bits))
    assert (got[0] == 0).all()
    np.testing.assert_allclose(got[1:5], np.array(weight[1:5]), rtol=1e-6)  # bfloat16 holds these
    np.testing.assert_allclose(got[5:], np.array(weight[5:]), rtol=2**-8)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_one_flat_group_leaves_its_neighbours_alone(bits):
    weight = normal(4, 3 * GROUP_SIZE)
    weight[:, GROUP_SIZE : 2 * GROUP_SIZE] = 0
    got = dequantize(quantize_array(weight, bits), bits)
    assert (got[:, GROUP_SIZE : 2 * GROUP_SIZE] == 0).all().item()
    assert relative_error(got, weight) < {4: 0.1, 6: 0.025, 8: 0.007}[bits]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_mlx_layers_compute_with_the_arrays(bits):
    weight, x, ids = normal(48, 128), normal(3, 128, seed=1), mx.array([[0, 47, 5]])
    arrays = quantize_array(weight, bits)
    dense = dequantize(arrays, bits)
    assert relative_error(dense, weight) < {4: 0.1, 6: 0.025, 8: 0.007}[bits]
    loadable = [(k, v if k == "weight" else v.astype(mx.float32)) for k, v in arrays.items()]
    linear = nn.QuantizedLinear(128, 48, bias=False, group_size=GROUP_SIZE, bits=bits).load_weights(loadable)
    embedding = nn.QuantizedEmbedding(48, 128, group_size=GROUP_SIZE, bits=bits).load_weights(loadable)
    assert relative_error(linear(x), x @ dense.T) < 1e-6
    np.testing.assert_array_equal(np.array(embedding(ids)), np.array(dense[ids]))


@pytest.mark.parametrize(
    ("component", "shape", "expected"),
    [
        ("transformer", (192, 64), True),
        ("text_encoder", (151936, 2560), True),
        ("transformer", (64, 96), False),
        ("transformer", (128,), False),
        ("transformer", (64, 3, 3, 64), False),
        ("vae", (512, 512), False),
    ],
)
def test_is_quantizable(component, shape, expected):
    assert is_quantizable(component, shape) is expected


def test_statement_lists_what_is_spared():
    layers = [("img_in", (128, 32)), ("txt_in", (128, 384)), ("odd", (64, 65))]
    expected = {"group_size": 64, "mode": "affine", "img_in": False, "odd": False}
    assert statement("qint8", "transformer", layers) == expected | {"bits": 8}
    assert statement("qint4", "text_encoder", layers) == expected | {"bits": 4}
    assert statement("bf16", "transformer", layers) is None
    assert statement("qint8", "vae", layers) is None


def test_unknown_quantization_is_refused():
    assert [check_quant(quant) for quant in BITS] == ["bf16", "qint8", "qint6", "mixed4", "qint4"]
    with pytest.raises(InputError, match=f"unknown quantization 'int8'; choose one of {', '.join(BITS)}$"):
        check_quant("int8")


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_modules_are_quantized_as_stated(component, bits):
    plain = Component(component, CONFIGS[component], None, ()).build()
    shapes = dict(layers_of(plain))
    spared = {name for name, shape in shapes.items() if shape[-1] % GROUP_SIZE}
    quantize_module(plain, statement(f"qint{bits}", component, layers_of(plain)))
    quantized = {name: layer for name, layer in plain.named_modules() if hasattr(layer, "bits")}
    assert set(quantized) == set(shapes) - spared
    assert {(layer.group_size, layer.bits, layer.mode) for layer in quantized.values()} == {(64, bits, "affine")}
    assert spared == ({"img_in"} if component == "transformer" else set())


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "mxfp4"},
        {"mode": "nvfp4"},
        {"mode": None},
        {"bits": 3},
        {"group_size": 32},
        {"img_in": True},
        {"img_in": {"group_size": 32, "bits": 8, "mode": "mxfp8"}},
    ],
)
def test_what_is_not_implemented_is_not_built_as_something_else(change):
    config = TransformerConfig(1, 1, 2, 64, 32, 64, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)
    component = Component("transformer", config, None, ()).quantized("qint4")
    assert component.build()
    changed = replace(component, quantization=component.quantization | change)
    with pytest.raises(CheckpointError, match=f"quantization.'?{next(iter(change))}'? is "):
        changed.build()


@pytest.mark.parametrize("quant", ["qint8", "qint4"])
@pytest.mark.parametrize("variant", ["demo", "klein-4b", "dev"])
def test_counted_tensors_are_those_of_the_built_network(variant, quant):
    for component in variant_components(VARIANTS[variant], quant, quant).values():
        assert list(component.infos.items()) == list(module_tensors(component.build()).items())


def test_tensors_of_a_module_are_of_its_own_dtypes():
    module = nn.Module()
    codes = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U8": mx.uint8, "U32": mx.uint32}
    for code, dtype in codes.items():
        setattr(module, code, mx.zeros((2, 3), dtype))
    assert {name: info.dtype for name, info in module_tensors(module).items()} == {code: code for code in codes}


@pytest.mark.parametrize("quant", ["bf16", "qint8", "qint6", "mixed4", "qint4"])
def test_a_network_is_built_as_it_is_stored(quant):
    component = Component("text_encoder", DEMO.text, None, ()).quantized(quant)
    dtypes = {name: array.dtype for name, array in tree_flatten(component.build().parameters())}
    packed = {f"{layer.rpartition('.')[0]}.weight" for layer in dtypes if layer.endswith(".scales")}
    assert bool(packed) == (quant != "bf16")
    assert dtypes == {name: mx.uint32 if name in packed else mx.bfloat16 for name in dtypes}


def test_modules_without_statement_stay_as_they_are():
    module = Component("text_encoder", DEMO.text, None, ()).build()
    before = module_tensors(module)
    quantize_module(module, None)
    assert module_tensors(module) == before


def run(component: str, network: nn.Module) -> mx.array:
    if component == "text_encoder":
        ids = mx.random.randint(0, DEMO.text.vocab_size, (2, 24), key=mx.random.key(1))
        return network(ids, mx.arange(24)[None] < mx.array([[24], [9]]))
    rope = rope_table(np.concatenate([text_ids(12), image_ids(4, 4)]), DEMO.transformer)
    txt = network.txt_in(normal(1, 12, DEMO.transformer.joint_attention_dim, seed=1))
    return network(normal(1, 16, DEMO.transformer.in_channels, seed=2), txt, mx.array([0.7672]), rope)


def random_weights(network: nn.Module) -> dict[str, mx.array]:
    weights = {}
    for seed, (name, x) in enumerate(tree_flatten(network.parameters())):
        scale = mx.array(x.shape[-1] ** -0.5, dtype=mx.bfloat16)
        weights[name] = normal(*x.shape, seed=seed) * scale if x.ndim > 1 else mx.ones(x.shape)
    return weights


def stored(name: str, x: mx.array, quant: str, spared: set[str]) -> list[tuple[str, mx.array]]:
    base = name.removesuffix(".weight")
    if x.ndim == 1 or base in spared:
        return [(name, x)]
    arrays = quantize_array(x, BITS[quant])
    return [(f"{base}.{k}", v if k == "weight" else v.astype(mx.float32)) for k, v in arrays.items()]


@pytest.mark.parametrize(("component", "quant"), NETWORK_ERRORS)
def test_error_of_a_quantized_network(component, quant):
    config = CONFIGS[component]
    exact = Component(component, config, None, ()).build()
    weights = random_weights(exact)
    exact.load_weights(list(weights.items()))
    quantization = statement(quant, component, layers_of(exact))
    quantized = Component(component, config, quantization, ()).build()
    spared = {name for name, value in quantization.items() if value is False}
    quantized.load_weights([pair for name, x in weights.items() for pair in stored(name, x, quant, spared)])
    error = relative_error(run(component, quantized), run(component, exact))
    assert error == pytest.approx(NETWORK_ERRORS[component, quant], rel=0.15)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_values_too_far_apart_for_a_scale_are_refused(bits, tmp_path):
    weight = normal(4, 64).astype(mx.bfloat16)
    weight[1, 3:5] = mx.array([3.3e38, -3.3e38])
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a.weight": weight})
    packed = quantize_array(normal(4, 64), bits)
    stored = {f"a.{part}": TensorInfo("BF16", array.shape) for part, array in packed.items()}
    quantization = {"group_size": 64, "bits": bits, "mode": "affine"}
    with pytest.raises(CheckpointError, match=r"^a\.weight has values too large to be quantized"):
        list(Quantized(Files([tmp_path / "a.safetensors"]), stored, quantization).read(stored))


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_quantizing_takes_no_more_than_is_counted(bits):
    weight = mx.random.normal((1024, 1024)).astype(mx.bfloat16)
    mx.eval(weight)
    mx.clear_cache()
    held = mx.get_active_memory() - weight.nbytes
    mx.reset_peak_memory()
    made = sum(part.nbytes for part in quantize_array(weight, bits).values())
    assert mx.get_peak_memory() - held - made <= quantizing_bytes(weight.shape)
