"""Adapters against diffusers and PEFT: the same file, the same images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from helpers.checkpoints import convert
from helpers.parity import relative_error
from helpers.references import small_pipeline
from peft import LoraConfig, get_peft_model_state_dict

from flux2_mlx import Flux2Pipeline
from flux2_mlx.config import TextConfig, TransformerConfig

TEXT = TextConfig("qwen3", 16, 24, 27, 151936, (9, 18, 27), 3, 1, 8)
TRANSFORMER = TransformerConfig(2, 3, 2, 48, 16, 16, axes_dims_rope=(2, 6, 4, 4), guidance_embeds=False)
SETTINGS = {"prompt": "a red box", "height": 48, "width": 80, "num_inference_steps": 3, "max_sequence_length": 48}
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_qkv_mlp_proj", "linear_in", "linear_out"]

Pair = tuple[Flux2KleinPipeline, Flux2Pipeline]


@pytest.fixture(scope="module")
def pair(qwen3_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    reference = small_pipeline(qwen3_tokenizer_file.parent, transformer=TRANSFORMER, text=TEXT, distilled=True)
    reference.save_pretrained(folder / "official")
    converted = convert(folder / "official", folder / "converted", variant="klein-4b")
    return reference, Flux2Pipeline.from_pretrained(converted, dtype="float32", prompt_cache=False)


@pytest.fixture
def bare(pair: Pair) -> Iterator[Pair]:
    """Both pipelines, which lose their adapters afterwards."""
    yield pair
    reference, ours = pair
    reference.unload_lora_weights()
    ours.unload_lora_weights()


def trained(reference: Flux2KleinPipeline, folder: Path, *, dora: bool) -> None:
    """An adapter of random factors, as diffusers saves one that PEFT has trained."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, use_dora=dora, init_lora_weights=False)
    transformer = reference.transformer
    transformer.add_adapter(config, "trained")
    if dora:
        for name, parameter in transformer.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(1.3)
    state = {key: x.clone() for key, x in get_peft_model_state_dict(transformer, adapter_name="trained").items()}
    transformer.delete_adapters("trained")
    metadata = {"r": 4, "lora_alpha": 8, "use_dora": dora, "target_modules": LAYERS}
    Flux2KleinPipeline.save_lora_weights(folder, state, transformer_lora_adapter_metadata=metadata)


def images(reference: Flux2KleinPipeline, output_type: str) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(7)
    return reference(generator=generator, output_type=output_type, **SETTINGS).images


# PEFT scales before it decomposes, so of DoRA only the whole change is one thing.
@pytest.mark.parametrize(("scale", "dora"), [(1.0, False), (0.4, False), (1.0, True)])
def test_an_adapter_gives_the_images_of_diffusers(bare, scale, dora, tmp_path):
    reference, ours = bare
    trained(reference, tmp_path, dora=dora)
    plain = ours(seed=7, output_type="latent", **SETTINGS).images
    reference.load_lora_weights(tmp_path, adapter_name="trained")
    reference.set_adapters(["trained"], [scale])
    ours.load_lora_weights(tmp_path, scale=scale)
    latents, expected = ours(seed=7, output_type="latent", **SETTINGS).images, images(reference, "latent")
    assert relative_error(latents, expected) <= 1e-4
    assert relative_error(plain, expected) > 0.01
    pixels = ours(seed=7, output_type="np", **SETTINGS).images
    assert np.abs(pixels - images(reference, "np")).max() <= 1 / 255
    ours.unload_lora_weights()
    assert np.array_equal(ours(seed=7, output_type="latent", **SETTINGS).images, plain)
