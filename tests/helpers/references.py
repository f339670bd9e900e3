"""The reference pipelines with small random weights, and what they save in the official layout."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    AutoTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flux2_mlx.config import TextConfig, TransformerConfig, VAEConfig, VisionConfig

from .checkpoints import (
    DEV_TEXT,
    DEV_TRANSFORMER,
    DEV_VISION,
    LATER_LAYERS,
    LIVELY,
    SCHEDULER,
    TEXT,
    TRANSFORMER,
    VAE,
    WEIGHTS,
    write_dev_tokenizer,
    write_tokenizer,
)
from .parity import randomize

torch.set_num_threads(1)  # more threads only wait for each other on networks so small


def small_pipeline(
    tokenizer: Path,
    *,
    transformer: TransformerConfig = TRANSFORMER,
    text: TextConfig = TEXT,
    vae: VAEConfig = VAE,
    distilled: bool = True,
    seed: int = 0,
) -> Flux2KleinPipeline:
    """The reference pipeline with random float32 weights that bfloat16 holds.

    `tokenizer` is a folder with `tokenizer.json` and `tokenizer_config.json`.
    """
    networks = _networks(transformer, _text_encoder(text), vae, seed)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        tokenizer=AutoTokenizer.from_pretrained(tokenizer),
        is_distilled=distilled,
        **networks,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_dev_source(folder: Path, *, text: TextConfig = DEV_TEXT, vision: VisionConfig = DEV_VISION) -> Flux2Pipeline:
    """Save a small dev with random weights in the official layout; gives the reference pipeline, which has no
    tokenizer."""
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    networks = _networks(DEV_TRANSFORMER, mistral(text, vision), VAE, 0)
    _enliven(networks["text_encoder"].model.language_model)
    for name, part in {**networks, "scheduler": scheduler}.items():
        part.save_pretrained(folder / name)
    write_dev_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Flux2Pipeline"}))
    pipeline = Flux2Pipeline(scheduler=scheduler, tokenizer=None, **networks)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _networks(
    transformer: TransformerConfig, text_encoder: torch.nn.Module, vae: VAEConfig, seed: int
) -> dict[str, torch.nn.Module]:
    blocks = len(vae.block_out_channels)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    networks: dict[str, torch.nn.Module] = {
        "transformer": Flux2Transformer2DModel(**transformer.to_dict()),
        "text_encoder": text_encoder,
        "vae": AutoencoderKLFlux2(**vae.to_dict(), **kinds),
    }
    for number, network in enumerate(networks.values()):
        randomize(network, 3 * seed + number, torch.bfloat16)
    return networks


@torch.no_grad()
def _enliven(language_model: torch.nn.Module) -> None:
    """Let the likeliest token depend on the text before, which it hardly does in a deep random network."""
    for name, weight in language_model.named_parameters():
        weight.mul_(LIVELY.get(name.split(".")[-2], 1))


def mistral(text: TextConfig, vision: VisionConfig) -> Mistral3ForConditionalGeneration:
    """The reference of dev's language model, unpublished sizes, its weights not yet set."""
    sizes = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    text_config = MistralConfig(
        **{name: getattr(text, name) for name in (*sizes, "rms_norm_eps")},
        num_hidden_layers=text.num_hidden_layers + text.num_later_layers,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        sliding_window=None,
        tie_word_embeddings=False,
    )
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    vision_config = PixtralVisionConfig(
        **{name: getattr(vision, name) for name in (*sizes, "head_dim")},
        rope_parameters={"rope_type": "default", "rope_theta": vision.rope_theta},
        hidden_act="silu",
    )
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            vision_config=vision_config,
            text_config=text_config,
            spatial_merge_size=vision.spatial_merge_size,
            image_token_index=10,
            vision_feature_layer=-1,
            multimodal_projector_bias=False,
            tie_word_embeddings=False,
        )
    )


def _text_encoder(config: TextConfig) -> Qwen3ForCausalLM:
    sizes = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    values = {name: getattr(config, name) for name in sizes} | {
        "num_hidden_layers": config.num_hidden_layers + LATER_LAYERS,
        "max_position_embeddings": 1024,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": True,
    }
    return Qwen3ForCausalLM(Qwen3Config(**values))


def save_small(folder: Path, *, dtype: torch.dtype = torch.bfloat16, shards: str = "10GB", **settings: Any) -> Path:
    """Save a `small_pipeline` with a byte tokenizer; `settings` are those of `small_pipeline`."""
    tokenizer = write_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    pipeline = small_pipeline(tokenizer, **settings)
    for name in WEIGHTS:
        getattr(pipeline, name).to(dtype)
    pipeline.save_pretrained(folder, max_shard_size=shards)
    return folder
