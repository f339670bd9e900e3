"""Adapters in every spelling, made by hand: what each changes of our layers, compared with products in float64."""

import json

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.lora import read_adapter
from helpers.adapters import CONFIGS, D, changed, factors, lora, numbers, save

from flux2_mlx.adapters import Decomposed, LowRank
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo, write_safetensors

KOHYA = ("down", "up")
QKV, MLP = 3 * D, 6 * D
MODULE = "diffusion_model.double_blocks.0.img_attn.proj"
TENSORS = lora(MODULE, D)
Q = slice(0, D)


def product(tensors, scale=1.0):
    """The up factor times the down factor of the only LoRA among tensors."""
    down, up = (
        next(x for name, x in tensors.items() if any(y in name for y in z)) for z in (("_A", "down"), ("_B", "up"))
    )
    return scale * up.reshape(up.shape[:2]).astype(np.float64) @ down.reshape(down.shape[:2]).astype(np.float64)


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=2e-5, atol=2e-5 * np.abs(x).max(), err_msg=name)


# Each spelling of a module, what its layer gives, and what it is of ours.
SPELLINGS = [
    ("transformer.transformer_blocks.1.attn.to_out.0", D, "double_blocks.1.img_attn.proj"),
    ("transformer_blocks.1.ff_context.linear_in", MLP, "double_blocks.1.txt_mlp.0"),
    ("base_model.model.transformer_blocks.0.attn.to_add_out", D, "double_blocks.0.txt_attn.proj"),
    ("diffusion_model.sformer_blocks.0.ff.linear_in", MLP, "double_blocks.0.img_mlp.0"),
    ("transformer.transformer_blocks.0.attn.to_qkv", QKV, "double_blocks.0.img_attn.qkv"),
    ("transformer.transformer_blocks.0.attn.to_added_qkv", QKV, "double_blocks.0.txt_attn.qkv"),
    ("transformer.single_transformer_blocks.1.attn.to_qkv_mlp_proj", 9 * D, "single_blocks.1.linear1"),
    ("transformer.double_stream_modulation_txt.linear", 6 * D, "double_stream_modulation_txt.lin"),
    ("transformer.time_guidance_embed.timestep_embedder.linear_2", D, "time_in.out_layer"),
    ("diffusion_model.double_blocks.1.img_attn.qkv", QKV, "double_blocks.1.img_attn.qkv"),
    ("model.diffusion_model.single_blocks.0.linear1", 9 * D, "single_blocks.0.linear1"),
    ("base_model.model.double_blocks.0.txt_attn.proj", D, "double_blocks.0.txt_attn.proj"),
    ("diffusion_model.final_layer.adaLN_modulation.1", 2 * D, "final_layer.adaLN_modulation.1"),
    ("lora_unet_double_blocks_1_txt_mlp_0", MLP, "double_blocks.1.txt_mlp.0"),
    ("lora_unet_single_stream_modulation_lin", 3 * D, "single_stream_modulation.lin"),
    ("lora_unet_time_in_out_layer", D, "time_in.out_layer"),
    ("lora_unet_transformer_blocks_0_attn_to_out_0", D, "double_blocks.0.img_attn.proj"),
    ("lora_transformer_single_transformer_blocks_1_attn_to_qkv_mlp_proj", 9 * D, "single_blocks.1.linear1"),
    ("lycoris_transformer_blocks_0_ff_linear_in", MLP, "double_blocks.0.img_mlp.0"),
]


@pytest.mark.parametrize("ends", [("A", "B"), KOHYA, ("A__default", "B__default")], ids="/".join)
@pytest.mark.parametrize(("module", "outputs", "layer"), SPELLINGS)
def test_spellings_of_layers(module, outputs, layer, ends, tmp_path):
    tensors = lora(module, outputs, ends=ends)
    close(changed(save(tmp_path / "x.safetensors", tensors)), {f"transformer.{layer}": product(tensors)})


@pytest.mark.parametrize(
    ("names", "layer"),
    [
        (("to_q", "to_k", "to_v"), "double_blocks.0.img_attn.qkv"),
        (("add_q_proj", "add_k_proj", "add_v_proj"), "double_blocks.0.txt_attn.qkv"),
    ],
)
@pytest.mark.parametrize("form", ["transformer.transformer_blocks.0.attn.{}", "lora_unet_transformer_blocks_0_attn_{}"])
def test_projections_are_rows_of_the_fused_one(names, layer, form, tmp_path):
    parts = [lora(form.format(name), D, rank=2 + n, seed=n) for n, name in enumerate(names)]
    whole = np.concatenate([product(part) for part in parts])
    path = save(tmp_path / "x.safetensors", parts[0] | parts[1] | parts[2])
    close(changed(path), {f"transformer.{layer}": whole})
    some = whole * np.repeat([1, 0, 1], D)[:, None]
    close(changed(save(path, parts[0] | parts[2])), {f"transformer.{layer}": some})


