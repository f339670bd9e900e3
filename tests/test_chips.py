"""What is known of Apple's chips."""

import pytest

from flux2_mlx.chips import CHIPS, chip_named, find_chip
from flux2_mlx.errors import InputError


@pytest.mark.parametrize("name", ["M3 Max", "Apple M3 Max", "m3 max", "apple  m3   max "])
def test_a_chip_is_found_by_its_name(name):
    assert chip_named(name).tflops == 14.2


@pytest.mark.parametrize("name", ["", "Apple", "M3 Maxi", "M4 Ultra", "Apple Paravirtual device", "H200"])
def test_what_is_not_in_the_table_is_refused_with_what_is(name):
    assert find_chip(name) is None
    with pytest.raises(InputError, match=r"unknown chip .*; choose one of M1, M1 Pro, .*, M5 Max$"):
        chip_named(name)


def test_only_the_newest_have_matrix_units_and_the_first_two_no_bfloat16():
    assert {chip.generation for chip in CHIPS if chip.has_matrix_units} == {5}
    assert {chip.generation for chip in CHIPS if not chip.has_bfloat16} == {1, 2}
    assert all((chip.matrix_tflops > chip.tflops) == chip.has_matrix_units for chip in CHIPS)


def test_those_of_a_generation_stand_from_the_slowest_to_the_fastest():
    order = [(chip.generation, chip.tflops, chip.bandwidth) for chip in CHIPS]
    assert sorted(order) == order
    assert all(chip.source for chip in CHIPS)
