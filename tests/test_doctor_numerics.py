"""Of a check-up, whether results are right: every check passes here, and fails with a part that is broken."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from helpers.findings import as_gpu, verdict
from mlx.utils import tree_flatten

from flux2_mlx import Flux2Pipeline, doctor, layers
from flux2_mlx.config import TransformerConfig
from flux2_mlx.doctor import Finding, numerics
from flux2_mlx.transformer import blocks

SMALL = TransformerConfig(1, 1, 2, 64, 32, 16, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)


def demo() -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", prompt_cache=False)


def test_the_demo_image_is_the_shipped_one():
    assert verdict(numerics.check_demo(demo())) == "pass"


@pytest.mark.parametrize("broken", ["rope", "nan"])
def test_a_wrong_demo_image_fails(broken, monkeypatch):
    if broken == "rope":
        monkeypatch.setattr(blocks, "rotate", lambda x, table: x)
        assert verdict(numerics.check_demo(demo())) == "fail"
    else:
        monkeypatch.setattr(blocks, "rotate", lambda x, table: x * mx.array(float("nan")))
        found = doctor.made("demo image", lambda: numerics.check_demo(demo()))
        assert found.verdict == "fail"
        assert "not finite" in found.figure


def test_a_wrong_product_fails(monkeypatch):
    monkeypatch.setattr(numerics, "_PRODUCT", (16, 128, 96))
    assert verdict(numerics.check_product(mx.float32)) == "pass"
    monkeypatch.setattr(numerics, "_multiply", lambda x, w: (x @ w) + 3)
    assert verdict(numerics.check_product(mx.float32)) == "fail"


@pytest.mark.parametrize(("digits", "expected"), [(24, "pass"), (11, "warn"), (5, "fail")])
def test_products_that_are_cut_are_told(digits, expected, monkeypatch):
    def cut(x: mx.array) -> mx.array:
        scale = 2.0 ** (digits - np.ceil(np.log2(np.abs(np.array(x)) + 1e-30)))
        return mx.array((np.round(np.array(x) * scale) / scale).astype(np.float32))

    monkeypatch.setattr(numerics, "_multiply", lambda x, w: cut(x) @ cut(w))
    assert verdict(numerics.check_float32()) == expected


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_wrong_product_with_packed_weights_fails(bits, monkeypatch):
    monkeypatch.setattr(numerics, "_PACKED", (32, 128))
    assert verdict(numerics.check_quantized(bits, mx.float32)) == "pass"
    multiply = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda x, w, *rest, **kinds: multiply(x, w ^ 1, *rest, **kinds))
    assert verdict(numerics.check_quantized(bits, mx.float32)) == "fail"
    monkeypatch.setattr(mx, "quantized_matmul", lambda *args, **kinds: 2 * multiply(*args, **kinds))
    assert verdict(numerics.check_quantized(bits, mx.float32)) == "fail"


def test_a_wrong_convolution_fails_and_winograd_is_named(monkeypatch):
    monkeypatch.setattr(numerics, "_CHANNELS", 16)
    assert verdict(numerics.check_convolution(mx.float32)) == "pass"
    convolve = mx.conv2d
    monkeypatch.setattr(mx, "conv2d", lambda *args, **kinds: 1.02 * convolve(*args, **kinds))
    assert "Winograd" in numerics.check_convolution(mx.float32).advice
    monkeypatch.setattr(mx, "conv2d", lambda *args, **kinds: 1.5 * convolve(*args, **kinds))
    assert "Winograd" not in numerics.check_convolution(mx.float32).advice
    assert verdict(numerics.check_convolution(mx.float32)) == "fail"


@pytest.mark.parametrize("head_dim", [64, 512])
def test_a_wrong_attention_fails(head_dim, monkeypatch):
    assert verdict(numerics.check_attention(head_dim, mx.float32)) == "pass"
    attend = layers._attend
    monkeypatch.setattr(layers, "_attend", lambda q, k, v, mask: attend(q, k, v, None))
    assert verdict(numerics.check_attention(head_dim, mx.float32)) == "fail"


@pytest.mark.parametrize(("dtype", "most"), [(mx.float32, 1e-5), (mx.float16, 3e-3), (mx.bfloat16, 1e-2)])
def test_blocks_are_compared_with_the_cpu(dtype, most, monkeypatch):
    as_gpu(monkeypatch)
    monkeypatch.setattr(numerics, "BLOCKS", SMALL)
    found = numerics.check_blocks(dtype, 1e12)
    assert verdict(found) == "pass"
    assert found.bound.startswith(f"< {most:.0e}, ")
    # The second pass of a block is the one that the GPU makes.
    passes, modulate = [], blocks.modulate
    monkeypatch.setattr(
        blocks, "modulate", lambda x, *rest: modulate(x, *rest) * (1.1 if passes.append(1) or len(passes) > 4 else 1)
    )
    assert verdict(numerics.check_blocks(dtype, 1e12)) == "fail"


def test_weights_are_drawn_by_what_computes_with_them(monkeypatch):
    streams, normal = [], mx.random.normal
    monkeypatch.setattr(
        mx.random, "normal", lambda *args, **rest: streams.append(rest.get("stream")) or normal(*args, **rest)
    )
    block = numerics.random_weights(blocks.SingleBlock(SMALL))
    assert streams
    assert set(streams) == {None}
    assert {x.dtype for _, x in tree_flatten(block.parameters())} == {mx.bfloat16}
    assert mx.std(block.linear1.weight.astype(mx.float32)).item() == pytest.approx(SMALL.hidden_size**-0.5, rel=0.1)


def test_blocks_are_not_compared_where_that_takes_too_long(monkeypatch):
    assert numerics.check_blocks(mx.float32, 1e12).verdict == "skip"
    as_gpu(monkeypatch)
    found = numerics.check_blocks(mx.float32, 1.34e9)
    assert (found.verdict, found.figure) == ("skip", "the CPU, which the GPU is compared with, would take 1000 s")


def product(monkeypatch: pytest.MonkeyPatch, damage: Callable[[mx.array], mx.array], dtype: mx.Dtype) -> Finding:
    multiply = numerics._multiply
    monkeypatch.setattr(numerics, "_PRODUCT", (256, 128, 1100))
    monkeypatch.setattr(numerics, "_multiply", lambda x, w: damage(multiply(x, w)))
    return numerics.check_product(dtype)


def packed(monkeypatch: pytest.MonkeyPatch, damage: Callable[[mx.array], mx.array], dtype: mx.Dtype) -> Finding:
    multiply = mx.quantized_matmul
    monkeypatch.setattr(numerics, "_PACKED", (512, 128))
    monkeypatch.setattr(mx, "quantized_matmul", lambda *args, **kinds: damage(multiply(*args, **kinds)))
    return numerics.check_quantized(4, dtype)


def convolution(monkeypatch: pytest.MonkeyPatch, damage: Callable[[mx.array], mx.array], dtype: mx.Dtype) -> Finding:
    convolve = mx.conv2d
    monkeypatch.setattr(numerics, "_CHANNELS", 16)
    monkeypatch.setattr(mx, "conv2d", lambda *args, **kinds: damage(convolve(*args, **kinds)))
    return numerics.check_convolution(dtype)


def attention(monkeypatch: pytest.MonkeyPatch, damage: Callable[[mx.array], mx.array], dtype: mx.Dtype) -> Finding:
    attend = layers._attend
    monkeypatch.setattr(layers, "_attend", lambda *args: damage(attend(*args)))
    return numerics.check_attention(64, dtype)


def nothing(values: np.ndarray, row: int, column: int) -> None:
    pass


def a_tile(values: np.ndarray, row: int, column: int) -> None:
    values[row : row + 8, column : column + 8] = 0


def a_row(values: np.ndarray, row: int, column: int) -> None:
    values[row] = 0


def a_number(values: np.ndarray, row: int, column: int) -> None:
    values[row, column] = np.nan


def a_value(values: np.ndarray, row: int, column: int) -> None:
    values[row, column] += 2 * values.std()


@pytest.mark.parametrize("broken", [nothing, a_tile, a_row, a_number, a_value])
@pytest.mark.parametrize(
    ("check", "dtype"),
    [
        (product, mx.float32),
        (product, mx.bfloat16),
        (packed, mx.float32),  # a CPU adds up in 16 bits where weights are packed
        (convolution, mx.bfloat16),
        (attention, mx.bfloat16),
    ],
)
def test_what_is_wrong_in_one_place_alone_is_seen(check, broken, dtype, monkeypatch):
    def damage(y: mx.array) -> mx.array:
        values = np.array(y.astype(mx.float32))
        rows = values.reshape(-1, y.shape[-1])
        random = np.random.RandomState(sum(rows.shape))
        broken(rows, random.randint(len(rows) - 8), random.randint(rows.shape[1] - 8))
        return mx.array(values).astype(y.dtype)

    assert verdict(check(monkeypatch, damage, dtype)) == ("pass" if broken is nothing else "fail")
