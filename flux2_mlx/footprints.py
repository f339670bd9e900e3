"""What the weights of a checkpoint's networks take in memory."""

import math
import re
from collections import Counter
from dataclasses import replace

import mlx.core as mx

from .checkpoint import Component
from .components import COMPONENTS
from .layers import WIDENED
from .loading import memory_dtype, tensor_bytes
from .memory import Footprint
from .quantization import quantizing_bytes, stored_names


def loaded_footprint(stored: Component, quant: str, dtype: mx.Dtype) -> Footprint:
    """The footprint of a component that is quantized at loading where it is not `stored` so, while activations are in
    `dtype`."""
    wanted = stored.quantized(quant)
    weights = footprint(wanted, dtype)
    if wanted == stored:
        return weights
    # What is quantized at loading would be so again at every pass, so it has to stay.
    loading = _quantizing(stored, wanted, weights.all)
    return replace(weights, rest=weights.all, blocks=(), loading=loading)


def _quantizing(stored: Component, wanted: Component, whole: int) -> int:
    """Bytes that quantizing at loading takes above the `whole` network that it ends with."""
    packed = wanted.infos
    held = 0
    peak = 0
    weights = stored.infos.items()
    for name, tensor in sorted(weights, key=lambda weight: -weight[1].nbytes):  # the order that they are quantized in
        parts = stored_names(name, packed)
        if parts != [name]:
            nbytes = sum(packed[part].nbytes for part in parts)
            held += nbytes
            peak = max(peak, held + quantizing_bytes(tensor.shape, nbytes))
    return max(0, peak - whole)


def footprint(component: Component, dtype: mx.Dtype) -> Footprint:
    """The footprint of `component` in memory while activations are in `dtype`."""
    sizes = Counter[str]()
    cast = Counter[str]()
    widened = Counter[str]()
    loading = 0
    for name, tensor in component.infos.items():
        block = _block_of(component.name, name) or ""
        sizes[block] += tensor_bytes(name, tensor, dtype)
        if tensor.dtype == "U32":
            continue
        kept = memory_dtype(name, tensor.shape, dtype)
        if kept != mx.bfloat16:
            cast[block] += tensor.nbytes
            loading = max(loading, tensor.nbytes)
        if kept != dtype and not name.startswith("embed_tokens"):
            # Weights are widened one after the other, the scales of packed ones all at once where MLX evaluates them.
            count = math.prod(tensor.shape)
            if component.quantization:
                widened[_evaluated_with(name)] += dtype.size * count
            else:
                widened[name] = dtype.size * min(WIDENED, count)
    rest = sizes.pop("", 0)
    _ = cast.pop("", 0)
    blocks = tuple(sizes[block] for block in _blocks(component, sizes))
    return Footprint(rest, blocks, max(cast.values(), default=0), max(widened.values(), default=0), loading)


def _evaluated_with(name: str) -> str:
    """The layer, or else the part of a network, whose evaluation includes that of a weight."""
    layer = re.match(r"\D*\.\d+(?=\.)", name)
    return layer[0] if layer else name.split(".")[0]


def _block_of(component: str, name: str) -> str | None:
    """The block that a weight belongs to, such as `double_blocks.3`."""
    head, number, *_ = [*name.split("."), ""]
    return f"{head}.{number}" if head in COMPONENTS[component].streamed else None


def _blocks(component: Component, found: dict[str, int]) -> list[str]:
    order = COMPONENTS[component.name].streamed
    return sorted(found, key=lambda block: (order.index(block.split(".")[0]), int(block.split(".")[1])))
