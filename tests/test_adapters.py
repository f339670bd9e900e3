"""Forms of adapters: what they add to a layer is what their definition says."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from flux2_mlx.adapters import (
    Adapter,
    BiasDifference,
    Decomposed,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Placed,
    folded,
    tucker,
)
from flux2_mlx.low_ranks import Change, LowRanks


def array(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape) + seed))


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def product(*factors: mx.array) -> np.ndarray:
    return np.linalg.multi_dot([float64(factor) for factor in factors])


def pair(rows: int, columns: int, rank: int = 2) -> tuple[mx.array, mx.array]:
    return array(rows, rank), array(rank, columns, seed=1)


A, B, C, D = array(20, 2), array(2, 12), array(20, 2, seed=1), array(2, 12, seed=1)
LOW = LowRank(B, A)
WIDE = array(20, 9), array(9, 12), array(20, 9, seed=1), array(9, 12, seed=1)  # 81 ranks, more than there are inputs
FORMS = {
    "low rank": (LowRank(B, A, 0.5), 0.5 * product(A, B)),
    "Kronecker": (Kronecker(array(4, 3), array(5, 4), 0.7), 0.7 * np.kron(float64(array(4, 3)), float64(array(5, 4)))),
    "Kronecker of pairs": (
        Kronecker(pair(4, 3), pair(5, 4), 2),
        2 * np.kron(product(*pair(4, 3)), product(*pair(5, 4))),
    ),
    "Kronecker of one pair": (Kronecker(array(5, 4), pair(4, 3)), np.kron(float64(array(5, 4)), product(*pair(4, 3)))),
    "Hadamard": (Hadamard(A, B, C, D, 0.3), 0.3 * product(A, B) * product(C, D)),
    "Hadamard of many ranks": (Hadamard(*WIDE, 0.3), 0.3 * product(*WIDE[:2]) * product(*WIDE[2:])),
    "difference": (Difference(array(20, 12), 1.5), 1.5 * float64(array(20, 12))),
}


def relative_error(ours: mx.array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(float64(ours) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("form", "weight"), FORMS.values(), ids=FORMS)
def test_what_is_added_is_the_input_times_the_change(form, weight):
    x = array(2, 7, 12)
    assert relative_error(form.weight(), weight) < 1e-6
    assert form.shape == (form.outputs, 12) == weight.shape
    assert relative_error(form.delta(x), float64(x) @ weight.T) < 1e-6
    assert np.array_equal(form.weight(slice(3, 11)), form.weight()[3:11])
    assert form.nbytes == sum(array.nbytes for array in form.arrays) > 0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("form", "weight"), FORMS.values(), ids=FORMS)
def test_products_are_in_the_dtype_of_the_input(form, weight, dtype):
    x = array(2, 7, 12).astype(dtype)
    for stored in (form, form.cast(dtype)):
        assert stored.delta(x).dtype == dtype
        assert relative_error(stored.delta(x), float64(x) @ weight.T) < 0.03
    assert {array.dtype for array in form.cast(dtype).arrays} == {dtype}


def test_a_change_of_many_ranks_is_never_made_as_a_whole(monkeypatch):
    form, x = Hadamard(*WIDE), array(7, 12)
    expected = form.delta(x)
    monkeypatch.setattr("flux2_mlx.adapters._SLICE", 3 * 12)
    assert mx.allclose(form.delta(x), expected, rtol=1e-5, atol=1e-5)


def test_low_ranks_of_a_large_scale_stay_within_float16():
    form = LowRank(mx.full((1, 4), 100.0), mx.full((2, 1), 1e-3), 1000.0)
    x = mx.full((1, 4), 10.0).astype(mx.float16)
    assert mx.array_equal(form.delta(x), mx.full((1, 2), 65504 * np.float16(1e-3)).astype(mx.float16))


@pytest.mark.parametrize("power", [-30, 0, 16])
def test_products_of_uneven_factors_stay_within_float16(power):
    rng = np.random.default_rng(3)
    down, up = (mx.array(rng.standard_normal(shape, np.float32)) for shape in ((4, 64), (32, 4)))
    form = LowRank(down * 2.0**power, up * 2.0**-power / 64)
    x = mx.array(16 * rng.standard_normal((5, 64), np.float32)).astype(mx.float16)
    expected = x.astype(mx.float32) @ form.weight().T
    cast = form.cast(mx.float16)
    assert cast.down.dtype == cast.up.dtype == mx.float16
    assert mx.allclose(cast.delta(x).astype(mx.float32), expected, rtol=0.01, atol=0.05)
    weighed = LowRanks([Change(0, slice(0, 32), cast)])
    weighed.weigh([1.0])
    ours = weighed.added(mx.zeros((5, 32), mx.float16), x)
    assert mx.allclose(ours.astype(mx.float32), expected, rtol=0.01, atol=0.05)


def test_factors_are_moved_by_powers_of_two_alone():
    form = LowRank(mx.array([[3e5, 1e5], [0.0, 0.0], [0.25, 0.5]]), mx.array([[1e-6, 2.0, 0.0], [3e-6, 1.0, 3.0]]))
    cast = form._balanced()
    assert mx.array_equal(cast.weight(), form.weight())
    factors = (mx.linalg.norm(cast.down, axis=1) / mx.linalg.norm(form.down, axis=1)).tolist()
    assert (factors[0], factors[2]) == (2.0**-19, 1.0)
    assert form.cast(mx.bfloat16).down[0, 0].item() == mx.array(3e5).astype(mx.bfloat16).item()


def test_a_core_of_tucker():
    core, a, b = array(2, 2), array(2, 20), array(2, 12)
    expected = np.einsum("ij,ip,jr->pr", *map(float64, (core, a, b)))
    left, right = tucker(core, a, b)
    assert relative_error(LowRank(right, left).weight(), expected) < 1e-6


def decomposed(weight: np.ndarray, change: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Equation 5 of "DoRA: Weight-Decomposed Low-Rank Adaptation"."""
    axis = 1 if magnitude.shape[1] == 1 else 0
    whole = weight + change
    return magnitude * whole / np.linalg.norm(whole, axis=axis, keepdims=True)