def test_halves_of_the_final_modulation_are_exchanged(tmp_path):
    layer = "transformer.final_layer.adaLN_modulation.1"

    def swapped(x):
        return np.concatenate([x[D:], x[:D]])

    tensors = lora("transformer.norm_out.linear", 2 * D)
    close(changed(save(tmp_path / "x.safetensors", tensors)), {layer: swapped(product(tensors))})
    for rows in (2, 1):
        name = "transformer.norm_out.linear"
        lokr = factors(name, lokr_w1=(rows, 4), lokr_w2=(2 * D // rows, D // 4))
        kron = np.kron(*(x.astype(np.float64) for x in lokr.values()))
        close(changed(save(tmp_path / "x.safetensors", lokr)), {layer: swapped(kron)})
    loha = factors(name, hada_w1_a=(2 * D, 2), hada_w1_b=(2, D), hada_w2_a=(2 * D, 2), hada_w2_b=(2, D))
    a, b, c, d = (x.astype(np.float64) for x in loha.values())
    close(changed(save(tmp_path / "x.safetensors", loha)), {layer: swapped((a @ b) * (c @ d))})
    whole = factors(name, diff=(2 * D, D), diff_b=(2 * D,))
    close(
        changed(save(tmp_path / "x.safetensors", whole)),
        {x: swapped(y) for x, y in zip((layer, f"{layer}+b"), whole.values(), strict=True)},
    )


def test_magnitudes_are_exchanged_with_their_rows(tmp_path):
    tensors = lora("norm_out.linear", 2 * D) | factors("norm_out.linear", dora_scale=(2 * D, 1))
    found = read_adapter(save(tmp_path / "x.safetensors", tensors))
    (placed,) = found.load(CONFIGS, "x").layers["transformer"]["final_layer.adaLN_modulation.1"]
    assert isinstance(placed.change, Decomposed)
    assert isinstance(placed.change.change, LowRank)
    theirs = tensors["norm_out.linear.dora_scale"]
    np.testing.assert_array_equal(np.array(placed.change.magnitude), np.concatenate([theirs[D:], theirs[:D]]))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha(shape, tmp_path):
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = lora(module, QKV, ends=KOHYA)
    alpha = {f"{module}.alpha": np.full(shape, 1.5, np.float16)}
    path = save(tmp_path / "x.safetensors", tensors | alpha)
    close(changed(path), {"transformer.double_blocks.0.img_attn.qkv": product(tensors, 0.5)})
    assert read_adapter(path).scales() == {module: 0.5}


@pytest.mark.parametrize("zero", [True, False])
def test_a_rank_of_three_parts_is_not_split(zero, tmp_path):
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = lora(module, QKV, rank=6, ends=KOHYA)
    if zero:
        tensors[f"{module}.lora_up.weight"] *= np.kron(np.eye(3, dtype=np.float32), np.ones((D, 2), np.float32))
    path = save(tmp_path / "x.safetensors", tensors)
    close(changed(path), {"transformer.double_blocks.0.img_attn.qkv": product(tensors)})


def said(tmp_path, tensors, metadata):
    return changed(save(tmp_path / "x.safetensors", tensors, metadata))


def test_what_metadata_say_of_strength(tmp_path):
    module, layer = "transformer.single_transformer_blocks.0.attn.to_out", "transformer.single_blocks.0.linear2"
    tensors = lora(module, D, 4 * D, rank=4)
    values = {"transformer.r": 4, "transformer.lora_alpha": 8}
    for more, scale in (
        ({}, 2),
        ({"transformer.use_rslora": True}, 4),
        ({"transformer.use_rslora": "true"}, 4),
        ({"transformer.lora_alpha": None, "transformer.use_rslora": "false", "transformer.use_dora": None}, 2),
        ({"transformer.alpha_pattern": {r".*to_out": 2}}, 0.5),
        ({"transformer.alpha_pattern": {"attn.to_out": 2}}, 0.5),
        ({"transformer.alpha_pattern": {"single_transformer_blocks.1.attn.to_out": 2}}, 2),
        (
            {"transformer.r": 2, "transformer.rank_pattern": {r"^.*single_transformer_blocks\.0\.attn\.to_out$": 4}},
            2,
        ),
        ({"transformer.r": 2, "transformer.rank_pattern": {"to_out": 4}}, 2),
    ):
        metadata = {"lora_adapter_metadata": json.dumps(values | more)}
        close(said(tmp_path, tensors, metadata), {layer: product(tensors, scale)})
    close(said(tmp_path, tensors, {"lora_alpha": "2", "lora_rank": "4"}), {layer: product(tensors, 0.5)})
    close(said(tmp_path, tensors, {"format": "pt"}), {layer: product(tensors)})


def test_kronecker_products(tmp_path):
    module, layer = "diffusion_model.double_blocks.1.img_attn.qkv", "transformer.double_blocks.1.img_attn.qkv"
    path, alpha = tmp_path / "x.safetensors", {f"{module}.alpha": np.float32(3)}
    whole = factors(module, lokr_w1=(4, 8), lokr_w2=(QKV // 4, D // 8))
    w1, w2 = (x.astype(np.float64) for x in whole.values())
    huge = {f"{module}.alpha": mx.array(9999220736.0, mx.bfloat16)}  # as ai-toolkit writes it
    close(changed(save(path, whole | huge)), {layer: np.kron(w1, w2)})
    half = factors(module, lokr_w1=(4, 8), lokr_w2_a=(QKV // 4, 2), lokr_w2_b=(2, D // 8))
    w1, a, b = (x.astype(np.float64) for x in half.values())
    close(changed(save(path, half | alpha)), {layer: 1.5 * np.kron(w1, a @ b)})
    both = factors(module, lokr_w1_a=(4, 3), lokr_w1_b=(3, 8), lokr_w2_a=(QKV // 4, 2), lokr_w2_b=(2, D // 8))
    c, d, a, b = (x.astype(np.float64) for x in both.values())
    close(changed(save(path, both | alpha)), {layer: 1.5 * np.kron(c @ d, a @ b)})
    first = factors(module, lokr_w1_a=(4, 3), lokr_w1_b=(3, 8), lokr_w2=(QKV // 4, D // 8))
    c, d, w2 = (x.astype(np.float64) for x in first.values())
    close(changed(save(path, first | alpha)), {layer: np.kron(c @ d, w2)})
    core = factors(module, lokr_w1=(4, 8), lokr_t2=(2, 2, 1, 1), lokr_w2_a=(2, QKV // 4), lokr_w2_b=(2, D // 8))
    w1, t, a, b = (x.astype(np.float64) for x in core.values())
    close(changed(save(path, core | alpha)), {layer: 1.5 * np.kron(w1, a.T @ t[:, :, 0, 0] @ b)})


def test_hadamard_products(tmp_path):
    module, layer = "lora_unet_double_blocks_0_img_mlp_0", "transformer.double_blocks.0.img_mlp.0"
    path, alpha = tmp_path / "x.safetensors", {f"{module}.alpha": np.float32(3)}
    plain = factors(module, hada_w1_a=(MLP, 2), hada_w1_b=(2, D), hada_w2_a=(MLP, 2), hada_w2_b=(2, D))
    a, b, c, d = (x.astype(np.float64) for x in plain.values())
    close(changed(save(path, plain | alpha)), {layer: 1.5 * (a @ b) * (c @ d)})
    shapes = {"hada_w1_a": (2, MLP), "hada_w1_b": (2, D), "hada_w2_a": (2, MLP), "hada_w2_b": (2, D)}
    core = factors(module, **shapes, hada_t1=(2, 2, 1, 1), hada_t2=(2, 2, 1, 1))
    a, b, c, d, t, u = (x.astype(np.float64) for x in core.values())
    weight = (a.T @ t[:, :, 0, 0] @ b) * (c.T @ u[:, :, 0, 0] @ d)
    close(changed(save(path, core)), {layer: weight})


def test_convolutions_of_one_pixel_and_cores(tmp_path):
    module, layer = "lora_unet_double_blocks_0_txt_attn_proj", "transformer.double_blocks.0.txt_attn.proj"
    tensors = factors(module, lora_down__weight=(3, D, 1, 1), lora_up__weight=(D, 3, 1, 1))
    close(changed(save(tmp_path / "x.safetensors", tensors)), {layer: product(tensors)})
    middle = factors(module, seed=1, lora_mid__weight=(3, 3, 1, 1))
    core = middle[f"{module}.lora_mid.weight"][:, :, 0, 0].astype(np.float64)
    down, up = (x[:, :, 0, 0].astype(np.float64) for x in tensors.values())
    close(changed(save(tmp_path / "x.safetensors", tensors | middle)), {layer: up @ core @ down})


def test_differences_and_biases(tmp_path):
    start, layer = "diffusion_model.single_blocks.0.linear2", "transformer.single_blocks.0.linear2"
    tensors = factors(start, diff=(D, 4 * D), diff_b=(D,))
    close(
        changed(save(tmp_path / "x.safetensors", tensors)),
        dict(zip((layer, f"{layer}+b"), tensors.values(), strict=True)),
    )
    said_too = read_adapter(save(tmp_path / "x.safetensors", tensors, {"lora_alpha": "8", "lora_rank": "2"}))
    assert said_too.scales() == {start: 1}
    alone = {name: x for name, x in tensors.items() if name.endswith("diff_b")}
    close(changed(save(tmp_path / "x.safetensors", alone)), {f"{layer}+b": alone[f"{start}.diff_b"]})
    bias = lora(start, D, 4 * D) | factors(start, lora_B__bias=(D,))
    metadata = {"lora_adapter_metadata": json.dumps({"r": 3, "lora_alpha": 6})}
    found = said(tmp_path, bias, metadata)
    close(found, {layer: product(bias, 2), f"{layer}+b": 2.0 * bias[f"{start}.lora_B.bias"]})


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_dtypes_are_kept(dtype, tmp_path):
    tensors = {name: mx.array(x).astype(dtype) for name, x in lora("x_embedder", D, 16).items()}
    placed = read_adapter(save(tmp_path / "x.safetensors", tensors)).load(CONFIGS, "x").layers["transformer"]["img_in"]
    assert placed[0].change.down.dtype == placed[0].change.up.dtype == dtype


@pytest.mark.parametrize(
    "form",
    [
        "text_encoder.model.layers.{}.{}",
        "lora_te_model_layers_{}_{}",
        "lora_te1_layers_{}_{}",
        "text_encoders.qwen3_4b.transformer.model.layers.{}.{}",
        "base_model.model.model.layers.{}.{}",
        "text_encoder.base_model.model.model.layers.{}.{}",
    ],
)
def test_text_encoders(form, tmp_path):
    def module(layer, name):
        return form.format(layer, name.replace(".", "_") if "_te" in form else name)

    used = lora(module(3, "self_attn.q_proj"), 64, 64) | lora(module(26, "mlp.down_proj"), 64, 128)
    later = lora(module(30, "mlp.up_proj"), 128, 64)
    path = save(tmp_path / "x.safetensors", used | later)
    assert changed(path).keys() == {"text_encoder.layers.3.self_attn.q_proj", "text_encoder.layers.26.mlp.down_proj"}
    found = read_adapter(path)
    assert found.fates(CONFIGS)[next(iter(later))].startswith("(a layer of the text encoder")
    (note,) = found.notes(CONFIGS, "small")
    assert all(name in note for name in later)
    with pytest.raises(CheckpointError, match="changes no layer that images are made with"):
        found.check({"transformer": CONFIGS["transformer"]}, "small")


def save_in_8_bits(path, tensors, others=None):
    """Factors in 8 bits and other tensors in 32; and what the factors are then."""
    codes = {name: mx.to_fp8(mx.array(x)) for name, x in tensors.items()}
    others = {name: mx.array(x) for name, x in (others or {}).items()}
    infos = {name: TensorInfo("F8_E4M3", x.shape) for name, x in codes.items()}
    infos |= {name: TensorInfo("F32", x.shape) for name, x in others.items()}
    write_safetensors(path, infos, [*codes.values(), *others.values()], {}, lambda nbytes: None)
    return path, {name: np.array(mx.from_fp8(x, mx.float32)) for name, x in codes.items()}


@pytest.mark.parametrize("scale", [None, 0.5])
def test_factors_of_8_bits(scale, tmp_path):
    scales = {} if scale is None else {f"{name}_scale": np.full(1, scale, np.float32) for name in TENSORS}
    path, exact = save_in_8_bits(tmp_path / "x.safetensors", TENSORS, scales)
    close(changed(path), {"transformer.double_blocks.0.img_attn.proj": product(exact, (scale or 1) ** 2)})
    found = read_adapter(path)
    assert set(found.fates(CONFIGS).values()) == {"transformer.double_blocks.0.img_attn.proj"}
    assert found.fates(CONFIGS).keys() == found.files.infos.keys()


def test_factors_of_8_bits_beside_magnitudes(tmp_path):
    lengths = factors(MODULE, dora_scale=(D, 1))
    path, exact = save_in_8_bits(tmp_path / "x.safetensors", TENSORS, lengths)
    (placed,) = read_adapter(path).load(CONFIGS, "x").layers["transformer"]["double_blocks.0.img_attn.proj"]
    assert np.array_equal(numbers(placed.change.change.up), exact[f"{MODULE}.lora_B.weight"])
    assert np.array_equal(numbers(placed.change.magnitude), lengths[f"{MODULE}.dora_scale"])


def test_factors_of_8_bits_of_which_one_has_no_scale(tmp_path):
    scales = {f"{MODULE}.lora_A.weight_scale": np.ones(1, np.float32)}
    path, _ = save_in_8_bits(tmp_path / "x.safetensors", TENSORS, scales)
    with pytest.raises(CheckpointError, match=r"lora_B\.weight is F8_E4M3 and has no scale"):
        read_adapter(path)
