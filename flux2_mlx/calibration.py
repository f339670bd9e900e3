"""Which layers of a transformer change its images most in 4 bits: each is tried in a few images of its own.

How far a layer's weights change, or its outputs for the inputs that it meets, says little of that: see
`scripts/tried.md`.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .base_pipeline import BasePipeline
from .checkpoint import Checkpoint, Component
from .components import MAIN
from .device import foreign, on_gpu
from .errors import InputError
from .mixture import Calibration, is_of_block
from .networks import Networks
from .quantization import GROUP_SIZE, is_quantizable
from .request import Request

PROMPTS = (
    "a portrait of an old fisherman with a grey beard, soft window light",
    "a shop sign that reads OPEN LATE in neon letters, rainy street at night",
)
SIDE = 256  # pixels
STEPS = 4
# How many images share a pass, as many of them as memory is there for. In the first no layer has 4 bits.
_TOGETHER = (16, 8, 4, 2)
_BITS = 4


class _Trials:
    """Beside the layers of a network, as adapters are: in one image of a pass each, some of them have 4 bits."""

    has_steps = False
    identity = "trials"

    def __init__(self, places: dict[str, int], largest: int):
        self._places = places
        self._largest = largest

    @property
    def arrays(self) -> list[mx.array]:
        return []

    @property
    def nbytes(self) -> int:
        """Of a weight, the largest, while it is widened and then packed."""
        return 2 * mx.float32.size * self._largest

    def scaled(self, factor: float) -> "_Trials":
        return self

    def at(self, step: int) -> bool:
        return False

    def beside(self, name: str, layer: nn.Module) -> nn.Module:
        return _Tried(layer, self._places[name]) if name in self._places else layer


class _Tried(nn.Module):
    """A layer that has 4 bits for the image at one place of `[B, L, C]`."""

    def __init__(self, layer: nn.Module, place: int):
        super().__init__()
        self.layer = layer
        self._place = place

    def __call__(self, x: mx.array) -> mx.array:
        here = slice(self._place, self._place + 1)
        # MLX's own codes, which are as good in 4 bits as those of `quantize_array` and are found by a GPU.
        packed = mx.quantize(self.layer.weight.astype(x.dtype), GROUP_SIZE, _BITS)
        tried = mx.quantized_matmul(x[here], *packed, transpose=True, group_size=GROUP_SIZE, bits=_BITS)
        y = self.layer(x)
        return mx.concatenate([y[: here.start], tried, y[here.stop :]])


def calibrated(
    checkpoint: Checkpoint,
    memory_limit: int | str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Calibration:
    """The layers of the blocks of a model's transformer, those first whose 4 bits cost most for each of their weights.

    Args:
        checkpoint: with a transformer in bf16.
        memory_limit: bytes, or a size such as `"12GB"`; None: what the system can spare.
        progress: called with the number of passes that are done and of those in all.

    Raises:
        InputError: it has no such transformer, or there is too little memory for two small images.
    """
    if not checkpoint.paints or checkpoint.quant != "bf16":
        raise InputError(f"{checkpoint.folder} has no transformer in bf16, which is what can be calibrated")
    errors = image_errors(checkpoint, memory_limit, progress)
    sizes = {layer: math.prod(shape) for layer, shape in _layers(checkpoint.components[MAIN]).items()}
    ranking = sorted(errors, key=lambda layer: (-errors[layer] / sizes[layer], layer))
    return Calibration(tuple(ranking), {"prompts": len(PROMPTS), "side": _side(checkpoint), "steps": STEPS})


def image_errors(
    checkpoint: Checkpoint,
    memory_limit: int | str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, float]:
    """The square of the relative change of final latents that 4 bits make of each layer of the transformer's blocks,
    summed over images. The same each time; see `calibrated`."""
    shapes = _layers(checkpoint.components[MAIN])
    layers = [*shapes]
    largest = max(map(math.prod, shapes.values()), default=0)
    trial = _Trial(checkpoint, largest, memory_limit)
    texts = trial.texts()
    groups = [layers[start : start + trial.layers] for start in range(0, len(layers), trial.layers)]
    errors = dict.fromkeys(layers, 0.0)
    for number, text in enumerate(texts):
        for done, group in enumerate(groups, 1):
            for layer, error in trial.errors(group, text, seed=number).items():
                errors[layer] += error
            if progress:
                with foreign():
                    progress(number * len(groups) + done, len(groups) * len(texts))
    return errors


class _Trial:
    """Small images of a model, of which a few share a pass."""

    def __init__(self, checkpoint: Checkpoint, largest: int, memory_limit: int | str | None):
        self._checkpoint = checkpoint
        self._largest = largest
        self._limit = memory_limit
        for count in _TOGETHER:
            self.layers = count - 1
            pipe = self._pipeline([])
            try:
                pipe.plan(self._request(pipe, count, 0))
                break
            except InputError:
                if count == _TOGETHER[-1]:
                    raise

    def texts(self) -> list[mx.array]:
        """The states of the prompts."""
        pipe = self._pipeline([])
        return [pipe.encode_prompt(prompt) for prompt in PROMPTS]

    def errors(self, layers: list[str], text: mx.array, seed: int) -> dict[str, float]:
        """By layers, the square of the relative change of final latents where each alone has 4 bits."""
        pipe = self._pipeline(layers)
        request = self._request(pipe, 1 + len(layers), seed)
        made = np.asarray(pipe.run(request, prompt_embeds=text, output_type="latent").images)
        clean = made[0]
        size = np.square(clean).sum()
        return {x: float(np.square(y - clean).sum() / size) for x, y in zip(layers, made[1:], strict=True)}

    def _pipeline(self, layers: list[str]) -> BasePipeline:
        """The model with each of these layers in 4 bits for one image more."""
        trials = _Trials({layer: place for place, layer in enumerate(layers, 1)}, self._largest)
        parts = self._checkpoint.components
        watched = replace(self._checkpoint, components=parts | {MAIN: replace(parts[MAIN], adapters=trials)})
        # Not in float16, in which blocks compute in units that layers in 4 bits know nothing of.
        networks = Networks.open(watched, dtype="bfloat16" if on_gpu() else "float32")
        return BasePipeline(networks, memory_limit=self._limit)

    def _request(self, pipe: BasePipeline, count: int, seed: int) -> Request:
        """Of images that are the same but for the bits of their layers."""
        side = _side(self._checkpoint)
        return pipe.request(
            [""],
            width=side,
            height=side,
            steps=STEPS,
            guidance=1.0 if pipe.variant.uses_cfg else None,
            seed=[seed] * count,
            images_per_prompt=count,
        )


def _side(checkpoint: Checkpoint) -> int:
    return min(SIDE, checkpoint.fitted_variant.size)


def _layers(transformer: Component) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of blocks that can have few bits."""
    infos = transformer.infos.items()
    shapes = {name.removesuffix(".weight"): x.shape for name, x in infos if is_quantizable(transformer.name, x.shape)}
    return {layer: shape for layer, shape in shapes.items() if is_of_block(transformer.name, layer)}
