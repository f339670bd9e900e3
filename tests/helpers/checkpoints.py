"""Small random models in the official layout, made without PyTorch, and converted."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from flux2_mlx.convert import Source, write_checkpoint
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import flux2_mlx.vae
from flux2_mlx.checkpoint import DIGEST, FILES, MANIFEST, sealed
from flux2_mlx.config import TextConfig, TransformerConfig, VAEConfig, VisionConfig
from flux2_mlx.text import LaterLayers, PixtralVision, TextEncoder
from flux2_mlx.transformer import Flux2Transformer

from .official_configs import autoencoder, mistral3, pipeline, qwen3, scheduler, transformer_2d
from .source_rules import rules_for
from .tekken import special_tokens

Shapes = dict[str, tuple[int, ...]]  # of tensors of a source

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
LATER_LAYERS = 2  # of a small klein, which its transformer does not read
# Factors that let the likeliest token depend on the text before, which it hardly does in a deep random network.
LIVELY = {"embed_tokens": 8, "o_proj": 0.25, "down_proj": 0.25, "q_proj": 2, "k_proj": 2}
SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


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


def save_small(
    folder: Path,
    *,
    transformer: TransformerConfig = TRANSFORMER,
    text: TextConfig = TEXT,
    vae: VAEConfig = VAE,
    seed: int = 0,
    shards: int = 1,
) -> Path:
    """Save a small klein with random weights in bfloat16, each network in so many `shards`; gives `folder`."""
    text = replace(text, num_later_layers=LATER_LAYERS, tie_word_embeddings=True)
    _save(folder, "transformer", transformer_2d(transformer), _transformer_shapes(transformer), 3 * seed, shards)
    _save(folder, "text_encoder", qwen3(text), _text_shapes(text), 3 * seed + 1, shards)
    _save(folder, "vae", autoencoder(vae), _vae_shapes(vae), 3 * seed + 2, shards)
    _save_rest(folder, "Flux2KleinPipeline")
    write_tokenizer(folder / "tokenizer")
    return folder


def save_dev(folder: Path) -> Path:
    """Save a small dev with random weights in bfloat16; gives `folder`."""
    text = {name.replace("model.", "language_model.model.", 1): x for name, x in _text_shapes(DEV_TEXT).items()}
    text["language_model.lm_head.weight"] = text.pop("lm_head.weight")
    text |= _shapes("vision", PixtralVision(DEV_VISION), DEV_VISION)
    _save(folder, "transformer", transformer_2d(DEV_TRANSFORMER), _transformer_shapes(DEV_TRANSFORMER), 0)
    _save(folder, "text_encoder", mistral3(DEV_TEXT, DEV_VISION), text, 1)
    _save(folder, "vae", autoencoder(VAE), _vae_shapes(VAE), 2)
    _save_rest(folder, "Flux2Pipeline")
    write_dev_tokenizer(folder / "tokenizer")
    return folder


def _shapes(network: str, module: nn.Module, config: Any) -> Shapes:
    """The tensors that a converter's rules make a network from."""
    rule_for = rules_for(network, config)
    ours = ((name, x.shape) for name, x in tree_flatten(module.parameters()))
    rules = [(rule_for(name, shape), shape) for name, shape in ours]
    return {source: rule.source_shape(shape) for rule, shape in rules for source in rule.sources}


def _transformer_shapes(config: TransformerConfig) -> Shapes:
    return _shapes("transformer", Flux2Transformer(config), config)


def _text_shapes(config: TextConfig) -> Shapes:
    encoder = _shapes("text_encoder", TextEncoder(config), config)
    return encoder | _shapes("language_model", LaterLayers(config), config)


def _vae_shapes(config: VAEConfig) -> Shapes:
    return {**_shapes("vae", flux2_mlx.vae.VAE(config), config), "bn.num_batches_tracked": ()}


def _save(folder: Path, name: str, config: dict[str, Any], shapes: Shapes, seed: int, shards: int = 1) -> None:
    """Save a network with random weights, in one file or in several with an index."""
    rng, file = np.random.default_rng(seed), folder / WEIGHTS[name]
    tensors = {key: _random(rng, key, shape) for key, shape in shapes.items()}
    file.parent.mkdir(parents=True)
    (file.parent / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_tensors(file, tensors)
        return
    places = {}
    for number in range(shards):
        shard = f"{file.stem}-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        save_tensors(file.with_name(shard), part)
        places |= dict.fromkeys(part, shard)
    size = {"total_size": sum(x.nbytes for x in tensors.values())}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": size, "weight_map": places}))


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> mx.array:
    """A value that bfloat16 holds, spread as `parity.randomize` does."""
    if not shape:
        return mx.array(0, mx.int64)
    if name.endswith("running_var"):
        low, high = 0.5, 4.0
    elif len(shape) == 1:
        low, high = (0.5, 1.5) if name.endswith("weight") else (-0.5, 0.5)
    else:
        high = (3 * shape[0] / np.prod(shape)) ** 0.5
        low = -high
    factor = LIVELY.get(name.split(".")[-2], 1) if name.startswith("language_model.") else 1
    return mx.array(factor * rng.uniform(low, high, shape).astype(np.float32)).astype(mx.bfloat16)


def _save_rest(folder: Path, kind: str) -> None:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler(SCHEDULER)))
    (folder / "model_index.json").write_text(json.dumps(pipeline(kind)))


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


def edit_weights(path: Path, change: Callable[[dict[str, mx.array]], Any]) -> None:
    """Rewrite a safetensors file after `change` has altered its tensors in place."""
    tensors = read_tensors(path)
    change(tensors)
    save_tensors(path, tensors)


def read_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, in memory."""
    tensors = mx.load(str(path))
    mx.eval(tensors)
    return tensors


def save_tensors(path: Path, tensors: dict[str, mx.array]) -> None:
    """Write a safetensors file as PyTorch's projects do."""
    mx.save_safetensors(str(path), tensors, {"format": "pt"})
