"""Names, shapes and dtypes of the tensors in the released files, as `keys/` lists them.

`{0-4}` in a listed name stands for the numbers 0 to 4.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from flux2_mlx.weights import TensorInfo

KEYS = Path(__file__).parent.parent / "keys"


# Names of tensors by which other models are told.
FLUX1 = ("double_blocks.0.img_mod.lin.weight", "double_blocks.0.img_attn.qkv.weight", "img_in.weight")
SDXL = tuple(
    f"model.diffusion_model.{name}"
    for name in ("input_blocks.0.0.weight", "label_emb.0.0.weight", "middle_block.1.norm.weight")
)


def named(*names: str) -> dict[str, TensorInfo]:
    """Small tensors of these names."""
    return {name: TensorInfo("F16", (1, 1)) for name in names}


def listing(name: str) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for line in (KEYS / f"{name}.tsv").read_text().splitlines():
        key, shape, dtype = line.split("\t")
        tensor = TensorInfo(dtype, tuple(int(size) for size in shape.split("x")) if shape != "scalar" else ())
        numbers = re.search(r"\{(\d+)-(\d+)\}", key)
        for number in range(int(numbers[1]), int(numbers[2]) + 1) if numbers else [None]:
            full = key if numbers is None else key.replace(numbers[0], str(number))
            assert full not in tensors, f"{full} is listed twice"
            tensors[full] = tensor
    return tensors


def prefixed(tensors: dict[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def renamed(tensors: dict[str, TensorInfo], pairs: Iterable[tuple[str, str]]) -> dict[str, TensorInfo]:
    """The same tensors under names in which the first of each pair became the second."""

    def other(name: str) -> str:
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        return name

    return {other(name): tensor for name, tensor in tensors.items()}


def text_only(tensors: dict[str, TensorInfo], layers: int | None = None) -> dict[str, TensorInfo]:
    """Mistral's text model under Qwen3's names, of which the first layers only are kept."""
    kept = {}
    for name, tensor in tensors.items():
        name = name.replace("language_model.model.", "model.").replace("language_model.lm_head.", "lm_head.")
        is_kept = layers is None or not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
        if name.startswith(("model.", "lm_head.")) and is_kept:
            kept[name] = tensor
    return kept
