"""A few cases of each kind that a target of `scripts/fuzz.py` has, from a seed."""

import random
from collections import Counter
from typing import Any

import fuzz
import pytest


def outcomes(bench: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each outcome came of `count` cases of each kind; none of them is bad."""
    monkeypatch.setattr(fuzz, "_reset_peak", lambda: 2**60)  # which takes most of the time
    found: Counter[str] = Counter()
    for kind in bench.kinds:
        for case in range(count):
            outcome, detail = fuzz.judge(bench, kind, random.Random(f"{kind}/{case}"))
            assert outcome not in fuzz.BAD, f"{kind} {case}: {outcome}: {detail}"
            found[outcome] += 1
    return found
