"""Factors in balance: what is a plain change in float32 is the same in float16, however uneven its factors are."""

import mlx.core as mx
import numpy as np
import pytest

from flux2_mlx.adapters import BiasDifference, Decomposed, Delta, Hadamard, Kronecker, LowRank
from flux2_mlx.balance import split
from flux2_mlx.low_ranks import Change, LowRanks

_rng = np.random.default_rng(5)


def matrix(rows: int, columns: int, power: int = 0) -> mx.array:
    return mx.array(np.ldexp(_rng.standard_normal((rows, columns), np.float32), power))


X = matrix(16, 64)


def relative_error(ours: mx.array, expected: mx.array) -> float:
    ours, expected = ours.astype(mx.float32), expected.astype(mx.float32)
    return (mx.linalg.norm(ours - expected) / mx.linalg.norm(expected)).item()


def low(up: int, down: int, scale: float = 1.0) -> LowRank:
    return LowRank(matrix(4, 64, down), matrix(96, 4, up), scale)


# Powers of two that are about 1 together, or not much more.
FORMS: dict[str, Delta] = {
    "plain": low(-4, -3),
    "faint": low(-30, -3, 2.0**26),
    "all faint": low(-24, -20, 2.0**37),
    "long": low(-30, 27),
    "large": low(17, 17, 2.0**-41),
    "negative": low(-30, -3, -(2.0**26)),
    "Kronecker": Kronecker(matrix(12, 8, -30), matrix(8, 8, 25), 1.0),
    "Kronecker of pairs": Kronecker((matrix(12, 2), matrix(2, 8, -30)), (matrix(8, 2, 25), matrix(2, 8)), 1.0),
    "Kronecker of a scale": Kronecker(matrix(12, 8, -20), matrix(8, 8, -20), 2.0**35),
    "Kronecker of uneven pairs": Kronecker((matrix(12, 2), matrix(2, 8, 40)), (matrix(8, 2, -45), matrix(2, 8)), 1.0),
    "Hadamard of uneven pairs": Hadamard(matrix(96, 2), matrix(2, 64, 40), matrix(96, 2, -45), matrix(2, 64), 1.0),
    "Hadamard of a small scale": Hadamard(matrix(96, 2, 31), matrix(2, 64), matrix(96, 2), matrix(2, 64), 2.0**-25),
    "Hadamard": Hadamard(matrix(96, 2, -30), matrix(2, 64), matrix(96, 2), matrix(2, 64, 25), 1.0),
    "Hadamard of a scale": Hadamard(matrix(96, 2, -20), matrix(2, 64), matrix(96, 2, -20), matrix(2, 64), 2.0**35),
    "Hadamard of many ranks": Hadamard(matrix(96, 8, -30), matrix(8, 64), matrix(96, 8), matrix(8, 64, 23), 1.0),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_uneven_factors_are_the_same_change_in_float16(form):
    cast = form.cast(mx.float16)
    assert {array.dtype for array in cast.arrays} == {mx.float16}
    assert relative_error(cast.weight(), form.weight()) < 1e-3
    assert relative_error(cast.delta(X.astype(mx.float16)), form.delta(X)) < 2e-3
    assert relative_error(form._balanced().weight(), form.weight()) < 1e-6


def test_those_of_very_different_scales_work_together():
    forms = [low(-30, -3, 2.0**26), low(-4, -3), low(-4, -3, 0.5)]
    lows = LowRanks([Change(number, slice(0, 96), form.cast(mx.float16)) for number, form in enumerate(forms)])
    lows.weigh([1.0, 0.75, 1.0])
    stored = mx.concatenate([lows._ups[0].scale * part for part in lows._ups[0].matrix.astype(mx.float32).split(3)])
    wanted = mx.concatenate([w * f.scale * f.up.T for w, f in zip((1.0, 0.75, 1.0), forms, strict=True)])
    ratio = mx.linalg.norm(stored, axis=1) / mx.linalg.norm(wanted, axis=1)
    assert mx.allclose(mx.log2(ratio), mx.round(mx.log2(ratio)), atol=2e-3)  # but for what is in the other factor
    y = lows.added(mx.zeros((16, 96), mx.float16), X.astype(mx.float16))
    expected = sum(w * form.delta(X) for w, form in zip((1.0, 0.75, 1.0), forms, strict=True))
    assert relative_error(y, expected) < 2e-3


@pytest.mark.parametrize("form", [low(0, -3, 2.0**30), Kronecker(matrix(12, 8), mx.zeros((8, 8)), 2.0**30)])
def test_what_changes_nothing_overflows_nothing(form):
    if isinstance(form, LowRank):
        form = LowRank(mx.zeros((4, 64)), form.up, form.scale)
    assert not mx.abs(form.cast(mx.float16).delta(X.astype(mx.float16))).max().item()


def test_a_change_of_a_bias_and_one_within_dora_keep_their_digits():
    bias = BiasDifference(mx.array([2.0**-30, 2.0**20]), 2.0**10).cast(mx.float16)
    assert mx.allclose(bias.scale * bias.difference, mx.array([2.0**-20, 2.0**30]))
    form = FORMS["faint"]
    within = Decomposed(form, mx.ones((96, 1))).cast(mx.float16)
    assert relative_error(within.change.weight(), form.weight()) < 1e-3


@pytest.mark.parametrize(
    ("scale", "told"),
    [(0, (0, 0)), (1, (0, 1)), (0.75, (0, 0.75)), (3, (1, 1.5)), (-8, (3, -1)), (2.0**-8, (0, 2.0**-8))],
)
def test_scales_are_split_where_they_are_large_or_small(scale, told):
    assert split(scale, -8) == told
    assert split(2.0**-20 * 1.5, -8) == (-12, 2.0**-8 * 1.5)
    assert split(2.0**-20 * 1.5) == (-20, 1.5)
