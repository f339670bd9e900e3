"""Small random models in the official layout, made and saved with the PyTorch reference classes, and converted."""

import gc
import json
from collections.abc import Callable, Sequence
from hashlib import sha256
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
from flux2_mlx.convert import Source, write_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flux2_mlx.checkpoint import DIGEST, FILES, MANIFEST, sealed
from flux2_mlx.config import TextConfig, TransformerConfig, VAEConfig, VisionConfig
from helpers.parity import randomize
from helpers.tekken import special_tokens

torch.set_num_threads(1)  # more threads only wait for each other on networks so small
gc.freeze()  # the pipeline collects garbage after each phase, which the libraries' many objects make very slow

# Quantizable layers beside some that are not (in_channels < 64), a pixel grid as in the released models (16 to a
# token), and (below) two text layers more than are kept.
TRANSFORMER = TransformerConfig(2, 2, 2, 192, 32, 16, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)
TEXT = TextConfig("qwen3", 64, 128, 27, 272, (9, 18, 27), 4, 2, 16)
VAE = VAEConfig((8, 16, 16, 24), None, 1, 4, 4)
# 35 MB in bfloat16, its largest tensor 2.7 MB.
LARGE_TRANSFORMER = TransformerConfig(2, 4, 6, 192, 64, 16, axes_dims_rope=(16, 16, 16, 16), guidance_embeds=False)
# Small geometry is that of no variant, so it must be named. The demo's row needs only three text layers.
VARIANT, SHALLOW_VARIANT = "klein-4b", "demo"
SHALLOW_TEXT = TextConfig("qwen3", 64, 128, 3, 272, (1, 2, 3), 4, 2, 16)
# A small dev: three text layers more than the transformer reads, images of at most 5 × 5 cells.
DEV_TRANSFORMER = TransformerConfig(2, 2, 2, 192, 32, 16, axes_dims_rope=(8, 8, 8, 8))
DEV_TEXT = TextConfig("mistral3", 64, 128, 30, 288, (10, 20, 30), 4, 2, 16, 1e-5, 1e9, num_later_layers=3)
DEV_VISION = VisionConfig(64, 64, 96, 3, 4, image_size=140)
WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of Qwen's kind with one token a byte; gives its folder."""
    _save_byte_tokenizer(folder, [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_SPECIAL_TOKENS], _SPECIAL_TOKENS)
    values = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def write_dev_tokenizer(folder: Path) -> Path:
    """The same of Mistral's kind, with the special tokens in their places; gives its folder."""
    special = special_tokens(19)
    _save_byte_tokenizer(folder, [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())], special)
    return folder


def _save_byte_tokenizer(folder: Path, tokens: Sequence[str], special: Sequence[str]) -> None:
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


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
        scheduler=FlowMatchEulerDiscreteScheduler(**_SCHEDULER),
        tokenizer=AutoTokenizer.from_pretrained(tokenizer),
        is_distilled=distilled,
        **networks,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_dev_source(folder: Path, *, text: TextConfig = DEV_TEXT, vision: VisionConfig = DEV_VISION) -> Flux2Pipeline:
    """Save a small dev with random weights in the official layout; gives the reference pipeline, which has no
    tokenizer."""
    scheduler = FlowMatchEulerDiscreteScheduler(**_SCHEDULER)
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
    factors = {"embed_tokens": 8, "o_proj": 0.25, "down_proj": 0.25, "q_proj": 2, "k_proj": 2}
    for name, weight in language_model.named_parameters():
        weight.mul_(factors.get(name.split(".")[-2], 1))


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
        "num_hidden_layers": config.num_hidden_layers + 2,
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


def convert(
    source: Path,
    target: Path,
    quant: str = "bf16",
    text_quant: str | None = "bf16",
    *,
    variant: str | None = VARIANT,
    **options: Any,
) -> Path:
    """Convert a saved model with our converter; gives `target`."""
    write_checkpoint(Source.open(source, variant), target, quant, text_quant, **options)
    return target


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key. A manifest is sealed again, and has another record of a file of
    its checkpoint, as if these had been written so."""
    values = json.loads(path.read_text()) | changes
    values = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(sealed(values) if DIGEST in values else values))
    record(path)


def record(path: Path) -> None:
    """Record a file of a checkpoint as it is now, as if it had been converted so."""
    manifest = path.parents[1] / MANIFEST
    values = json.loads(manifest.read_text()) if manifest.exists() else {}
    if FILES in values:
        data = path.read_bytes()
        values[FILES][f"{path.parent.name}/{path.name}"] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
        manifest.write_text(json.dumps(sealed(values) if DIGEST in values else values))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite a safetensors file after `change` has altered its tensors in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
