"""Adapters against diffusers and PEFT: the same file, the same images."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from flux2_mlx.convert.lora.places import layer_shapes
from helpers.adapters import Arrays, lora, save
from helpers.checkpoints import DEV_TRANSFORMER, convert, edit_json
from helpers.parity import relative_error
from helpers.references import make_dev_source, small_pipeline
from peft import LoraConfig, get_peft_model_state_dict

from flux2_mlx import Flux2Pipeline
from flux2_mlx.config import TextConfig, TransformerConfig

TEXT = TextConfig("qwen3", 16, 24, 27, 151936, (9, 18, 27), 3, 1, 8)
TRANSFORMER = TransformerConfig(2, 3, 2, 48, 16, 16, axes_dims_rope=(2, 6, 4, 4), guidance_embeds=False)
SETTINGS = {"prompt": "a red box", "height": 48, "width": 80, "num_inference_steps": 3, "max_sequence_length": 48}
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_qkv_mlp_proj", "linear_in", "linear_out"]

Pair = tuple[Flux2KleinPipeline, Flux2Pipeline]
Model = tuple[DiffusionPipeline, Flux2Pipeline, Mapping[str, tuple[int, ...]], dict[str, Any]]


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


def images(
    reference: DiffusionPipeline, output_type: str, settings: Mapping[str, Any] = MappingProxyType(SETTINGS)
) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(7)
    return reference(generator=generator, output_type=output_type, **settings).images


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


# --- what other trainers write, on each kind of model

SHAPES = {"klein": layer_shapes("transformer", TRANSFORMER), "dev": layer_shapes("transformer", DEV_TRANSFORMER)}
FUSED = ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_attn.qkv")
WHOLE = {
    "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
    "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.linear_out",
    "double_blocks.1.img_mlp.0": "transformer_blocks.1.ff.linear_in",
    "single_blocks.0.linear1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "single_blocks.1.linear2": "single_transformer_blocks.1.attn.to_out",
    "txt_in": "context_embedder",
}


def of_kohya(layer: str, outputs: int, inputs: int) -> Arrays:
    module = f"lora_unet_{layer.replace('.', '_')}"
    return lora(module, outputs, inputs, ends=("down", "up")) | {f"{module}.alpha": np.float32(1.5)}


def of_ai_toolkit(layer: str, outputs: int, inputs: int) -> Arrays:
    return lora(f"diffusion_model.{layer}", outputs, inputs)


def of_peft(layer: str, outputs: int, inputs: int) -> Arrays:
    if layer in WHOLE:
        return lora(f"transformer.{WHOLE[layer]}", outputs, inputs)
    start, ends = f"transformer.transformer_blocks.{layer.split('.')[1]}.attn.", ("to_q", "to_k", "to_v")
    ends = ends if "img" in layer else ("add_q_proj", "add_k_proj", "add_v_proj")
    return {key: x for end in ends for key, x in lora(start + end, outputs // 3, inputs).items()}


@pytest.fixture(scope="module", params=["klein", "base", "dev"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model as the reference has it and as we have it, the shapes of its layers, and what runs of it are given."""
    name, folder, settings = request.param, tmp_path_factory.mktemp(request.param), SETTINGS | {"prompt": None}
    shapes = SHAPES["dev" if name == "dev" else "klein"]
    embeds = torch.randn(2, 1, 40, shapes["txt_in"][1], generator=torch.Generator().manual_seed(5))
    settings |= {"prompt_embeds": embeds[0], "guidance_scale": 2.5}
    if name == "dev":
        reference, variant = make_dev_source(folder / "official"), "dev"
    else:
        reference, ours = request.getfixturevalue("pair")
        if name == "klein":
            return reference, ours, shapes, settings
        reference, variant = Flux2KleinPipeline(**reference.components, is_distilled=False), "klein-base-4b"
        reference.set_progress_bar_config(disable=True)
        reference.save_pretrained(folder / "official")
        edit_json(folder / "official" / "model_index.json", is_distilled=None)
        settings["negative_prompt_embeds"] = embeds[1]
    converted = convert(folder / "official", folder / "converted", variant=variant)
    ours = Flux2Pipeline.from_pretrained(converted, dtype="float32", prompt_cache=False)
    return reference, ours, shapes, settings


@pytest.mark.parametrize("form", [of_peft, of_kohya, of_ai_toolkit])
def test_what_trainers_write_gives_the_images_of_diffusers(model, form, tmp_path):
    reference, ours, shapes, settings = model
    tensors = {key: x for layer in (*FUSED, *WHOLE) for key, x in form(layer, *shapes[layer]).items()}
    path = save(tmp_path / "a.safetensors", {key: x if "alpha" in key else x / 4 for key, x in tensors.items()})
    plain = ours(seed=7, output_type="np", **settings).images
    reference.load_lora_weights(path, adapter_name="a")
    ours.load_lora_weights(path)
    try:
        expected = images(reference, "np", settings)
        assert np.abs(ours(seed=7, output_type="np", **settings).images - expected).max() <= 1 / 255
        assert np.abs(plain - expected).max() > 10 / 255
    finally:
        reference.unload_lora_weights()
        ours.unload_lora_weights()
