"""A GPU that computes nothing and counts: what is waited for, kernels, and the bytes that pass through them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from flux2_mlx import device, layers
from flux2_mlx.config import TransformerConfig
from flux2_mlx.transformer import (
    Execution,
    Flux2Transformer,
    blocks,
    execution,
    image_ids,
    kernel,
    rope,
    rope_table,
    text_ids,
)

# Primitives of MLX that are views, or that stand for what is in memory before a step.
_VIEWS = {
    *("Broadcast", "Depends", "ExpandDims", "Flatten", "Full", "Reshape", "Slice", "Split", "Squeeze"),
    *("StopGradient", "Transpose", "Unflatten"),
}
_PRODUCTS = {"Matmul", "AddMM"}


@dataclass
class Counted:
    """`waits` for what is computed, how often it is `asked` for without waiting, `kernels`, and the `nbytes` that those
    read and write which are neither products nor attention."""

    waits: int = 0
    asked: int = 0
    kernels: int = 0
    nbytes: int = 0


def pretend(monkeypatch: pytest.MonkeyPatch, metal: bool = True) -> None:
    """Have the transformer take this device for a GPU."""
    for module in (device, execution, kernel):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
        monkeypatch.setattr(module, "on_metal", lambda: metal)


class FakeGPU:
    """Stands in for MLX's kernels that have one name, and counts the primitives of which the others are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.counted = Counted()
        pretend(monkeypatch)
        monkeypatch.setattr(layers, "fuses_attention", lambda *_: True)
        monkeypatch.setattr(kernel, "is_right", lambda dtype: True)
        monkeypatch.setattr(kernel, "_kernel", lambda: self._heads)
        monkeypatch.setattr(mx, "eval", lambda *_: self._add("waits"))
        monkeypatch.setattr(mx, "async_eval", lambda *_: self._add("asked"))
        monkeypatch.setattr(mx, "contiguous", lambda x: self._made(x, x))
        monkeypatch.setattr(mx.fast, "layer_norm", lambda x, weight, bias, eps: self._made(x, x))
        monkeypatch.setattr(mx.fast, "rms_norm", self._rms_norm)
        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", self._attention)
        monkeypatch.setattr(blocks, "gated_sum", lambda x, gate, update: self._made(x, x, update))
        monkeypatch.setattr(blocks, "swiglu", lambda gate, x: self._made(x, x, gate))
        monkeypatch.setattr(rope, "_turned", lambda x, other, cos, sin: self._made(x, x, cos, sin))

    def _add(self, field: str, count: int = 1) -> None:
        setattr(self.counted, field, getattr(self.counted, field) + count)

    def _made(self, like: mx.array, *read: mx.array, elementwise: bool = True) -> mx.array:
        """What a kernel makes: an array that depends on those that it has `read`."""
        self._add("kernels")
        if elementwise:
            self._add("nbytes", like.nbytes + sum(x.nbytes for x in read))
        return mx.depends([mx.zeros(like.shape, like.dtype)], list(read))[0]

    def _rms_norm(self, x: mx.array, weight: mx.array, eps: float) -> mx.array:
        """MLX copies the view that it is given first, as that has gaps."""
        return self._made(x, self._made(x, x))

    def _attention(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        return self._made(q, q, k, v, elementwise=False)

    def _heads(self, inputs: list[mx.array], output_shapes: list[Any], output_dtypes: list[Any], **_: Any) -> Any:
        outputs = [mx.zeros(*shape) for shape in zip(output_shapes, output_dtypes, strict=True)]
        self._add("kernels")
        # It reads the heads alone of all that was projected.
        self._add("nbytes", 2 * sum(x.nbytes for x in outputs) + inputs[3].nbytes)
        return mx.depends(outputs, inputs[:1])

    def primitive(self, told: dict[str, Any]) -> None:
        """Count a primitive that MLX tells of."""
        if told["type"] != "primitive" or told["name"] in _VIEWS:
            return
        self._add("kernels", len(told["inputs"]) if told["name"] == "Concatenate" else 1)
        if told["name"] not in _PRODUCTS:
            sizes = [np.prod(shape) * dtype.size for _, shape, dtype in told["inputs"] + told["outputs"]]
            self._add("nbytes", int(sum(sizes)))


def count_step(monkeypatch: pytest.MonkeyPatch, config: TransformerConfig, side: int, way: Execution) -> Counted:
    """What a step of an image of `side`² pixels takes in bfloat16, of which nothing is computed."""
    tokens, text, dtype = side // 16, 512, mx.bfloat16
    model = Flux2Transformer(config)
    model.update(tree_map(lambda x: mx.zeros(x.shape, dtype), model.parameters()))
    table = rope_table(np.concatenate([text_ids(text), image_ids(tokens, tokens)]), config)
    img, txt = (mx.zeros((1, *shape), dtype) for shape in ((tokens**2, config.in_channels), (text, config.hidden_size)))
    with monkeypatch.context() as patch:
        gpu = FakeGPU(patch)
        step = partial(model, timestep=mx.array([0.5]), rope=table, execution=way)
        mx.export_function(gpu.primitive, step, img, txt)
    return gpu.counted
