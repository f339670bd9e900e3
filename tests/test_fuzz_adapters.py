"""Some damage to a small adapter of each naming, from a seed."""

import pytest
from fuzz_adapters import Bench
from helpers.fuzz_slice import outcomes

COUNT = 6


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("adapters"))


def test_nothing_bad_comes_of_damage(bench, monkeypatch):
    assert {"identical", "values", "refused"} <= outcomes(bench, COUNT, monkeypatch).keys()
