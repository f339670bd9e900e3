"""The way back from the shipped MLX checkpoint to the PyTorch parts, so that training can go on from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from flow_stage import TextToVelocity, load_tokenizer
from flux2_mlx.convert import text
from flux2_mlx.convert.dialects import DIFFUSERS
from flux2_mlx.convert.naming import Reading
from flux2_mlx.convert.rules import Rule, kernels_last
from geometry import build_vae
from torch import Tensor, nn


def restore(work: Path) -> None:
    """Writes the shipped weights into `work` as the training stages would have left them."""
    shipped = Path(str(files("flux2_mlx.demo")))
    shutil.copytree(shipped / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    torch.manual_seed(0)
    flow, autoencoder = TextToVelocity(load_tokenizer(work)), build_vae()
    _load(flow.transformer, shipped / "transformer", Reading(DIFFUSERS, "", {}).rules_for("transformer", None))
    _load(flow.text_encoder, shipped / "text_encoder", text.rule_for)
    _load(autoencoder, shipped / "vae", kernels_last)
    for name, module in (("flow", flow), ("vae", autoencoder)):
        state = {"module": module.state_dict(), "average": dict(module.named_parameters())}
        torch.save(state, work / f"{name}.pt")
    torch.save((autoencoder.bn.running_mean, autoencoder.bn.running_var), work / "statistics.pt")


def _load(module: nn.Module, folder: Path, rule_for: Callable[[str, tuple[int, ...]], Rule]) -> None:
    state = {}
    for name, array in mx.load(str(folder / "model.safetensors")).items():
        state |= _undo(rule_for(name, array.shape), array)
    _, unexpected = module.load_state_dict(state, strict=False)
    if unexpected:
        raise ValueError(f"{folder.name}: no place for {', '.join(unexpected)}")


def _undo(rule: Rule, array: mx.array) -> dict[str, Tensor]:
    """The source tensors that the converter's `rule` makes `array` from."""
    if len(rule.sources) > 1:
        parts = mx.split(array, len(rule.sources))
    elif array.ndim == 4:
        parts = [array.transpose(0, 3, 1, 2)]
    else:
        # What else there is, copying and exchanging halves, undoes itself.
        parts = [rule.apply(array)]
    arrays = [np.array(part.astype(mx.float32)) for part in parts]
    return {source: torch.from_numpy(part) for source, part in zip(rule.sources, arrays, strict=True)}
