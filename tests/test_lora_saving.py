"""Adapters written as diffusers has them: what they change stays, and the file comes whole or not at all."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert.lora import read_adapter, save_adapter, saving_notes
from helpers.adapters import CONFIGS, D, changed, factors, lora, numbers, save

from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.staging import is_work
from flux2_mlx.weights import read_header

QKV, MLP = 3 * D, 6 * D
PROJ, LINEAR = "double_blocks.1.img_attn.proj", "single_blocks.0.linear1"


def saved(tensors, tmp_path, metadata=None):
    """What a file of these tensors changes, and the one that is made of it."""
    source = save(tmp_path / "source.safetensors", tensors, metadata)
    return changed(source), save_adapter(read_adapter(source), tmp_path / "target")


def said(path):
    return json.loads(read_adapter(path).files.metadata["lora_adapter_metadata"])


CASES = {
    "fused": (lora("diffusion_model.double_blocks.0.img_attn.qkv", QKV), 3),
    "apart": (lora("transformer.transformer_blocks.0.attn.add_k_proj", D), 3),
    "swapped": (lora("diffusion_model.final_layer.adaLN_modulation.1", 2 * D), 3),
    "swapped before": (lora("transformer.norm_out.linear", 2 * D), 3),
    "alpha": (lora("lora_unet_single_blocks_0_linear1", 9 * D, ends=("down", "up")), 3),
    "bias": (lora(f"diffusion_model.{PROJ}", D) | factors(f"diffusion_model.{PROJ}", diff_b=(D,)), 3),
    "LoHa": (
        factors(f"diffusion_model.{PROJ}", hada_w1_a=(D, 2), hada_w1_b=(2, D), hada_w2_a=(D, 3), hada_w2_b=(3, D)),
        6,
    ),
    "LoHa of many ranks": (
        factors("diffusion_model.img_in", hada_w1_a=(D, 6), hada_w1_b=(6, 16), hada_w2_a=(D, 6), hada_w2_b=(6, 16)),
        16,
    ),
    "LoKr": (factors(f"lycoris_{PROJ.replace('.', '_')}", lokr_w1=(4, 2), lokr_w2_a=(D // 4, 2), lokr_w2_b=(2, 32)), 4),
    "LoKr of two pairs": (
        factors(
            f"diffusion_model.{LINEAR}",
            lokr_w1_a=(9, 2),
            lokr_w1_b=(2, 8),
            lokr_w2_a=(D, 3),
            lokr_w2_b=(3, D // 8),
        ),
        6,
    ),
    "LoKr of whole matrices": (
        factors("diffusion_model.double_blocks.0.txt_attn.qkv", lokr_w1=(4, 4), lokr_w2=(QKV // 4, D // 4)),
        D,
    ),
    "difference": (factors("diffusion_model.double_blocks.0.img_mlp.2", diff=(D, 3 * D)), D),
    "text": (lora("text_encoder.model.layers.0.self_attn.q_proj", 64, 64), 3),
}


@pytest.mark.parametrize("name", CASES)
def test_what_it_changes_stays(name, tmp_path):
    tensors, rank = CASES[name]
    if name == "alpha":
        tensors = tensors | {"lora_unet_single_blocks_0_linear1.alpha": np.array(0.7, np.float32)}
    before, path = saved(tensors, tmp_path)
    after = changed(path)
    assert after.keys() == before.keys()
    for layer, x in before.items():
        np.testing.assert_allclose(after[layer], x, rtol=2e-5, atol=2e-5 * np.abs(x).max())
    assert read_adapter(path).kinds == ("LoRA",)
    assert {*read_adapter(path).scales().values()} == {1.0}
    assert read_adapter(path).ranks == (rank,)


def test_names_and_config_of_diffusers(tmp_path):
    tensors = lora("diffusion_model.double_blocks.1.img_attn.qkv", QKV, rank=4)
    tensors |= lora(f"diffusion_model.{LINEAR}", 9 * D, rank=2)
    metadata = {"lora_alpha": "8", "modelspec.title": "Toy", "trigger_word": "t0y", "base_model": "FLUX.2-klein-4B"}
    _, path = saved(tensors, tmp_path, metadata)
    assert path == tmp_path / "target" / "pytorch_lora_weights.safetensors"
    names = [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"]
    linear = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    halves = ("lora_A.weight", "lora_B.weight")
    assert {*read_header(path)} == {f"transformer.{name}.{half}" for name in (*names, linear) for half in halves}
    assert said(path) == {
        "transformer.peft_type": "LORA",
        "transformer.r": 4,
        "transformer.lora_alpha": 4,
        "transformer.rank_pattern": {linear: 2},
        "transformer.alpha_pattern": {linear: 2},
        "transformer.target_modules": sorted([linear, *names]),
        "transformer.use_dora": False,
        "transformer.lora_bias": False,
    }
    found = read_adapter(path).said
    assert (found.title, found.trigger_words, found.bases) == ("Toy", ("t0y",), ("FLUX.2-klein-4B",))


@pytest.mark.parametrize(
    ("alpha", "dtype", "kept"),
    [(3.0, "F16", "F16"), (1.5, "BF16", "BF16"), (1.5, "F16", "F32"), (2.0, "BF16", "F32")],
)
def test_alpha_rounds_nothing(alpha, dtype, kept, tmp_path):
    module = f"lora_unet_{PROJ.replace('.', '_')}"
    own = {"F16": mx.float16, "BF16": mx.bfloat16}[dtype]
    tensors = {name: mx.array(x).astype(own) for name, x in lora(module, D, ends=("down", "up")).items()}
    before, path = saved(tensors | {f"{module}.alpha": np.array(alpha, np.float32)}, tmp_path)
    dtypes = {name.rpartition("lora_")[2]: info.dtype for name, info in read_header(path).items()}
    assert dtypes == {"A.weight": dtype, "B.weight": kept}
    layer = f"transformer.{PROJ}"
    np.testing.assert_allclose(changed(path)[layer], before[layer], rtol=1e-5, atol=1e-6)


def test_dora_keeps_its_lengths(tmp_path):
    module = "diffusion_model.double_blocks.0.img_attn.qkv"
    source = save(tmp_path / "source.safetensors", lora(module, QKV) | factors(module, dora_scale=(QKV, 1)))
    path = save_adapter(read_adapter(source), tmp_path / "target.safetensors")
    assert said(path)["transformer.use_dora"] is True
    assert read_adapter(path).kinds == ("LoRA", "DoRA")
    before, after = (read_adapter(x).load(CONFIGS, "x").layers["transformer"] for x in (source, path))
    ((whole,), parts) = before["double_blocks.0.img_attn.qkv"], after["double_blocks.0.img_attn.qkv"]
    assert [placed.rows for placed in parts] == [slice(n * D, (n + 1) * D) for n in range(3)]
    theirs = np.concatenate([numbers(placed.change.magnitude) for placed in parts])
    np.testing.assert_array_equal(theirs, numbers(whole.change.magnitude))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (factors(f"diffusion_model.{PROJ}", diff_b=(D,)), "changes by a bias alone"),
        (
            lora(f"diffusion_model.{PROJ}", D)
            | factors(f"diffusion_model.{PROJ}", dora_scale=(D, 1))
            | lora(f"diffusion_model.{LINEAR}", 9 * D),
            "some layers of .* are DoRA and others are not",
        ),
        (
            lora(f"diffusion_model.{PROJ}", D) | factors(f"diffusion_model.{PROJ}", dora_scale=(1, D)),
            "DoRA with lengths of columns",
        ),
        (
            lora(f"diffusion_model.{PROJ}", D) | factors(f"diffusion_model.{PROJ}", dora_scale=(D, 1), diff_b=(D,)),
            "DoRA with changes of biases",
        ),
    ],
)
def test_what_diffusers_has_no_form_of_is_refused(tensors, said, tmp_path):
    source = save(tmp_path / "source.safetensors", tensors)
    with pytest.raises(CheckpointError, match=said):
        save_adapter(read_adapter(source), tmp_path / "target.safetensors")
    assert [*tmp_path.iterdir()] == [source]


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    found = read_adapter(save(tmp_path / "source.safetensors", CASES["fused"][0]))
    target = tmp_path / "target.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
        with pytest.raises(InputError, match="no space: the adapter takes"):
            save_adapter(found, target)
    assert not target.exists()
    seen = []
    save_adapter(found, target, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    first = target.read_bytes()
    with pytest.raises(InputError, match="exists; choose another name or pass force=True"):
        save_adapter(read_adapter(save(tmp_path / "other.safetensors", CASES["difference"][0])), target)
    assert target.read_bytes() == first
    save_adapter(read_adapter(tmp_path / "other.safetensors"), target, force=True)
    assert target.read_bytes() != first
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match="is no file"):
        save_adapter(found, tmp_path / "folder.safetensors", force=True)
    assert not [path for path in tmp_path.iterdir() if is_work(path)]


def test_a_config_is_about_no_file_that_tells_its_strength(tmp_path):
    source = save(tmp_path / "source.safetensors", CASES["fused"][0])
    for name in ("adapter_model.safetensors", "x.safetensors"):
        path = save_adapter(read_adapter(source), tmp_path / name.split(".")[0] / name)
        path.with_name("adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}')
        found = read_adapter(path)
        assert {*found.scales().values()} == {1.0}
        assert not found.is_config_aside
        assert save_adapter(read_adapter(source), path.with_name("x.safetensors"), force=True)


def test_a_config_stays_with_the_file_that_it_is_about(tmp_path):
    tensors = CASES["fused"][0]
    (tmp_path / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}')
    source = save(tmp_path / "style.safetensors", tensors)
    found = read_adapter(source)
    with pytest.raises(InputError, match=r"config\.json is about style\.safetensors, as no other adapter is there"):
        save_adapter(found, tmp_path / "new.safetensors")
    with pytest.raises(InputError, match=r"PEFT would apply .*_config\.json to .*adapter_model\.safetensors; choose"):
        save_adapter(found, tmp_path / "adapter_model.safetensors", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "style.safetensors"}
    before = changed(source)
    after = changed(save_adapter(found, source, force=True))
    assert before.keys() == after.keys()
    assert all(np.allclose(before[layer], after[layer], rtol=1e-5) for layer in before)
    save(tmp_path / "adapter_model.safetensors", tensors)
    save_adapter(read_adapter(source), tmp_path / "new.safetensors")


def test_values_that_are_not_finite_leave_no_file(tmp_path):
    tensors = CASES["fused"][0]
    damaged = {name: np.where(np.arange(x.size).reshape(x.shape) == 1, np.nan, x) for name, x in tensors.items()}
    source = save(tmp_path / "source.safetensors", damaged)
    with pytest.raises(CheckpointError, match="not finite"):
        save_adapter(read_adapter(source), tmp_path / "target.safetensors")
    assert [*tmp_path.iterdir()] == [source]


def test_what_a_user_should_know(tmp_path):
    tensors = CASES["LoHa"][0] | CASES["text"][0] | {"other.lora_A.weight": np.zeros((2, 2), np.float32)}
    tensors["other.lora_B.weight"] = np.zeros((2, 2), np.float32)
    notes = saving_notes(read_adapter(save(tmp_path / "source.safetensors", tensors)))
    assert [note.partition(" ")[0] for note in notes] == ["LoHa", "diffusers", "it", "2"]
