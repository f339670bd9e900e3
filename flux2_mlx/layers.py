"""Blocks that more than one network uses. Arrays are channels-last; attention is `[B, heads, tokens, head_dim]`."""

import math
from collections.abc import Callable
from copy import copy
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn

from .device import fused, fuses_attention, on_gpu, rows_to_unpack
from .errors import RangeError

# Where scores are stored for all queries at once, the queries are taken in chunks of at most this many scores. Timed
# over 1,536 tokens and 24 heads on two Linux cores: 1 Mi takes 1.40 times as long, 4 Mi 1.01, 16 Mi and all 1.04.
_SCORES_PER_CHUNK = 8 * 1024 * 1024
# Elsewhere in chunks of at most so many operations, about a second of the slowest GPU: macOS stops what takes longer
# than some five seconds, and less while the display is on.
OPERATIONS_PER_CHUNK = 10**12
# The most weights that `project` widens at one time. Timed with 3,072 channels on two Linux cores: 32 Mi takes 1.07 of
# the time for 1,024 tokens, 1.33 for 512, and 1.6 times the memory; 1 Mi takes 1.20 and 1.30.
WIDENED = 8 * 1024 * 1024
# The most that a CPU unpacks at one time. With 3,072 channels on two Linux cores 1,024 tokens take 1.1 to 1.2 times as
# long as with 16 bit weights, and 1.3 to 1.6 with 512 Ki.
UNPACKED = 2 * 1024 * 1024
FLOAT16_MAX = 65504
_Packed = TypeVar("_Packed", bound=nn.Module)


# Weights are zeros until a file's are loaded. MLX's own initialisers would draw from the caller's random numbers, and
# every draw is remembered until there is a next one that is evaluated.
class Linear(nn.Linear):
    """A linear layer whose weight may be narrower than its input (see `project`) where there is no bias."""

    def __init__(self, input_dims: int, output_dims: int, bias: bool = False):
        nn.Module.__init__(self)
        self.weight = mx.zeros((output_dims, input_dims))
        if bias:
            self.bias = mx.zeros((output_dims,))

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if "bias" in self else project(x, self.weight)

    def to_quantized(  # type: ignore[override]  # nn.quantize gives just these
        self, group_size: int, bits: int, mode: str
    ) -> "QuantizedLinear":
        """This layer with its weight packed."""
        return _pack(self, QuantizedLinear, group_size, bits, mode)


class QuantizedLinear(nn.QuantizedLinear):
    """A linear layer whose weight is packed. A CPU computes in float32, as products of 16 bit numbers are sums in 16
    bits there, off by several percent; for many rows it unpacks the weight, some outputs at a time."""

    def __call__(self, x: mx.array) -> mx.array:
        y = self.project(x)
        return y + self.bias if "bias" in self else y

    def project(self, x: mx.array, outputs: slice = slice(None)) -> mx.array:
        """Some of the `outputs` for `x`, without their bias."""
        if not on_gpu() and _rows(x) >= rows_to_unpack():
            return _project_in_slices(x, range(len(self.weight))[outputs], self._unpack, UNPACKED)
        weight, scales, biases = (self[name][outputs] for name in ("weight", "scales", "biases"))
        wide = x if on_gpu() else x.astype(mx.float32)
        parameters = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        return mx.quantized_matmul(wide, weight, scales, biases, **parameters).astype(x.dtype)

    def _unpack(self, outputs: slice) -> mx.array:
        weight = dense(self, mx.float32, outputs)
        mx.eval(weight)  # so that what it is made of is freed before there is a product
        return weight

    def unpacked(self, dtype: mx.Dtype) -> Linear:
        """This layer with a dense weight, which is unpacked when it is first needed."""
        layer = Linear.__new__(Linear)
        nn.Module.__init__(layer)
        layer.weight = dense(self, dtype)
        if "bias" in self:
            layer.bias = self.bias
        return layer


