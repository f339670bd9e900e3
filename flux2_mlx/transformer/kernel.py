"""One kernel from a projection to queries, keys and values: norm, rotation, layout and cast.

MLX's own operations pass over queries and keys several times for that (a copy of the strided view, norm and rotation,
each with a read and a write) and once over values. The body is written in what Metal and CUDA C++ have in common, so
that one text serves both; a test interprets it against the plain path (tests/test_kernel.py).
"""

import logging
import math
from functools import cache
from typing import Any

import mlx.core as mx

from ..device import on_gpu, on_metal
from ..layers import FLOAT16_MAX
from .headroom import clips, unit
from .rope import rotate

LANES = 32  # threads that add up what each has without memory: a SIMD group of Metal, a warp of CUDA
_log = logging.getLogger(__name__)
# Of the largest value, which is rounded to 1/256 of itself at most; a channel at a wrong place is off by about 1.
_TOLERANCE = 1 / 32
_THREADS = 256  # in a group at most, as MLX has them in kernels of its own

# Each lane has two neighbours of every 64 channels of a head, so that a group reads and writes what lies together, and
# pairs are rotated within a lane. It rounds where the plain path does.
BODY = """
int head = place / LANES;
int lane = place % LANES;
size_t row = (size_t(image) * tokens + token) * WIDTH + head * CHANNELS;
size_t to = ((size_t(image) * HEADS + head) * tokens + token) * CHANNELS;
size_t turn = size_t(token) * 2 * CHANNELS;
float q[CHANNELS / LANES];
float k[CHANNELS / LANES];
float q_squares = 0.0f;
float k_squares = 0.0f;
for (int i = 0; i < CHANNELS / LANES; ++i) {
    int channel = (i / 2) * 2 * LANES + 2 * lane + i % 2;
    float v = float(projected[row + 2 * HEADS * CHANNELS + channel]);
    q[i] = float(projected[row + channel]);
    k[i] = float(projected[row + HEADS * CHANNELS + channel]);
    if (CLIPS) {
        q[i] = q[i] > LIMIT ? LIMIT : q[i];
        q[i] = q[i] < -LIMIT ? -LIMIT : q[i];
        k[i] = k[i] > LIMIT ? LIMIT : k[i];
        k[i] = k[i] < -LIMIT ? -LIMIT : k[i];
        v = v > LIMIT ? LIMIT : v;
        v = v < -LIMIT ? -LIMIT : v;
    }
    values[to + channel] = T(v / UNIT);
    q_squares += q[i] * q[i];
    k_squares += k[i] * k[i];
}
float q_norm = RECIPROCAL_ROOT(LANES_SUM(q_squares) / CHANNELS + eps[0]);
float k_norm = RECIPROCAL_ROOT(LANES_SUM(k_squares) / CHANNELS + eps[0]);
for (int i = 0; i < CHANNELS / LANES; ++i) {
    int channel = (i / 2) * 2 * LANES + 2 * lane + i % 2;
    q[i] = float(T(float(T(q[i] * q_norm)) * float(q_scale[channel])));
    k[i] = float(T(float(T(k[i] * k_norm)) * float(k_scale[channel])));
}
for (int i = 0; i < CHANNELS / LANES; ++i) {
    int channel = (i / 2) * 2 * LANES + 2 * lane + i % 2;
    float along = table[turn + channel];
    float across = table[turn + CHANNELS + channel];
    queries[to + channel] = T(q[i] * along + q[i ^ 1] * across);
    keys[to + channel] = T(k[i] * along + k[i ^ 1] * across);
}
"""
_METAL = """
int place = thread_position_in_grid.x;
int token = thread_position_in_grid.y;
int image = thread_position_in_grid.z;
int tokens = threads_per_grid.y;
"""
_METAL_HEADER = """
#define LANES_SUM(x) metal::simd_sum(x)
#define RECIPROCAL_ROOT(x) metal::precise::rsqrt(x)
"""
_CUDA = """
int place = blockIdx.x * blockDim.x + threadIdx.x;
int token = blockIdx.y;
int image = blockIdx.z;
int tokens = gridDim.y;
"""
_CUDA_HEADER = """
__device__ inline float lanes_sum(float x) {
    for (int distance = 16; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(0xffffffff, x, distance);
    }
    return x;
}
#define LANES_SUM(x) lanes_sum(x)
#define RECIPROCAL_ROOT(x) (1.0f / sqrtf(x))
"""
_NAME = "flux2_heads"
INPUTS = ("projected", "q_scale", "k_scale", "table", "eps")
OUTPUTS = ("queries", "keys", "values")


