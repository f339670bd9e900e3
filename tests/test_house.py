"""`scripts/house.py`: what it reads of what mypy says."""

import house
import pytest


@pytest.mark.parametrize(
    ("status", "shown", "complaint", "found"),
    [
        (0, "Success: no issues found in 180 source files\n", "", 0),
        (1, "a.py:1: error: no  [misc]\nFound 1 error in 1 file (checked 180 source files)\n", "", 1),
        (1, "Found 23 errors in 4 files (checked 180 source files)\n", "", 23),
        (2, "a.py:1: error: invalid syntax\nFound 1 error in 1 file (errors prevented further checking)\n", "", None),
        (
            1,
            "",
            "Traceback (most recent call last):\nRecursionError: too deep\n",
            "failed with 1: RecursionError: too deep",
        ),
        (-11, "", "", "failed with -11: nothing"),
        (0, "", "", "failed with 0: nothing"),
    ],
)
def test_errors_of_mypy_are_counted_only_where_it_came_to_an_end(status, shown, complaint, found):
    result = house.found_errors(status, shown, complaint)
    assert result == found if found is not None else result.startswith("failed with 2: Found 1 error in 1 file")
