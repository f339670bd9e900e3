"""Which model an adapter is for: headers of files of full size as trainers write them."""

from collections.abc import Iterable

import pytest
from flux2_mlx.convert.lora import read_adapter
from helpers.adapter_headers import DIFFUSERS, KOHYA, REST, ai_toolkit, lora, modules
from helpers.headers import Infos, write

from flux2_mlx.config import VARIANTS, variant_named
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo

FOUR, NINE = ("klein-4b", "klein-base-4b"), ("klein-9b", "klein-base-9b", "klein-9b-kv")


def configs(model: str) -> dict:
    row = variant_named(model)
    return {"transformer": row.transformer, "text_encoder": row.text}


def turbo() -> Infos:
    """All layers of klein 9B, with original names and those of kohya's factors: 242 tensors."""
    infos = lora(modules("klein-9b") | REST, 4096, ends=KOHYA, rank=128)
    for name, inputs, outputs in (
        ("img_in", 128, 4096),
        ("txt_in", 12288, 4096),
        ("time_in.in_layer", 256, 4096),
        ("final_layer.linear", 4096, 128),
    ):
        infos[f"diffusion_model.{name}.lora_down.weight"] = TensorInfo("BF16", (128, inputs))
        infos[f"diffusion_model.{name}.lora_up.weight"] = TensorInfo("BF16", (outputs, 128))
    return infos


def musubi(model: str) -> Infos:
    width = VARIANTS[model].transformer.hidden_size
    return lora(modules(model), width, "lora_unet_", KOHYA, alpha=True, flat=True)


def peft(model: str) -> Infos:
    single = {"attn.to_qkv_mlp_proj": (1, 9), "attn.to_out": (4, 1)}
    blocks = ("transformer_blocks", "single_transformer_blocks")
    return lora(modules(model, DIFFUSERS, single, blocks), VARIANTS[model].transformer.hidden_size, "transformer.")


