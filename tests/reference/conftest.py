"""The mark of all tests that compare with PyTorch, and settings of that."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.reference)


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    # The networks are so small that more threads only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield
