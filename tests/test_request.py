"""The checks of a run's settings."""

import math

import numpy as np
import pytest

from flux2_mlx.config import VARIANTS
from flux2_mlx.errors import InputError
from flux2_mlx.request import MAX_IMAGES, MAX_SEED, Request

KLEIN, BASE = VARIANTS["klein-4b"], VARIANTS["klein-base-4b"]


def checked(prompts=("a fox",), variant=KLEIN, **settings) -> Request:
    return Request.checked(variant, 16, prompts, **settings)


@pytest.mark.parametrize("variant", [KLEIN, BASE, VARIANTS["demo"]], ids=lambda variant: variant.name)
def test_defaults_come_from_the_variant(variant):
    request = checked(variant=variant, seed=7)
    assert (request.height, request.width) == (variant.size, variant.size)
    assert (request.steps, request.guidance) == (variant.steps, variant.guidance)
    assert request.max_sequence_length == variant.max_sequence_length
    assert (request.prompts, request.seeds, request.sigmas) == (("a fox",), (7,), None)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"height": 0}, "height 0 must be a positive multiple of 16; the smallest is 16"),
        ({"width": -16}, "width -16 must be a positive multiple of 16"),
        ({"height": 1000}, "height 1000 must be a positive multiple of 16; nearest are 992 and 1008"),
        ({"width": 1000}, "width 1000 must be a positive multiple of 16"),
        ({"width": 512.5}, r"width must be a whole number, got 512\.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"seed": "7"}, "seed must be a whole number, got '7'"),
        ({"max_sequence_length": 1.5}, r"max_sequence_length must be a whole number, got 1\.5"),
        ({"images_per_prompt": None}, "images_per_prompt must be a whole number, got None"),
        ({"guidance": 10**400}, "guidance must be a number, got 1000"),
        ({"guidance": "much"}, "guidance must be a number, got 'much'"),
        ({"strength": [1]}, r"strength must be a number, got \[1\]"),
        ({"sigmas": 5}, "sigmas must be a list of numbers, got 5"),
        ({"sigmas": ["a"]}, "sigmas must be a number, got 'a'"),
        ({"sigmas": [None, 1]}, "sigmas must fall"),
        ({"prompts": ["a", 5]}, "a prompt must be text, got int"),
        ({"height": 4096, "width": 4112}, "size 4112×4096 is too large; the limit is 16777216 pixels"),
        ({"height": 16 * 10**12}, "is too large"),
        ({"steps": 0}, "steps must be 1 to 1000, got 0"),
        ({"steps": -1}, "steps must be 1 to 1000, got -1"),
        ({"steps": 1001}, "steps must be 1 to 1000, got 1001"),
        ({"seed": -1}, "seeds must be 0 to 18446744073709551615, got -1"),
        ({"seed": MAX_SEED + 1}, "seeds must be 0 to .*, got 18446744073709551616"),
        ({"seed": MAX_SEED, "images_per_prompt": 2}, "seeds must be 0 to .*, got 18446744073709551616"),
        ({"guidance": math.nan}, "guidance must be a number of 0 or more, got nan"),
        ({"guidance": math.inf}, "guidance must be a number of 0 or more, got inf"),
        ({"guidance": -0.1}, r"guidance must be a number of 0 or more, got -0\.1"),
        ({"images_per_prompt": 0}, "images_per_prompt must be 1 or more, got 0"),
        ({"images_per_prompt": -1}, "images_per_prompt must be 1 or more, got -1"),
        ({"images_per_prompt": 10**12}, "1000000000000 images are too many; make at most 1000 at a time"),
        ({"max_sequence_length": 0}, "max_sequence_length must be 1 to 512, got 0"),
        ({"max_sequence_length": 513}, "max_sequence_length must be 1 to 512, got 513"),
        ({"sigmas": []}, "there are no sigmas; give one for each step"),
        ({"sigmas": [1.0] * 1001}, "steps must be 1 to 1000, got 1001"),
        ({"sigmas": [1.1, 0.5]}, "sigmas must fall from at most 1 to above 0"),
        ({"sigmas": [0.5, 0.5]}, "sigmas must fall"),
        ({"sigmas": [0.5, 0.7]}, "sigmas must fall"),
        ({"sigmas": [1.0, 0.0]}, "sigmas must fall"),
        ({"sigmas": [1.0, -0.5]}, "sigmas must fall"),
        ({"sigmas": [math.nan]}, "sigmas must fall"),
        ({"sigmas": [1.0, math.nan, 0.5]}, "sigmas must fall"),
        ({"sigmas": [math.inf, 0.5]}, "sigmas must fall"),
        ({"sigmas": [1.0, 0.5], "steps": 0}, "steps must be 1 to 1000, got 0"),
        ({"sigmas": [1.0, 0.5], "strength": 0.5}, r"sigmas don't go with a strength of 0\.5"),
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": ["a", "x" * 100_000]}, "a prompt of 100000 characters is too long; the limit is 10000"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings(settings, match):
    with pytest.raises(InputError, match=match) as caught:
        checked(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"height": 16, "width": 16},
        {"height": 4096, "width": 4096},
        {"height": 16, "width": 2**20},
        {"steps": 1},
        {"steps": 1000},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"seed": MAX_SEED - 1, "images_per_prompt": 2},
        {"guidance": 0},
        {"images_per_prompt": MAX_IMAGES},
        {"max_sequence_length": 1},
        {"sigmas": [1.0]},
        {"sigmas": np.linspace(1, 0.1, 10)},
        {"sigmas": [0.6, 0.3], "steps": 2},
        {"prompts": [""]},
        {"prompts": ["x" * 10_000]},
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_at_the_limits(settings):
    request = checked(**settings)
    for name, value in settings.items():
        expected = tuple(value) if name in ("sigmas", "prompts") else value
        assert (request.seeds[0] if name == "seed" else getattr(request, name)) == expected


def test_a_size_must_fit_the_tokens():
    with pytest.raises(InputError, match="width 48 must be a positive multiple of 32"):
        Request.checked(KLEIN, 32, ["a"], height=64, width=48)


def test_seeds_count_up_over_all_images():
    request = checked(["a", "b", "c"], seed=40, images_per_prompt=2)
    assert request.seeds == (40, 41, 42, 43, 44, 45)
    assert request.images_per_prompt == 2
    assert checked(["a", "b"], seed=3).images_per_prompt == 1


def test_a_run_without_seed_gets_a_random_one():
    seeds = {checked(images_per_prompt=3).seeds for _ in range(5)}
    assert len(seeds) == 5
    for first, second, third in seeds:
        assert 0 <= first == second - 1 == third - 2


def test_sigmas_set_the_steps():
    assert (checked(sigmas=[0.9, 0.5, 0.2]).steps, checked(sigmas=[0.9, 0.5, 0.2]).shift_steps) == (3, 50)
    assert (checked(sigmas=[0.9, 0.5], steps=7).steps, checked(sigmas=[0.9, 0.5], steps=7).shift_steps) == (2, 7)


def test_a_request_of_some_images_has_their_prompts_and_seeds():
    some = checked(["a", "b", "c"], seed=40, images_per_prompt=2).only([4, 1])
    assert (some.prompts, some.seeds, some.images_per_prompt) == (("c", "a"), (44, 41), 1)
