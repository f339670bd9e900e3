"""Adapters, other models, damaged and hostile headers, as they are told to be."""

from dataclasses import replace

import pytest
from flux2_mlx.convert import identify
from flux2_mlx.convert.identity import ADAPTER, MODEL, OTHER
from helpers.headers import NUMBER, lora, plain
from helpers.listings import FLUX1, SDXL, listing, named

from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.weights import TensorInfo

FOUR, NINE, DEV = ("klein-4b", "klein-base-4b"), ("klein-9b", "klein-base-9b", "klein-9b-kv"), ("dev",)
COMFY, ORIGINAL = "model.diffusion_model.", "the original release"
QWEN, KLEIN = listing("qwen3-4b"), listing("transformer_klein-4b_bfl")


@pytest.mark.parametrize(
    ("names", "name"),
    [
        ((*FLUX1, "guidance_in.in_layer.weight"), "FLUX.1 dev"),
        (FLUX1, "FLUX.1 schnell"),
        ([COMFY + name for name in FLUX1], "FLUX.1 schnell"),
        (SDXL, "Stable Diffusion XL"),
        (("joint_blocks.0.context_block.attn.qkv.weight",), "Stable Diffusion 3"),
        (("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"), "Qwen-Image"),
        (("cap_pad_token", "context_refiner.0.attention_norm1.weight"), "Z-Image"),
        (("blocks.0.cross_attn.k.weight", "patch_embedding.weight"), "Wan"),
        (("controlnet_blocks.0.weight",), "a ControlNet"),
        (("text_model.encoder.layers.0.self_attn.q_proj.weight",), "a CLIP text encoder"),
        (("enc.blk.0.attn_q.weight",), "a T5 text encoder"),
    ],
)
def test_other_models(names, name):
    found = identify(plain(named(*names)), "x")
    assert (found.kind, found.name, found.variants, found.quant) == (OTHER, name, (), None)
    assert found.advice


@pytest.mark.parametrize(
    ("infos", "name", "variants"),
    [
        (lora("diffusion_model.double_blocks.0.img_attn.qkv", 4096, 12288), f"a LoRA (names as of {ORIGINAL})", NINE),
        (lora("transformer.transformer_blocks.1.attn.add_q_proj", 6144, 6144), "a LoRA (names as of diffusers)", DEV),
        (
            lora("lora_unet_double_blocks_0_img_mlp_0", 3072, 18432, ("lora_down.weight", "lora_up.weight")),
            "a LoRA (names as of kohya)",
            FOUR,
        ),
        (lora("diffusion_model.single_blocks.3.linear1", 3072, 21504), f"a LoRA (names as of {ORIGINAL})", ("FLUX.1",)),
        (lora("unet.mid_block", 320, 320), "a LoRA (names as of an unknown trainer)", ()),
    ],
)
def test_adapters(infos, name, variants):
    found = identify(plain(infos), "x")
    assert (found.kind, found.name, found.variants, [*found.formats]) == (ADAPTER, name, variants, ["bf16"])


def test_encoders_and_vaes_of_other_models():
    small = {
        name: replace(info, shape=tuple(n // 2 if n == 2560 else n for n in info.shape)) for name, info in QWEN.items()
    }
    found = identify(plain(small), "x")
    assert (found.kind, found.name, found.quant) == (OTHER, "text encoder of another model", None)
    assert "FLUX.2 klein needs Qwen3-4B or Qwen3-8B" in found.advice
    assert found.parts[0].converted == {}
    vae = listing("vae_diffusers") | {"decoder.conv_in.weight": TensorInfo("BF16", (512, 16, 3, 3))}
    assert "as that of FLUX.1, SD3 or Qwen-Image" in identify(plain(vae), "x").advice


def test_what_is_wrong_with_a_part_is_told():
    infos = dict(KLEIN)
    del infos["single_blocks.3.linear2.weight"]
    found = identify(plain(infos | named("single_blocks.3.odd")), "x")
    message = "the transformer is damaged or was changed: missing single_blocks.3.linear2.weight; unexpected single_blo"
    assert (found.kind, found.parts[0].problem) == (MODEL, found.advice)
    assert found.advice.startswith(message)


def test_a_model_that_it_can_not_be():
    with pytest.raises(CheckpointError, match=r"x can't be dev: its geometry is that of klein-4b, klein-base-4b"):
        identify(plain(KLEIN), "x", variant="dev")
    assert identify(plain(KLEIN), "x", ["base"], "klein-4b").variant == "klein-4b"
    with pytest.raises(InputError, match="unknown model"):
        identify(plain(KLEIN), "x", variant="no")


@pytest.mark.parametrize(
    "infos",
    [
        {},
        named("a"),
        named("*.*.*"),
        named("\0", "double_blocks.999.x"),
        named("x" * 501),
        {f"x{number}": NUMBER for number in range(50_001)},
        named("a" * 500 + ".lora_A.weight"),
    ],
)
def test_hostile_headers_are_one_line(infos):
    with pytest.raises(CheckpointError, match=r"^x holds") as caught:
        identify(plain(infos), "x")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (2**31 - 1, 2**31 - 1), (1,) * 9])
def test_odd_shapes(shape):
    infos = {name: TensorInfo("BF16", shape) for name in KLEIN}
    found = identify(plain(infos), "x")
    assert found.kind == OTHER
    assert "the transformer" in found.advice
