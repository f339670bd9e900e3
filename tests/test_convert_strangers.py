"""What is no model of this program is named by its tensors."""

import pytest
from flux2_mlx.convert import naming, strangers
from helpers.listings import FLUX1, SDXL, listing, named

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo

FOUR, NINE = ("klein-4b", "klein-base-4b"), ("klein-9b", "klein-base-9b", "klein-9b-kv")
PREFIX = "model.diffusion_model."


def tensors(**shapes):
    """Tensors of these shapes; `__` stands for dots."""
    return {name.replace("__", "."): TensorInfo("F16", shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("names", "name"),
    [
        ((*FLUX1, "guidance_in.in_layer.weight"), "FLUX.1 dev"),
        (FLUX1, "FLUX.1 schnell"),
        ([PREFIX + name for name in FLUX1], "FLUX.1 schnell"),
        (SDXL, "Stable Diffusion XL"),
        ((*SDXL, "first_stage_model.decoder.conv_in.weight"), "Stable Diffusion XL"),
        ((SDXL[0], SDXL[2]), "Stable Diffusion 1 or 2"),
        ((f"{PREFIX}joint_blocks.0.context_block.attn.qkv.weight",), "Stable Diffusion 3"),
        (("blocks.0.cross_attn.k.weight", "patch_embedding.weight"), "Wan"),
        (("model.diffusion_model.cap_pad_token", f"{PREFIX}context_refiner.0.attention_norm1.weight"), "Z-Image"),
        (
            ("control_img_in.weight", "control_transformer_blocks.0.before_proj.weight"),
            "a ControlNet for FLUX.2",
        ),
        (("control_model.zero_convs.0.0.weight",), "a ControlNet"),
        (("text_model.encoder.layers.0.self_attn.q_proj.weight",), "a CLIP text encoder"),
        (("enc.blk.0.attn_q.weight",), "a T5 text encoder"),
        (("blk.0.attn_q.bias", "blk.0.attn_q.weight"), "Qwen2 or Qwen2.5"),
        (("tok_embeddings.weight", "layers.0.attention.wq.weight"), "a Mistral in its maker's own naming"),
        (("conv_first.weight", "body.0.rdb1.conv1.weight"), "an upscaler"),
        (("1.weight", "1.bias", "3.conv.0.weight"), "TAESD, a tiny autoencoder"),
    ],
)
def test_other_models_are_named(names, name):
    with pytest.raises(CheckpointError, match=f"x is {name}; [a-zA-Z]"):
        naming.read(named(*names), "x")


@pytest.mark.parametrize(
    "name",
    ["transformer_dev_bfl", "transformer_dev_diffusers", "vae_diffusers", "ae_bfl", "qwen3-8b", "mistral3-24b"],
)
def test_parts_of_flux2_are_none(name):
    assert strangers.refusal(listing(name)) is None
    assert strangers.stranger(listing(name)) is None


def lora(module, width, out, ends=("lora_A.weight", "lora_B.weight")):
    return {
        f"{module}.{ends[0]}": TensorInfo("F16", (16, width)),
        f"{module}.{ends[1]}": TensorInfo("F16", (out, 16)),
    }


KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.default.weight", "lora_B.default.weight")
DOUBLE, SINGLE = "double_blocks.0.img_attn.qkv", "single_blocks.3.linear1"


@pytest.mark.parametrize(
    ("infos", "naming_", "models"),
    [
        (lora(f"diffusion_model.{DOUBLE}", 4096, 12288), "the original release", NINE),
        (lora(f"base_model.model.{SINGLE}", 6144, 55296), "the original release", ("dev",)),
        (lora(f"diffusion_model.{SINGLE}", 3072, 27648), "the original release", FOUR),
        (lora(f"diffusion_model.{SINGLE}", 3072, 21504), "the original release", ("FLUX.1",)),
        (lora(f"diffusion_model.{DOUBLE}", 3072, 9216), "the original release", (*FOUR, "FLUX.1")),
        (lora("diffusion_model.double_blocks.7.img_attn.qkv", 3072, 9216), "the original release", ("FLUX.1",)),
        (lora("lora_unet_double_blocks_0_img_mlp_0", 3072, 18432, KOHYA), "kohya", FOUR),
        (lora("lora_unet_double_blocks_0_img_mlp_0", 3072, 12288, KOHYA), "kohya", ("FLUX.1",)),
        (lora("lora_unet_transformer_blocks_0_attn_to_q", 4096, 4096, KOHYA), "kohya", NINE),
        (lora("transformer.transformer_blocks.1.attn.add_q_proj", 6144, 6144, PEFT), "diffusers", ("dev",)),
        (lora("single_transformer_blocks.9.attn.to_qkv_mlp_proj", 4096, 36864), "diffusers", NINE),
        (lora("transformer.single_transformer_blocks.9.proj_mlp", 3072, 12288), "diffusers", ("FLUX.1",)),
        (lora("transformer.transformer_blocks.59.attn.to_q", 3072, 3072), "diffusers", ()),
        (lora("lora_unet_down_blocks_0_attentions_0_proj_in", 320, 320, KOHYA), "kohya", ()),
        (lora(SINGLE, 4096, 36864) | lora(DOUBLE, 6144, 18432), "the original release", ()),
    ],
)
def test_loras_are_told_from_each_other(infos, naming_, models):
    found = strangers.adapter(infos)
    assert (found.kind, found.naming, found.models) == ("LoRA", naming_, models)


def test_other_adapters():
    lokr = tensors(
        lycoris_single_blocks_0_linear1__lokr_w1=(16, 16),
        lycoris_single_blocks_0_linear1__lokr_w2_a=(2304, 4),
        lycoris_single_blocks_0_linear1__lokr_w2_b=(4, 256),
    )
    assert strangers.adapter(lokr) == strangers.Adapter("LoKr", "kohya", NINE, None)
    loha = tensors(
        lora_unet_single_blocks_0_linear1__hada_w1_a=(55296, 4),
        lora_unet_single_blocks_0_linear1__hada_w1_b=(4, 6144),
    )
    assert strangers.adapter(loha) == strangers.Adapter("LoHa", "kohya", ("dev",), None)


@pytest.mark.parametrize("shape", [(), (0, 0), (3072,), (1, 1, 1, 1), (2**31 - 1, 2**31 - 1)])
def test_factors_of_odd_shapes_fit_no_model(shape):
    infos = dict.fromkeys((f"{SINGLE}.lora_A.weight", f"{SINGLE}.lora_B.weight"), TensorInfo("F16", shape))
    assert strangers.adapter(infos).models == ()


def test_half_of_a_lora_fits_no_model():
    assert strangers.adapter(named(f"{SINGLE}.lora_down.weight")).models == ()


def test_a_lora_is_no_model():
    infos = lora(f"diffusion_model.{SINGLE}", 3072, 27648)
    match = r"x is a LoRA for klein-4b or klein-base-4b \(names as of the original release\), which goes on top of a mo"
    with pytest.raises(CheckpointError, match=match):
        naming.read(infos, "x")
    with pytest.raises(CheckpointError, match="x is a LoRA for another model"):
        naming.read(lora("unet.mid_block", 320, 320), "x")
