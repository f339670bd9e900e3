"""The kernel that makes heads against the plain path: its body interpreted, and what MLX is given."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.kernels import interpret

from flux2_mlx.config import TransformerConfig
from flux2_mlx.transformer import image_ids, kernel, rope_table
from flux2_mlx.transformer.blocks import QKNorm, rotated_heads
from flux2_mlx.transformer.execution import PLAIN
from flux2_mlx.transformer.kernel import fused_heads, is_right

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
HEADS, TOKENS, EPS = 3, (2, 5), 1e-6
# Of a sum of up to 128 squares in another order: in float32, and by one place where it is rounded to 16 bits.
BOUND = {mx.float32: 2e-6, mx.bfloat16: 2**-7, mx.float16: 2**-10}


def norm_of(head_dim: int, dtype: mx.Dtype) -> QKNorm:
    norm = QKNorm(head_dim, EPS)
    for number, one in enumerate((norm.query_norm, norm.key_norm)):
        one.scale = mx.random.uniform(0.5, 1.5, (head_dim,), key=mx.random.key(number)).astype(dtype)
    return norm


def run(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
    """What MLX does with a kernel, by interpretation."""
    assert all(whole % part == 0 for whole, part in zip(grid, threadgroup, strict=True))  # a CUDA grid has whole groups
    image, token, place = np.indices(grid[::-1], dtype=np.int64)
    threads = {"place": place, "token": token, "image": image, "tokens": np.int64(grid[1])}
    buffers = dict(zip(kernel.INPUTS, inputs, strict=True))
    outputs = dict(zip(kernel.OUTPUTS, output_shapes, strict=True))
    written = interpret(kernel.BODY, threads, dict(template), buffers, outputs, kernel.LANES)
    return [mx.array(written[name]).astype(dtype) for name, dtype in zip(outputs, output_dtypes, strict=True)]


@pytest.fixture(autouse=True)
def _kernel(monkeypatch) -> None:
    monkeypatch.setattr(kernel, "_kernel", lambda: run)
    kernel.is_right.cache_clear()
    yield
    kernel.is_right.cache_clear()


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
@pytest.mark.parametrize(("head_dim", "more", "scale"), [(128, 0, 1), (128, 60, 1), (64, 0, 1), (64, 0, 1e-3)])
def test_the_body_equals_the_plain_path(head_dim, more, scale, dtype):
    """Small numbers are divided by what the norm adds to their squares."""
    projected, heads, norm, table = case(head_dim, dtype, more, scale)
    expected = rotated_heads(projected, heads, norm, table, PLAIN)
    got = fused_heads(projected, heads, norm.scales, norm.eps, table)
    for name, mine, plain in zip(kernel.OUTPUTS, got, expected, strict=True):
        assert mine.shape == plain.shape
        assert error(mine, plain) <= BOUND[dtype], name
        # It rounds where the plain path does.
        assert dtype == mx.float32 or mx.mean(mine == plain) > 0.99
    assert mx.array_equal(got[2], expected[2])


def test_what_float16_can_not_hold_is_clipped_as_in_the_plain_path():
    projected, heads, norm, table = case(128, mx.float16, scale=1e5)
    assert not mx.isfinite(projected).all()
    got = fused_heads(projected, heads, norm.scales, norm.eps, table)
    expected = rotated_heads(projected, heads, norm, table, PLAIN)
    assert all(mx.isfinite(x).all() for x in got)
    assert all(error(mine, plain) <= BOUND[mx.float16] for mine, plain in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_a_number_stays_so(dtype):
    projected, heads, norm, table = case(64, dtype)
    projected[0, 1, :] = mx.nan
    for x in fused_heads(projected, heads, norm.scales, norm.eps, table):
        assert mx.isnan(x[0, :, 1]).all()
        assert mx.isfinite(x[1]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_that_is_right_is_used(dtype, caplog):
    assert is_right(dtype)
    assert not caplog.records


def fail(*_, **__):
    raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: …")


@pytest.mark.parametrize(
    ("instead", "told"),
    [
        (lambda **given: [x[:, ::-1] for x in run(**given)], "its results are off by "),
        (lambda **given: [x + mx.nan for x in run(**given)], "off by nan"),
        (fail, "Unable to build metal library from source; please report it"),
    ],
    ids=["wrong", "nan", "not built"],
)
def test_a_kernel_that_is_wrong_is_not_used_and_that_is_said(instead, told, caplog, monkeypatch):
    monkeypatch.setattr(kernel, "_kernel", lambda: instead)
    assert not is_right(mx.bfloat16)
    assert not is_right(mx.bfloat16)
    (record,) = caplog.records
    assert told in record.getMessage()
    assert "\n" not in record.getMessage()
