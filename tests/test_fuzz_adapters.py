"""Some damage to a small adapter of each naming, from a seed."""

import random
from collections import Counter

import fuzz
import pytest
from fuzz_adapters import Bench

COUNT = 6


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("adapters"))


def test_nothing_bad_comes_of_damage(bench, monkeypatch):
    monkeypatch.setattr(fuzz, "_reset_peak", lambda: 2**60)  # which takes most of the time
    outcomes = Counter()
    for kind in bench.kinds:
        for case in range(COUNT):
            outcome, detail = fuzz.judge(bench, kind, random.Random(f"{kind}/{case}"))
            assert outcome not in fuzz.BAD, f"{kind} {case}: {outcome}: {detail}"
            outcomes[outcome] += 1
    assert {"identical", "values", "refused"} <= outcomes.keys()
