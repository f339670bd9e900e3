"""What the weights of a checkpoint's networks take in memory."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx

from .checkpoint import Component
from .components import COMPONENTS
from .device import on_gpu
from .layers import UNPACKED, WIDENED
from .loading import Footprint, in_memory
from .quantization import GROUP_SIZE, quantizing_bytes, stored_names
from .weights import FLOATS, TensorInfo

_NO_BLOCK = ""
# What a weight takes while a CPU unpacks it and computes in numbers of so many bytes. Fitted to peaks:
# python -m pytest -s tests/test_memory.py -k near_what_a_run_takes
_UNPACKING_BYTES = {4: 6.5, 2: 8}


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
            peak = max(peak, held + quantizing_bytes(tensor.shape))
    return max(0, peak - whole)


def footprint(component: Component, dtype: mx.Dtype) -> Footprint:
    """The footprint of `component` in memory while activations are in `dtype`."""
    stored = component.infos
    kept = in_memory(stored, dtype)
    sizes = Counter[str]()
    cast = Counter[str]()  # bytes as they are stored of what is cast on its way into memory
    loading = 0
    for name, tensor in kept.items():
        block = _block_of(component.name, name)
        sizes[block] += tensor.nbytes
        if tensor.dtype != stored[name].dtype:
            cast[block] += stored[name].nbytes
            loading = max(loading, stored[name].nbytes)
    rest = sizes.pop(_NO_BLOCK, 0)
    _ = cast.pop(_NO_BLOCK, 0)
    blocks = tuple(sizes[block] for block in _blocks(component, sizes))
    return Footprint(rest, blocks, max(cast.values(), default=0), _widened(component, kept, dtype), loading)


def _widened(component: Component, kept: Mapping[str, TensorInfo], dtype: mx.Dtype) -> int:
    """Bytes that weights take at most which are widened at one time: one after the other, but the scales of packed ones
    all at once where MLX evaluates them. What a CPU unpacks counts as well."""
    widened = Counter[str]()
    looked_up = COMPONENTS[component.name].looked_up
    for name, tensor in kept.items():
        count = math.prod(tensor.shape)
        if name.startswith(looked_up):
            continue
        if name.endswith(".scales") and not on_gpu():
            widened[name] = int(_UNPACKING_BYTES[dtype.size] * min(UNPACKED, GROUP_SIZE * count))
        if tensor.dtype in ("U32", FLOATS[dtype]):
            continue
        if component.quantization:
            widened[_evaluated_with(name)] += dtype.size * count
        else:
            widened[name] = dtype.size * min(WIDENED, count)
    return max(widened.values(), default=0)


def _evaluated_with(name: str) -> str:
    """The layer, or else the part of a network, whose evaluation includes that of a weight."""
    layer = re.match(r"\D*\.\d+(?=\.)", name)
    return layer[0] if layer else name.split(".")[0]


def _block_of(component: str, name: str) -> str:
    """The block that a weight belongs to, such as `double_blocks.3`, if it does."""
    head, number, *_ = [*name.split("."), ""]
    return f"{head}.{number}" if head in COMPONENTS[component].streamed else _NO_BLOCK


def _blocks(component: Component, found: dict[str, int]) -> list[str]:
    order = COMPONENTS[component.name].streamed
    return sorted(found, key=lambda block: (order.index(block.split(".")[0]), int(block.split(".")[1])))
