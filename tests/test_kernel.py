"""The kernel that makes heads against the plain path: its body interpreted, and what MLX is given."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.kernels import interpret

from flux2_mlx.config import TransformerConfig
from flux2_mlx.transformer import image_ids, kernel, rope_table
from flux2_mlx.transformer.blocks import QKNorm, rotated_heads
from flux2_mlx.transformer.execution import PLAIN

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
HEADS, TOKENS, EPS = 3, (2, 5), 1e-6
# Of a sum of up to 128 squares in another order: in float32, and by one place where it is rounded to 16 bits.
BOUND = {mx.float32: 2e-6, mx.bfloat16: 2**-7, mx.float16: 2**-10}


def norm_of(head_dim: int, dtype: mx.Dtype) -> QKNorm:
    norm = QKNorm(head_dim, EPS)
    for number, one in enumerate((norm.query_norm, norm.key_norm)):
        one.scale = mx.random.uniform(0.5, 1.5, (head_dim,), key=mx.random.key(number)).astype(dtype)
    return norm


def interpreted(projected, heads, scales, eps, table):
    B, L, width = projected.shape
    head_dim = scales[0].size
    image, token, place = np.indices((B, L, heads * kernel.LANES), dtype=np.int64)
    threads = {"place": place, "token": token, "image": image, "tokens": np.int64(L)}
    inputs = dict(zip(kernel.INPUTS, (projected, *scales, table, mx.array([eps])), strict=True))
    outputs = dict.fromkeys(kernel.OUTPUTS, (B, heads, L, head_dim))
    constants = kernel.constants(projected.dtype, heads, width, head_dim)
    written = interpret(kernel.BODY, threads, constants, inputs, outputs, kernel.LANES)
    return [mx.array(written[name]).astype(projected.dtype) for name in kernel.OUTPUTS]


def case(head_dim: int, dtype: mx.Dtype, more: int = 0, scale: float = 1.0):
    B, L = TOKENS
    axes = (head_dim // 4,) * 4
    config = TransformerConfig(1, 1, HEADS, 8, attention_head_dim=head_dim, axes_dims_rope=axes, guidance_embeds=False)
    width = 3 * HEADS * head_dim + more
    projected = scale * mx.random.normal((B, L, width), key=mx.random.key(5))
    return projected.astype(dtype), HEADS, norm_of(head_dim, dtype), rope_table(image_ids(1, L), config)


def error(a: mx.array, b: mx.array) -> float:
    a, b = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (a, b))
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "more"), [(128, 0), (128, 60), (64, 0)])
def test_the_body_equals_the_plain_path(head_dim, more, dtype):
    projected, heads, norm, table = case(head_dim, dtype, more)
    expected = rotated_heads(projected, heads, norm, table, PLAIN)
    got = interpreted(projected, heads, norm.scales, norm.eps, table)
    for name, mine, plain in zip(kernel.OUTPUTS, got, expected, strict=True):
        assert mine.shape == plain.shape
        assert error(mine, plain) <= BOUND[dtype], name
    assert mx.array_equal(got[2], expected[2])


def test_what_float16_can_not_hold_is_clipped_as_in_the_plain_path():
    projected, heads, norm, table = case(128, mx.float16, scale=1e5)
    assert not mx.isfinite(projected).all()
    got = interpreted(projected, heads, norm.scales, norm.eps, table)
    expected = rotated_heads(projected, heads, norm, table, PLAIN)
    assert all(mx.isfinite(x).all() for x in got)
    assert all(error(mine, plain) <= BOUND[mx.float16] for mine, plain in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_a_number_stays_so(dtype):
    projected, heads, norm, table = case(64, dtype)
    projected[0, 1, :] = mx.nan
    for x in interpreted(projected, heads, norm.scales, norm.eps, table):
        assert mx.isnan(x[0, :, 1]).all()
        assert mx.isfinite(x[1]).all()