class Embedding(nn.Embedding):
    """An embedding whose weight may be narrower than what it projects as a language model's head."""

    def __init__(self, num_embeddings: int, dims: int):
        nn.Module.__init__(self)
        self.weight = mx.zeros((num_embeddings, dims))

    def as_linear(self, x: mx.array) -> mx.array:
        return project(x, self.weight)

    def to_quantized(  # type: ignore[override]  # nn.quantize gives just these
        self, group_size: int, bits: int, mode: str
    ) -> nn.QuantizedEmbedding:
        """This layer with its weight packed."""
        packed = _pack(self, nn.QuantizedEmbedding, group_size, bits, mode)
        packed.num_embeddings, packed.dims = self.weight.shape
        return packed


class Conv2d(nn.Conv2d):
    """A convolution with square kernels, over all channels."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True
    ):
        nn.Module.__init__(self)
        self.weight = mx.zeros((out_channels, kernel, kernel, in_channels))
        if bias:
            self.bias = mx.zeros((out_channels,))
        self.stride = (stride, stride)
        self.padding = (padding, padding)
        self.dilation = (1, 1)
        self.groups = 1


def _pack(layer: nn.Module, kind: type[_Packed], group_size: int, bits: int, mode: str) -> _Packed:
    packed = kind.__new__(kind)
    nn.Module.__init__(packed)
    packed.group_size = group_size
    packed.bits = bits
    packed.mode = mode
    packed.weight, packed.scales, packed.biases = mx.quantize(layer.weight, group_size, bits, mode=mode)
    if "bias" in layer:
        packed.bias = layer.bias
    return packed


def dense(layer: nn.QuantizedLinear, dtype: mx.Dtype, outputs: slice = slice(None)) -> mx.array:
    """The weight of some outputs of a layer, unpacked."""
    weight, scales, biases = (layer[name][outputs] for name in ("weight", "scales", "biases"))
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    if layer.bits != 6 or on_gpu():
        return mx.dequantize(weight, scales, biases, layer.group_size, layer.bits, mode=layer.mode)
    # On a CPU MLX takes 6 bits one by one, in 24 bytes a weight and 14 times the time.
    codes = _six_bits(weight).reshape(*scales.shape, -1)
    return (codes * scales[..., None] + biases[..., None]).flatten(1)


def _six_bits(packed: mx.array) -> mx.array:
    """The codes `[rows, columns]` of one byte each that are packed into three quarters of that."""
    a, b, c = mx.unflatten(packed.view(mx.uint8), 1, (-1, 3)).moveaxis(-1, 0)
    return mx.stack([a & 63, (a >> 6 | b << 2) & 63, (b >> 4 | c << 4) & 63, c >> 2], axis=-1).flatten(1)


class Adapters(Protocol):
    """What runs beside layers of a network, whose weights stay as they are."""

    @property
    def arrays(self) -> list[mx.array]:
        """All that they take in memory."""

    @property
    def nbytes(self) -> int:
        """Bytes that they take in memory as long as they exist, those of all layers together."""

    @property
    def identity(self) -> str:
        """A text that tells their effect from the effect of all other adapters."""

    def scaled(self, factor: float) -> "Adapters":
        """The same with what they change times a factor; the arrays are shared."""

    @property
    def has_steps(self) -> bool:
        """Whether some of them work in some steps only."""

    def at(self, step: int) -> bool:
        """Put those to work that are for this step, counted from 1. Gives whether others were at work until now."""

    def beside(self, name: str, layer: nn.Module) -> nn.Module:
        """The module to call in place of the `layer` of this name, such as `double_blocks.3.img_attn.qkv`: one that
        calls it, or the layer itself. This is asked again whenever the layer has been read from disk."""


def adapted(part: Any, adapters: Adapters | None, name: str = "") -> Any:
    """A part of a network with `adapters` beside its layers: a copy that shares the weights.

    The part itself stays as it is, so its layers keep the names that their weights have in files.

    Args:
        part: a module, or a list of them; anything else is given back.
        adapters: None: there are none.
        name: of the part in its network.
    """
    return part if adapters is None else _with_layers(part, adapters.beside, name)


def unpacked(part: Any, x: mx.array) -> Any:
    """A part of a network that is going to be given all rows of `x`, with packed weights dense where a GPU is faster
    with these: a copy that shares all else, and unpacks each weight when it is first needed, for all its uses. (On a
    CPU, which waits for each product, layers do so themselves with less memory.)

    Args:
        part: a module, or a list of them.
        x: `[..., channels]`.
    """
    if not on_gpu() or _rows(x) < rows_to_unpack():
        return part
    return _with_layers(part, lambda _, layer: _dense(layer, x.dtype))


def _with_layers(part: Any, change: Callable[[str, nn.Module], nn.Module], name: str = "") -> Any:
    """A copy of a part of a network with what becomes of its layers, which are called by their names."""
    prefix = name and f"{name}."
    if isinstance(part, list):
        return [_with_layers(child, change, f"{prefix}{number}") for number, child in enumerate(part)]
    if not isinstance(part, nn.Module):
        return part
    if not part.children():
        return change(name, part)
    whole = copy(part)
    for key, child in part.items():
        whole[key] = _with_layers(child, change, f"{prefix}{key}")
    return whole


def _dense(layer: nn.Module, dtype: mx.Dtype) -> nn.Module:
    return layer.unpacked(dtype) if isinstance(layer, QuantizedLinear) else layer


def _rows(x: mx.array) -> int:
    return x.size // x.shape[-1]


def project(x: mx.array, weight: mx.array) -> mx.array:
    """`x @ weight.T` in the dtype of `x`, where weights of 16 bits meet activations of 32.

    The weight is widened some rows at a time, which gives what a widened copy in memory would give.
    """
    if weight.dtype == x.dtype:
        return x @ weight.T
    return _project_in_slices(x, range(len(weight)), lambda outputs: weight[outputs].astype(x.dtype), WIDENED)


def _project_in_slices(x: mx.array, outputs: range, widened: Callable[[slice], mx.array], most: int) -> mx.array:
    """The `outputs` for `x`, with what their weights are `widened` to, at most so many at a time."""
    rows = max(1, most // x.shape[-1])
    parts = []
    mx.eval(x)  # what it is made of is freed before weights are widened
    for start in outputs[::rows]:
        parts.append((x @ widened(slice(start, min(start + rows, outputs.stop))).T).astype(x.dtype))
        mx.eval(parts[-1])  # or MLX would widen the next rows, and the next layer's, meanwhile
    return mx.concatenate(parts, axis=-1)


def project_to(layer: nn.Module, x: mx.array, outputs: slice) -> mx.array:
    """Some of the `outputs` of a linear layer without a bias, of `x`."""
    if type(layer) is Linear and "bias" not in layer:
        return project(x, layer.weight[outputs])
    if type(layer) is QuantizedLinear and "bias" not in layer:
        return layer.project(x, outputs)
    return layer(x)[..., outputs]


def project_sum(layer: nn.Module, a: mx.array, b: mx.array) -> mx.array:
    """A linear layer of `a` and `b` side by side: as a sum of two products where its weight is of their dtype."""
    if type(layer) is not Linear or "bias" in layer or layer.weight.dtype != a.dtype:
        return layer(mx.concatenate([a, b], axis=-1))
    width = a.shape[-1]
    return mx.addmm(a @ layer.weight[:, :width].T, b, layer.weight[:, width:].T)


@fused
def clip_float16(x: mx.array) -> mx.array:
    """`x` with what is beyond the range of float16, infinities included, at its end."""
    return mx.clip(x, -FLOAT16_MAX, FLOAT16_MAX)


def cast(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """`x` in `dtype`; what is beyond the range of float16 is put at its end."""
    x = x.astype(dtype)
    return clip_float16(x) if dtype == mx.float16 else x


def check_finite(x: mx.array, network: str) -> None:
    """Raise RangeError if `x`, which the `network` gave, has values that are not finite numbers."""
    if mx.isfinite(x).all().item():
        return
    if x.dtype == mx.float16:
        raise RangeError("the computation overflowed float16; use dtype='bfloat16'")
    raise RangeError(
        f"the {network} gave values that are not finite numbers; `flux2_mlx.verification.verify` tells whether its "
        "weights are damaged"
    )


# MLX's own activations are compiled on every device, `fused` ones on a GPU. What is compiled holds Python objects until
# its thread ends, and on Linux a daemon thread that ends while Python does aborts the process when it lets go of them.
@fused
def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


@fused
def gelu(x: mx.array) -> mx.array:
    return x * (1 + mx.erf(x / math.sqrt(2))) / 2


@fused
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """SiLU(gate) · x."""
    return silu(gate) * x


class GatedMLP(nn.Module):
    """`down(SiLU(gate(x)) · up(x))`, `dims` channels to `hidden_dims` and back."""

    def __init__(self, dims: int, hidden_dims: int):
        super().__init__()
        self.gate_proj = Linear(dims, hidden_dims)
        self.up_proj = Linear(dims, hidden_dims)
        self.down_proj = Linear(hidden_dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    mask: mx.array | None = None,
    settle: Callable[..., None] = mx.eval,
) -> mx.array:
    """Scaled dot-product attention, `[B, tokens, heads · head_dim]`; `k` and `v` may have fewer heads than `q`.

    `mask` is boolean, `[B or 1, 1, Lq, Lk]`, True where a query may look. A query that may look nowhere gets zeros,
    as in PyTorch. `settle` has one of several chunks of queries computed, by itself: on a GPU it need not wait for it
    where no scores are stored.
    """
    B, heads, Lq, head_dim = q.shape
    keys = B * heads * k.shape[2]
    is_fused = fuses_attention(head_dim, q.dtype.size)
    rows = max(1, OPERATIONS_PER_CHUNK // (4 * keys * head_dim) if is_fused else _SCORES_PER_CHUNK // keys)
    if is_fused and rows >= Lq:
        return _attend(q, k, v, mask)
    chunks = []
    if not is_fused:
        settle = mx.eval
    if rows < Lq:
        settle(q, k, v)  # what they are made of is freed before there are scores
    for start in range(0, Lq, rows):
        part = slice(start, start + rows)
        chunks.append(_attend(q[:, :, part], k, v, None if mask is None else mask[:, :, part]))
        settle(chunks[-1])
    return mx.concatenate(chunks, axis=1) if len(chunks) > 1 else chunks[0]


def score_bytes(heads: int, tokens: int, head_dim: int, itemsize: int) -> int:
    """Bytes of the attention scores that are stored at one time (see `attention`)."""
    if fuses_attention(head_dim, itemsize):
        return 0
    return itemsize * min(max(_SCORES_PER_CHUNK, heads * tokens), heads * tokens**2)


def attention_operations(heads: int, queries: int, keys: int, head_dim: int, itemsize: int) -> int:
    """Operations of the longest product of attention (see `attention`)."""
    whole = 4 * heads * queries * keys * head_dim
    if fuses_attention(head_dim, itemsize):
        return min(whole, max(OPERATIONS_PER_CHUNK, 4 * heads * keys * head_dim))
    return min(whole, 4 * head_dim * max(_SCORES_PER_CHUNK, heads * keys))


def _attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
    if mask is None:
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
    else:
        # Over no keys at all the softmax is not a number, so a blind query first looks everywhere.
        sees = mask.any(axis=-1, keepdims=True)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask | ~sees)
        out = mx.where(sees, out, 0)
    return out.transpose(0, 2, 1, 3).flatten(2)
