"""Files of adapters, and what they do to the layers of a small model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from flux2_mlx.convert.lora import read_adapter

from flux2_mlx.adapters import BiasDifference, Decomposed, Placed
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.config import Config

from .checkpoints import TEXT, TRANSFORMER
from .cli_runner import DEMO

CONFIGS: dict[str, Config] = {"transformer": TRANSFORMER, "text_encoder": TEXT}
Arrays = dict[str, np.ndarray]
D = TRANSFORMER.hidden_size


def save(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: x if isinstance(x, mx.array) else mx.array(x) for name, x in tensors.items()}
    mx.save_safetensors(str(path), arrays, dict(metadata or {"format": "pt"}))
    return path


def factors(start: str, seed: int = 0, **shapes: tuple[int, ...]) -> Arrays:
    """Random tensors of these shapes, by their names after `start`, in which `__` stands for a dot."""
    rng = np.random.default_rng(seed)
    return {f"{start}.{x.replace('__', '.')}": rng.standard_normal(s, np.float32) for x, s in shapes.items()}


def lora(module: str, outputs: int, inputs: int = D, rank: int = 3, ends: Sequence[str] = ("A", "B"), seed: int = 0):
    """A LoRA of a module, by the names of PEFT, or of kohya with other `ends`."""
    down, up = (f"lora_{end}__weight" for end in ends)
    return factors(module, seed, **{down: (rank, inputs), up: (outputs, rank)})


def save_for_demo(path: Path) -> Path:
    """A LoRA of one layer of the built-in model."""
    infos = Checkpoint.open(DEMO).components["transformer"].quantized("bf16").infos
    outputs, inputs = infos["single_blocks.0.linear2.weight"].shape
    return save(path, lora("diffusion_model.single_blocks.0.linear2", outputs, inputs))


def changed(path: Path, configs: Mapping[str, Config] = CONFIGS) -> dict[str, np.ndarray]:
    """ΔW of each layer that an adapter changes, in float64, by the network's name and the layer's; biases with `+b`.

    Rows that it leaves alone are zeros. What DoRA changes is left out.
    """
    found = read_adapter(path)
    found.check(configs, "small")
    layers = {
        f"{network}.{layer}": placed
        for network, layers in found.load(configs, "name").layers.items()
        for layer, placed in layers.items()
    }
    weights: dict[str, np.ndarray] = {}
    for layer, placed in layers.items():
        for one in placed:
            if isinstance(one.change, BiasDifference):
                weights[f"{layer}+b"] = one.change.scale * numbers(one.change.difference)
            elif not isinstance(one.change, Decomposed):
                weights[layer] = weights.get(layer, 0) + _whole(one, layer, configs)
    return weights


def numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _whole(placed: Placed, layer: str, configs: Mapping[str, Config]) -> np.ndarray:
    weight = numbers(placed.change.weight())
    if placed.rows is None:
        return weight
    outputs = 3 * configs["transformer"].hidden_size  # only parts of qkv are apart in other namings
    assert layer.endswith(".qkv")
    whole = np.zeros((outputs, weight.shape[1]))
    whole[placed.rows] = weight
    return whole
