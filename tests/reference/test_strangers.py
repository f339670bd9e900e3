"""Other models are named by their tensors: those of small ones, built by the libraries that they come with."""

import diffusers
import pytest
import torch
import transformers
from flux2_mlx.convert import naming, strangers

from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import TensorInfo

ONE = {"num_layers": 1}
ONE_EACH = {"num_layers": 1, "num_single_layers": 1}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
T5 = {"num_layers": 1, "d_model": 16, "d_ff": 16, "num_heads": 2}
# What it is, the class of diffusers, its settings.
DIFFUSERS = [
    ("FLUX.1 dev", "FluxTransformer2DModel", {**ONE_EACH, "guidance_embeds": True}),
    ("FLUX.1 schnell", "FluxTransformer2DModel", {**ONE_EACH, "guidance_embeds": False}),
    ("Chroma", "ChromaTransformer2DModel", ONE_EACH),
    ("HunyuanVideo", "HunyuanVideoTransformer3DModel", ONE_EACH),
    ("Stable Diffusion 3", "SD3Transformer2DModel", ONE),
    ("Qwen-Image", "QwenImageTransformer2DModel", ONE),
    ("Z-Image", "ZImageTransformer2DModel", {"n_layers": 1}),
    ("Lumina 2", "Lumina2Transformer2DModel", ONE),
    ("Wan", "WanTransformer3DModel", ONE),
    ("Stable Diffusion XL", "UNet2DConditionModel", SDXL),
    ("Stable Diffusion 1 or 2", "UNet2DConditionModel", {"block_out_channels": (32, 64, 64, 64)}),
    ("a ControlNet", "FluxControlNetModel", ONE_EACH),
    ("a ControlNet", "ControlNetModel", {"block_out_channels": (32, 64, 64, 64)}),
    ("a ControlNet", "QwenImageControlNetModel", ONE),
    ("TAESD, a tiny autoencoder", "AutoencoderTiny", {}),
]
# The same of transformers, with its class of settings.
TRANSFORMERS = [
    ("a T5 text encoder", "T5EncoderModel", "T5Config", T5),
    ("a T5 text encoder", "UMT5EncoderModel", "UMT5Config", T5),
    ("a CLIP text encoder", "CLIPTextModel", "CLIPTextConfig", {"num_hidden_layers": 1}),
    ("a CLIP text encoder", "CLIPTextModelWithProjection", "CLIPTextConfig", {"num_hidden_layers": 1}),
    ("a CLIP image encoder", "CLIPVisionModel", "CLIPVisionConfig", {"num_hidden_layers": 1}),
    ("Qwen2 or Qwen2.5", "Qwen2ForCausalLM", "Qwen2Config", {"num_hidden_layers": 1}),
    ("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", {}),
    ("Qwen3-VL", "Qwen3VLForConditionalGeneration", "Qwen3VLConfig", {}),
    ("Gemma", "Gemma2ForCausalLM", "Gemma2Config", {"num_hidden_layers": 1}),
]


def infos(build):
    with torch.device("meta"):
        return {name: TensorInfo("F32", tuple(x.shape)) for name, x in build().state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")
@pytest.mark.parametrize(("name", "kind", "settings"), DIFFUSERS)
def test_models_of_diffusers_are_named(name, kind, settings):
    tensors = infos(lambda: getattr(diffusers, kind)(**settings))
    assert strangers.stranger(tensors).name == name
    with pytest.raises(CheckpointError, match=f"x is {name}; "):
        naming.read(tensors, "x")


@pytest.mark.parametrize(("name", "kind", "config", "settings"), TRANSFORMERS)
def test_models_of_transformers_are_named(name, kind, config, settings):
    tensors = infos(lambda: getattr(transformers, kind)(getattr(transformers, config)(**settings)))
    assert strangers.stranger(tensors).name == name


@pytest.mark.parametrize(
    ("part", "build"),
    [
        ("transformer", lambda: diffusers.Flux2Transformer2DModel(**ONE_EACH)),
        ("vae", diffusers.AutoencoderKLFlux2),
        ("text_encoder", lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(num_hidden_layers=1))),
        ("text_encoder", lambda: transformers.Qwen3Model(transformers.Qwen3Config(num_hidden_layers=1))),
        ("text_encoder", lambda: transformers.Mistral3ForConditionalGeneration(transformers.Mistral3Config())),
        ("text_encoder", lambda: transformers.Mistral3Model(transformers.Mistral3Config())),
    ],
)
def test_parts_of_flux2_are_no_strangers(part, build):
    (reading,) = naming.read(infos(build), "x").values()
    assert (reading.part, reading.unknown) == (part, [])
