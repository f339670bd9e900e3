"""Whether what runs take of the memory is what was planned."""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

from .. import layers
from ..checkpoint import Component
from ..config import VARIANTS, TransformerConfig, VAEConfig
from ..device import device_memory, on_gpu, on_metal
from ..footprints import footprint
from ..loading import memory_dtype
from ..memory import PhasePlan
from ..metering import limits
from ..transformer import TransformerCost, image_ids, pass_operations, rope_table, text_ids
from ..vae import VAECost
from .finding import Finding, judged, skipped

# Times what is planned. Far less means a plan that refuses or streams what would fit, or memory that is not counted; a
# GPU was seen to take 0.63, as its kernels store less.
_LEAST, _MOST = 0.33, 1.05
_STEP = VARIANTS["klein-4b"].transformer
_TOKENS = 4608  # of an image of 1024×1024 and its text
_TEXT = 512  # tokens of the text
# On a GPU and on a CPU.
_STEP_SIDE = (32, 8)  # tokens on a side of the image of a step
_DECODED_SIDE = (1024, 256)  # pixels on a side of the image that is decoded
_OVER = "runs take more memory than is planned; choose a lower memory_limit, and please report this output"
_UNDER = "runs take far less memory than is planned, or it is not counted; please report this output"


def step_operations() -> int:
    """About the operations of `check_step`."""
    return pass_operations(_step(), _STEP_SIDE[not on_gpu()] ** 2 + _TEXT)[0]


def decoding_operations() -> int:
    """About the operations of `check_decoding`."""
    side = _DECODED_SIDE[not on_gpu()]
    return VAECost(VAEConfig(), mx.float32).decoding_operations(side, side)


def check_step(dtype: mx.Dtype) -> Finding:
    """The peak of a denoising step of klein-4b's width at 512×512 (128×128 on a CPU), with fewer blocks, against its
    plan."""
    config = _step()
    component = Component("transformer", config, None, ())
    weights = footprint(component, dtype)
    side = _STEP_SIDE[not on_gpu()]
    module = _in_memory(component, dtype)
    cost = next(TransformerCost(config, dtype).ways)
    planned = cost.passing(side * side + _TEXT, widened=weights.widened)
    img, txt = mx.zeros((1, side * side, config.in_channels), dtype), mx.zeros((1, _TEXT, config.hidden_size), dtype)
    rope = rope_table(np.concatenate([text_ids(_TEXT), image_ids(side, side)]), config)
    mx.eval(img, txt, rope)

    return _compared(
        "memory of a step",
        "transformer",
        lambda: module(img, txt, mx.array([0.5]), rope, execution=cost.execution),
        weights.all,
        planned,
    )


def check_decoding(dtype: mx.Dtype) -> Finding:
    """The peak of decoding an image of 1024×1024 (256×256 on a CPU), against its plan."""
    config = VAEConfig()
    side = _DECODED_SIDE[not on_gpu()]
    component = Component("vae", config, None, ())
    module = _in_memory(component, dtype)
    planned = VAECost(config, dtype).decoding(side, side)
    latents = mx.zeros((1, side // 8, side // 8, config.latent_channels), dtype)
    mx.eval(latents)
    weights = footprint(component, dtype).all
    return _compared("memory of decoding", "vae", lambda: module.decode(latents), weights, planned)


def check_attention(dtype: mx.Dtype) -> Finding:
    """Whether attention over the tokens of an image of 1024×1024 works without storing its scores."""
    name = "memory of attention"
    if not on_gpu():
        return skipped(name, "a CPU stores the scores, some at a time")
    q = mx.random.normal((1, 24, _TOKENS, 128), key=mx.random.key(0)).astype(dtype)
    mx.eval(q)
    arrays = _peak(lambda: layers.attention(q, q, q)) / q.nbytes
    # Its result is one; scores that are stored are hundreds.
    return _between(name, f"{arrays:.1f} arrays", arrays, 1, 4)


def check_wiring() -> Finding:
    """Whether memory can be wired, which keeps a network from being paged out while it is used."""
    name = "wired memory"
    if not on_metal():
        return skipped(name, "only Metal wires memory")
    wanted = device_memory() // 2
    before = mx.set_wired_limit(wanted)
    was = mx.set_wired_limit(before)
    return judged(
        name, f"{was / 2**30:.3g} GiB", f"{wanted / 2**30:.3g} GiB", was == wanted, "macOS before 15 wires none", "warn"
    )


def _step() -> TransformerConfig:
    return replace(_STEP, num_layers=1, num_single_layers=2)


def _in_memory(component: Component, dtype: mx.Dtype) -> nn.Module:
    """The network with zeros for weights, in memory as it would be for a run."""
    module = component.build()
    stored = module.parameters()
    module.update(tree_map_with_path(lambda name, x: x.astype(memory_dtype(name, x.shape, dtype)), stored))
    mx.eval(module.parameters())
    return module


def _compared(name: str, phase: str, work: Callable[[], mx.array], weights: int, planned: int) -> Finding:
    others = mx.get_active_memory() - weights
    alone = PhasePlan(phase, weights, planned)
    with limits(alone, device_memory() - alone.peak_memory, max(0, others)):
        ratio = _peak(work) / planned
    figure = f"{ratio:.2f} of the {planned / 2**30:.2f} GiB planned"
    return _between(name, figure, ratio, _LEAST, _MOST)


def _between(name: str, figure: str, value: float, least: float, most: float) -> Finding:
    advice = _UNDER if value < least else _OVER
    return judged(name, figure, f"{least} to {most}", least <= value < most, advice)


def _peak(work: Callable[[], mx.array]) -> int:
    """Bytes that `work` takes at most above what is in memory."""
    before = mx.get_active_memory()
    mx.clear_cache()
    mx.reset_peak_memory()
    mx.eval(work())
    return mx.get_peak_memory() - before
