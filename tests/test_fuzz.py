"""Some hundred damaged checkpoints, sources, pictures, settings, cache entries and answers of a hub, from a seed."""

from collections import Counter

import pytest
from fuzz import BAD, survey

SEED, COUNT = 10, 300


def test_nothing_bad_comes_of_damage():
    results = list(survey(COUNT, SEED))
    assert [result for result in results if result.outcome in BAD] == []
    assert [result.case for result in results] == list(range(COUNT))
    outcomes = Counter(result.outcome for result in results)
    expected = {"identical", "found", "unrecorded", "refused", "converted", "decoded", "made", "fetched"}
    assert outcomes.keys() - {"resealed"} == expected
    assert min(Counter(result.kind for result in results).values()) >= 15


def test_a_case_can_be_run_again():
    cases = [list(survey(5, SEED, first=first, kinds="header,payload,image")) for first in (20, 20, 22)]
    cases = [[result[:3] for result in results] for results in cases]
    assert cases[0] == cases[1]
    assert cases[0][2:] == cases[2][:3]


@pytest.mark.parametrize("kind", ["refused", "unclear", "traceback", "silent", "memory", "crash", "hang", "identical"])
def test_every_outcome_is_told(kind):
    (result,) = survey(1, SEED, kinds=kind, module="helpers.broken_cases", seconds=1)
    assert (result.kind, result.outcome) == (kind, kind)


def test_cases_go_on_after_a_crash():
    results = list(survey(6, SEED, kinds="crash,identical", module="helpers.broken_cases"))
    assert [result.case for result in results] == list(range(6))
    assert [result.outcome for result in results] == [result.kind for result in results]
    assert {result.kind for result in results} == {"crash", "identical"}