def fits(projected: mx.array, head_dim: int, *scales: mx.array) -> bool:
    """Whether the kernel can make heads of `head_dim` channels of what was projected, with norms of these `scales`."""
    dtype = projected.dtype
    return on_gpu() and head_dim % (2 * LANES) == 0 and all(x.dtype == dtype for x in scales) and is_right(dtype)


@cache
def is_right(dtype: mx.Dtype) -> bool:
    """Whether this device builds the kernel and gives with it, of a few numbers, what MLX's own operations give; else a
    warning says that these are used."""
    B, heads, L, head_dim, eps = 2, 3, 5, 4 * LANES, 1e-6
    projected, *scales = (
        mx.random.normal(shape, dtype, key=mx.random.key(seed))
        for seed, shape in enumerate([(B, L, 4 * heads * head_dim), (head_dim,), (head_dim,)])
    )
    table = mx.random.normal((L, 2, head_dim), key=mx.random.key(3))
    q, k, v = projected[..., : 3 * heads * head_dim].reshape(B, L, 3, heads, head_dim).transpose(2, 0, 3, 1, 4)
    turned = [rotate(mx.fast.rms_norm(x, scale, eps), table) for x, scale in zip((q, k), scales, strict=True)]
    try:
        got = fused_heads(projected, heads, (scales[0], scales[1]), eps, table)
        pairs = zip(got, (*turned, v / unit(dtype)), strict=True)
        off = [abs((mx.abs(a - b).max() / mx.abs(b).max()).item()) for a, b in pairs]
    except RuntimeError as error:
        return _refused(str(error).splitlines()[0])
    return all(x < _TOLERANCE for x in off) or _refused(f"its results are off by {', '.join(f'{x:.2g}' for x in off)}")


def _refused(why: str) -> bool:
    _log.warning(
        "queries and keys are made by many kernels in place of one, which takes longer: %s; please report it", why
    )
    return False


def fused_heads(
    projected: mx.array, heads: int, scales: tuple[mx.array, mx.array], eps: float, table: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries and keys, normalised and rotated, and values, in units, each `[B, heads, L, head_dim]`.

    Args:
        projected: `[B, L, W]`, of which the first `3 · heads · head_dim` channels are queries, keys and values.
        heads: how many there are.
        scales: of the norms of queries and of keys, each `[head_dim]`.
        eps: of both norms.
        table: rotations of the tokens, float32 `[L, 2, head_dim]`.
    """
    B, L, width = projected.shape
    shape = (B, heads, L, scales[0].size)
    queries, keys, values = _kernel()(
        inputs=[projected, *scales, table, mx.array([eps])],
        template=list(constants(projected.dtype, heads, width, scales[0].size).items()),
        grid=(heads * LANES, L, B),
        threadgroup=(LANES * math.gcd(heads, _THREADS // LANES), 1, 1),
        output_shapes=[shape] * len(OUTPUTS),
        output_dtypes=[projected.dtype] * len(OUTPUTS),
    )
    return queries, keys, values


def constants(dtype: mx.Dtype, heads: int, width: int, head_dim: int) -> dict[str, Any]:
    """What the body knows when it is compiled. `LIMIT` is the end of the range that is clipped to."""
    sizes = {"HEADS": heads, "WIDTH": width, "CHANNELS": head_dim, "LANES": LANES}
    return {"T": dtype, **sizes, "CLIPS": clips(dtype), "LIMIT": FLOAT16_MAX, "UNIT": unit(dtype)}


@cache
def _kernel() -> Any:  # MLX calls what it gives an object
    if on_metal():
        return mx.fast.metal_kernel(_NAME, INPUTS, OUTPUTS, _METAL + BODY, _METAL_HEADER)
    return mx.fast.cuda_kernel(_NAME, INPUTS, OUTPUTS, _CUDA + BODY, _CUDA_HEADER)