def lokr(model: str) -> Infos:
    """As ai-toolkit writes it: both factors whole."""
    infos: Infos = {}
    width = VARIANTS[model].transformer.hidden_size
    for name, (inputs, outputs) in modules(model).items():
        infos[f"diffusion_model.{name}.alpha"] = TensorInfo("BF16", ())
        infos[f"diffusion_model.{name}.lokr_w1"] = TensorInfo("BF16", (16, 16))
        infos[f"diffusion_model.{name}.lokr_w2"] = TensorInfo("BF16", (outputs * width // 16, inputs * width // 16))
    return infos


@pytest.mark.parametrize(
    ("infos", "count", "models", "naming"),
    [
        (ai_toolkit("klein-4b"), 160, FOUR, "the original release"),
        (turbo(), 242, NINE, "the original release"),
        (musubi("dev"), 480, ("dev",), "kohya"),
        (peft("klein-9b"), 288, NINE, "diffusers"),
        (lokr("klein-9b"), 336, NINE, "the original release"),
    ],
    ids=["ai-toolkit", "turbo", "musubi", "peft", "lokr"],
)
def test_each_tensor_of_public_files_is_accounted_for(infos, count, models, naming, tmp_path):
    assert len(infos) == count
    found = read_adapter(write(tmp_path / "x.safetensors", infos))
    assert (found.models, found.naming, found.unknown) == (models, naming, ())
    fates = found.fates(configs(models[0]))
    assert fates.keys() == infos.keys()
    assert all(fate.startswith("transformer.") for fate in fates.values())
    for model in VARIANTS:
        if model in models:
            found.check(configs(model), model)
        else:
            with pytest.raises(CheckpointError, match=f" for {' or '.join(models)}, which can't be used with {model}"):
                found.check(configs(model), model)


def test_some_blocks_are_enough(tmp_path):
    sizes = {"double_blocks.3.img_attn.proj": (1, 1), "single_blocks.7.linear1": (1, 9)}
    found = read_adapter(write(tmp_path / "x.safetensors", lora(sizes, 3072)))
    found.check(configs("klein-4b"), "klein-4b")
    assert not found.notes(configs("klein-4b"), "klein-4b")
    attention = lora({"double_blocks.3.img_attn.proj": (1, 1)}, 3072)
    notes = read_adapter(write(tmp_path / "y.safetensors", attention)).notes(configs("klein-4b"), "klein-4b")
    assert notes == ["it may be for FLUX.1, which has layers of the same sizes"]


def kohya(modules: Iterable[str], *shapes: tuple[int, ...]) -> Infos:
    return {f"{x}.{end}": TensorInfo("F16", y) for x in modules for end, y in zip(KOHYA, shapes, strict=True)}


def test_flux1_of_the_same_width(tmp_path):
    infos = kohya(["lora_unet_double_blocks_18_img_attn_proj"], (4, 3072), (3072, 4))
    infos |= kohya(["lora_unet_single_blocks_37_linear1"], (4, 3072), (21504, 4))
    found = read_adapter(write(tmp_path / "x.safetensors", infos))
    assert found.models == ()
    with pytest.raises(CheckpointError, match=r"is a LoRA for FLUX\.1, which can't be used with klein-4b"):
        found.check(configs("klein-4b"), "klein-4b")


@pytest.mark.parametrize(
    ("module", "model"),
    [
        ("lora_unet_double_blocks_0_img_mod_lin", "FLUX.1"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "FLUX.1"),
        ("transformer.single_transformer_blocks.0.norm.linear", "FLUX.1"),
        ("transformer.transformer_blocks.0.norm1.linear", "FLUX.1 or Stable Diffusion 3"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_5_attn1_to_q", "Stable Diffusion XL"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "Stable Diffusion XL"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "Stable Diffusion"),
        ("transformer.transformer_blocks.7.img_mlp.net.0.proj", "Qwen-Image"),
        ("diffusion_model.layers.0.attention.to_q", "Z-Image or Lumina 2"),
        ("diffusion_model.blocks.0.cross_attn.k", "Wan"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv", "Stable Diffusion 3"),
        ("diffusion_model.double_blocks.0.img_mod.linear", "HunyuanVideo"),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "a model that reads prompts with CLIP or T5"),
    ],
)
def test_adapters_of_other_models(module, model, tmp_path):
    # Also beside a layer that would fit.
    for more in ({}, kohya(["lora_unet_double_blocks_0_img_attn_proj"], (4, 3072), (3072, 4))):
        infos = kohya([module], (4, 3072), (3072, 4)) | more
        with pytest.raises(CheckpointError, match=f"it is an adapter for {model}; give one for FLUX"):
            read_adapter(write(tmp_path / "x.safetensors", infos))


def test_what_fits_no_model(tmp_path):
    infos = lora({"double_blocks.0.img_attn.proj": (1, 1), "double_blocks.1.img_mlp.0": (1, 5)}, 4096)
    found = read_adapter(write(tmp_path / "x.safetensors", infos))
    match = (
        r"is a LoRA of another model than klein-9b: diffusion_model\.double_blocks\.1\.img_mlp\.0 is for a layer of \["
    )
    with pytest.raises(CheckpointError, match=match):
        found.check(configs("klein-9b"), "klein-9b")
    beyond = lora({"double_blocks.0.img_attn.qkv": (1, 3), "double_blocks.8.img_attn.qkv": (1, 3)}, 4096)
    found = read_adapter(write(tmp_path / "y.safetensors", beyond))
    with pytest.raises(CheckpointError, match=r"double_blocks\.8\.img_attn\.qkv is of no layer that it has"):
        found.check(configs("klein-9b"), "klein-9b")


@pytest.mark.parametrize(
    ("metadata", "file", "trained_on"),
    [
        ({"modelspec.architecture": "flux-2-klein-base-9b/lora"}, "x", "klein-base-9b"),
        ({"ss_base_model_version": "flux2_klein_9b"}, "x", None),
        ({}, "style_klein_base_9b", "klein-base-9b"),
    ],
)
def test_an_adapter_of_the_base_model_is_used_and_said(metadata, file, trained_on, tmp_path):
    found = read_adapter(write(tmp_path / f"{file}.safetensors", ai_toolkit("klein-9b"), metadata))
    found.check(configs("klein-9b"), "klein-9b")
    assert found.trained_on == trained_on
    said = [f"it was trained on {trained_on}, whose layers are those of klein-9b"] if trained_on else []
    assert found.notes(configs("klein-9b"), "klein-9b") == said
    assert not found.notes(configs("klein-base-9b"), "klein-base-9b")


def test_what_a_trainer_says(tmp_path):
    metadata = {
        "software": '{"name": "ai-toolkit", "version": "0.7"}',
        "ss_output_name": "fox",
        "modelspec.trigger_phrase": " f0x ",
        "ss_tag_frequency": '{"1_f0x": {"f0x": 1}}',
    }
    said = read_adapter(write(tmp_path / "x.safetensors", ai_toolkit("klein-4b"), metadata)).said
    assert (said.trainer, said.title, said.trigger_words) == ("ai-toolkit", "fox", ("f0x",))
    captions = {"ss_tag_frequency": '{"2_a": {"a dog": 1, "a cat": 3}}', "ss_network_module": "networks.lora_flux_2"}
    said = read_adapter(write(tmp_path / "y.safetensors", ai_toolkit("klein-4b"), captions)).said
    assert (said.trainer, said.title, said.trigger_words) == ("musubi-tuner", None, ())


@pytest.mark.parametrize(
    ("text", "words"),
    [('["f0x", " a dog ", 3, null, ""]', ("f0x", "a dog")), ("[]", ()), ("[f0x]", ("[f0x]",))]
    + [(text, ()) for text in ("", "None", "null", " NULL ")],
)
def test_trigger_words(text, words, tmp_path):
    path = write(tmp_path / "x.safetensors", ai_toolkit("klein-4b"), {"trigger_words": text})
    assert read_adapter(path).said.trigger_words == words
