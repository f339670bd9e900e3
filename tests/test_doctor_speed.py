"""Of a check-up, how fast a machine is, and how long a step will take."""

import mlx.core as mx
import pytest
from helpers.findings import as_gpu, verdict

from flux2_mlx.chips import chip_named
from flux2_mlx.config import VARIANTS
from flux2_mlx.doctor import predictions, speed
from flux2_mlx.durations import Rates, rates_of
from flux2_mlx.transformer import pass_operations


def test_a_long_operation_is_told(monkeypatch):
    assert speed.check_dispatch(mx.float32).verdict == "skip"
    as_gpu(monkeypatch)
    monkeypatch.setattr(speed, "timed", lambda work, times: [4 * 16384**2 * 24 * 128 / 1e12])  # 1 TFLOP/s at best
    assert verdict(speed.check_dispatch(mx.float32)) == "warn"
    monkeypatch.setattr(speed, "timed", lambda work, times: [1e-3])
    assert verdict(speed.check_dispatch(mx.float32)) == "pass"


def test_what_a_lack_of_cache_costs_is_told(monkeypatch):
    assert speed.check_cache(mx.float32).verdict == "skip"
    as_gpu(monkeypatch)
    monkeypatch.setattr(speed, "_block_pass", lambda config, dtype: lambda: mx.array(0))
    for seconds, expected in (((1.05, 1.0), "pass"), ((1.3, 1.0), "warn")):
        times = iter(seconds)
        monkeypatch.setattr(speed, "timed", lambda work, count, times=times: [next(times)])
        assert verdict(speed.check_cache(mx.float32)) == expected


def test_a_speed_that_varies_is_told(monkeypatch):
    monkeypatch.setattr(speed, "_block_pass", lambda config, dtype: lambda: mx.array(0))
    times = iter([[0.1], [1.0, 1.1], [0.1], [1.0, 2.0]])
    monkeypatch.setattr(speed, "timed", lambda work, count: next(times))
    rates, found = speed.measure_rates(mx.float32)
    assert verdict(found) == "pass"
    assert rates.attention == pytest.approx(4 * 768**2 * 3072 / 0.1)
    assert rates.products == pytest.approx(2 * 768 * 13 * 3072**2 / 0.9)
    assert verdict(speed.measure_rates(mx.float32)[1]) == "warn"


def test_operations_are_those_that_were_counted():
    """Of klein-4b, klein-9b and dev at 1024×1024, in TFLOP."""
    config = {name: VARIANTS[name].transformer for name in speed.MODELS}
    found = [sum(pass_operations(config[name], 4608)) / 1e12 for name in speed.MODELS]
    assert found == pytest.approx([34.8, 75.5, 282.5], rel=0.02)


def test_predictions_follow_the_rates():
    slow, fast = predictions(Rates(1e12, 1e12)), predictions(Rates(2e12, 2e12))
    assert {name: seconds / 2 for name, seconds in slow.items()} == pytest.approx(fast)
    assert slow["klein-4b"] == pytest.approx(34.8, rel=0.02)


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, "pass"), (1.0, "warn")])
def test_a_slow_cpu_is_told_and_what_to_do(seconds, expected, monkeypatch):
    monkeypatch.setattr(speed, "timed", lambda work, times: [2 * seconds, seconds])
    rate, found = speed.measure_cpu()
    assert rate == pytest.approx(2**30 / seconds)
    assert verdict(found) == expected
    assert ("libopenblas0-pthread" in found.advice) is (expected == "warn")


@pytest.mark.parametrize(("share", "expected"), [(0.9, "pass"), (0.5, "warn")])
def test_a_chip_that_is_slower_than_its_kind_is_told(share, expected, monkeypatch):
    chip = chip_named("M3 Max")
    monkeypatch.setattr(speed, "own_chip", lambda: chip)
    usual = rates_of(chip, mx.bfloat16)
    found = speed.check_rates(Rates(share * usual.products, share * usual.attention), mx.bfloat16)
    assert verdict(found) == expected
    assert found.figure.startswith(f"{share:.1f}")
    assert speed.check_rates(None, mx.bfloat16).figure == "no speed was measured"


def test_a_chip_of_unknown_speed_is_not_judged():
    assert speed.check_rates(Rates(1e12, 1e12), mx.float32).verdict == "skip"