@pytest.mark.parametrize("shape", [(20, 1), (1, 12)])
@pytest.mark.parametrize(("form", "change"), FORMS.values(), ids=FORMS)
def test_a_decomposed_weight_is_as_long_as_its_magnitude(form, change, shape, monkeypatch):
    monkeypatch.setattr("flux2_mlx.adapters._SLICE", 3 * 12)
    weight, magnitude = array(20, 12, seed=3), mx.abs(array(*shape))
    expected = decomposed(float64(weight), change, float64(magnitude))
    assert relative_error(weight + Decomposed(form, magnitude).weight(weight), expected) < 1e-6


def test_magnitudes_are_never_rounded():
    cast = Decomposed(LOW, mx.ones((20, 1))).cast(mx.bfloat16)
    assert (cast.change.up.dtype, cast.magnitude.dtype) == (mx.bfloat16, mx.float32)


def test_a_row_of_zeros_has_no_direction():
    form = Decomposed(LowRank(mx.zeros((1, 4)), mx.zeros((3, 1))), mx.ones((3, 1)))
    assert not form.weight(mx.zeros((3, 4))).any()


def test_changes_are_folded_into_a_weight():
    weight, rows, low = array(60, 12), slice(20, 40), FORMS["low rank"][0]
    magnitude = mx.ones((20, 1))
    placed = [Placed(low, rows), Placed(Decomposed(low, magnitude), slice(40, 60)), Placed(BiasDifference(mx.ones(60)))]
    expected = float64(weight)
    expected[rows] += 0.25 * FORMS["low rank"][1]
    expected[40:] = decomposed(expected[40:], 0.25 * FORMS["low rank"][1], float64(magnitude))
    before = mx.array(weight)
    assert relative_error(folded(weight, placed, 0.25), expected) < 1e-6
    assert mx.array_equal(folded(weight, placed, 0.0), weight)
    assert mx.array_equal(weight, before)
    assert folded(weight.astype(mx.bfloat16), placed).dtype == mx.float32


def test_an_adapter_is_cast_as_its_networks_compute():
    adapter = Adapter(
        "a", {"transformer": {"img_in": (Placed(LowRank(B, A)),)}, "text_encoder": {"x": (Placed(LowRank(B, A)),)}}
    )
    cast = adapter.cast({"transformer": mx.float16, "text_encoder": mx.bfloat16}.__getitem__)
    assert cast.layers["transformer"]["img_in"][0].change.down.dtype == mx.float16
    assert cast.layers["text_encoder"]["x"][0].change.up.dtype == mx.bfloat16
    assert replace(cast, layers={}) == replace(adapter, layers={})
