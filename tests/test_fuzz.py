"""Some hundred damaged checkpoints, sources, pictures, settings, cache entries and answers of a hub, from a seed."""

from collections import Counter

import pytest
from fuzz import BAD, survey

SEED, COUNT = 10, 300


@pytest.fixture(scope="module")
def results():
    return list(survey(COUNT, SEED))


def test_nothing_bad_comes_of_damage(results):
    assert [result for result in results if result.outcome in BAD] == []
    assert [result.case for result in results] == list(range(COUNT))
    outcomes = Counter(result.outcome for result in results)
    expected = {"identical", "found", "unrecorded", "refused", "converted", "decoded", "made", "fetched"}
    assert outcomes.keys() - {"resealed"} == expected
    assert min(Counter(result.kind for result in results).values()) >= 15


def test_a_case_can_be_run_again(results):
    again = list(survey(20, SEED, first=40))
    assert len({result.kind for result in again}) >= 7
    assert [result[:3] for result in again] == [result[:3] for result in results[40:60]]


def test_every_outcome_is_told():
    kinds = {"refused", "unclear", "traceback", "silent", "memory", "identical"}
    results = list(survey(30, SEED, kinds=",".join(kinds), module="helpers.broken_cases"))
    assert {result.kind for result in results} == kinds
    assert [result.outcome for result in results] == [result.kind for result in results]


@pytest.mark.parametrize("kind", ["crash", "hang"])
def test_what_ends_a_process_is_told(kind):
    (result,) = survey(1, SEED, kinds=kind, module="helpers.broken_cases", seconds=1)
    assert (result.kind, result.outcome) == (kind, kind)


def test_cases_go_on_after_a_crash():
    results = list(survey(6, SEED, kinds="crash,identical", module="helpers.broken_cases"))
    assert [result.case for result in results] == list(range(6))
    assert [result.outcome for result in results] == [result.kind for result in results]
    assert {result.kind for result in results} == {"crash", "identical"}
