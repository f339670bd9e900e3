"""A model of a few kilobytes with random weights, in the diffusers layout, made without PyTorch."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
from flux2_mlx.convert.dialects import DIFFUSERS
from flux2_mlx.convert.naming import Reading
from flux2_mlx.convert.parts import LAYOUT
from flux2_mlx.convert.rules import Rule
from mlx.utils import tree_flatten

from flux2_mlx.checkpoint import Component
from flux2_mlx.config import TextConfig, TransformerConfig, VAEConfig

_OURS = ("out_layers", "num_later_layers", "final_norm")  # of a text encoder: what its own config does not say
VARIANT = "demo"  # of whose geometry it is not, so it must be named
DEMO = Path(str(files("flux2_mlx.demo")))
_CONFIGS = {
    "transformer": TransformerConfig(1, 2, 2, 192, 32, 16, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False),
    "text_encoder": TextConfig("qwen3", 64, 128, 3, 480, (1, 2, 3), 4, 2, 16, final_norm=True),
    "vae": VAEConfig((8, 16, 16, 24), None, 1, 4, 4),
}
# How our tensors are made of those of the layout, whose names are the canonical ones but for the transformer's.
_RULES = {
    "transformer": Reading(DIFFUSERS, "", {}).rules_for("transformer", None),
    **{name: LAYOUT[name].rules[name](_CONFIGS[name]) for name in ("text_encoder", "vae")},
}
_FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
_CLASSES = {
    "transformer": {"_class_name": "Flux2Transformer2DModel"},
    "text_encoder": {"architectures": ["Qwen3ForCausalLM"]},
    "vae": {"_class_name": "AutoencoderKLFlux2"},
}


def write_source(folder: Path) -> Path:
    """Write the model; gives `folder`."""
    for name, config in _CONFIGS.items():
        (folder / name).mkdir(parents=True)
        values = config.to_dict() | _CLASSES[name]
        if name == "text_encoder":
            values = {key: value for key, value in values.items() if key not in _OURS}
        (folder / name / "config.json").write_text(json.dumps(values, indent=2))
        weights = {}
        for number, (key, x) in enumerate(tree_flatten(Component(name, config, None, ()).build().parameters())):
            weights |= _undo(_RULES[name](key, x.shape), _random(key, x.shape, number))
        mx.save_safetensors(str(folder / name / _FILES[name]), weights, {"format": "pt"})
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(DEMO / name, folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline"}))
    return folder


def _random(name: str, shape: tuple[int, ...], seed: int) -> mx.array:
    """Matrices and kernels that keep the size of what they meet; scales and variances about 1."""
    x = mx.random.normal(shape, key=mx.random.key(seed))
    if len(shape) == 1:
        x = 0.1 * x if name.endswith("bias") else mx.exp(0.1 * x)
    return (x * (x.size // len(x)) ** -0.5).astype(mx.bfloat16)


def _undo(rule: Rule, array: mx.array) -> dict[str, mx.array]:
    """The source tensors that the converter's `rule` makes `array` from."""
    if len(rule.sources) > 1:
        parts = mx.split(array, len(rule.sources))
    elif array.ndim == 4:
        parts = [array.transpose(0, 3, 1, 2)]
    else:
        # What else there is, copying and exchanging halves, undoes itself.
        parts = [rule.apply(array)]
    return {source: mx.contiguous(part) for source, part in zip(rule.sources, parts, strict=True)}
