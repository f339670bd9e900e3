"""A pipeline that decodes with another decoder, against diffusers' pipeline with its autoencoder exchanged."""

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from helpers.checkpoints import convert
from helpers.decoders import DEMO_VAE, NARROW
from helpers.parity import randomize
from helpers.references import small_pipeline
from PIL import Image

from flux2_mlx import Flux2Pipeline
from flux2_mlx.config import TextConfig, TransformerConfig

TRANSFORMER = TransformerConfig(
    1, 1, 2, 48, 16, DEMO_VAE.token_channels, axes_dims_rope=(2, 6, 4, 4), guidance_embeds=False
)
TEXT = TextConfig("qwen3", 16, 24, 27, 151936, (9, 18, 27), 3, 1, 8)

SETTINGS = {"height": 48, "width": 80, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np"}


def test_a_narrower_decoder(qwen3_tokenizer_file, tmp_path):
    reference = small_pipeline(qwen3_tokenizer_file.parent, transformer=TRANSFORMER, text=TEXT, vae=DEMO_VAE)
    reference.save_pretrained(tmp_path / "official")
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    narrow = randomize(AutoencoderKLFlux2(**NARROW.to_dict(), **kinds), seed=9, dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path / "narrow")  # with an encoder of its own, which the model is not to use
    kept = {
        name: x for name, x in reference.vae.state_dict().items() if name.startswith(("encoder.", "quant_conv.", "bn"))
    }
    narrow.load_state_dict(kept, strict=False)
    reference.vae = narrow
    converted = convert(tmp_path / "official", tmp_path / "converted", variant="klein-4b")
    file = tmp_path / "narrow" / "diffusion_pytorch_model.safetensors"
    ours = Flux2Pipeline.from_pretrained(converted, dtype="float32", decoder=file)
    pixels = np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8)
    for picture in ({}, {"image": Image.fromarray(pixels)}):
        generator = torch.Generator("cpu").manual_seed(5)
        expected = reference(prompt="a fox", generator=generator, **picture, **SETTINGS).images
        assert expected.std() > 0.05
        assert np.abs(ours("a fox", seed=5, **picture, **SETTINGS).images - expected).max() <= 1e-3
