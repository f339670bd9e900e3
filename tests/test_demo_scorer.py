"""The scorer that judges the demonstration model, on pictures whose content is known."""

from dataclasses import replace

import numpy as np
import pytest
from evaluate import held_out_prompts, rates
from PIL import Image
from prompts import canonical_prompt, parse_prompt, sample_prompt
from scenes import (
    COLOURS,
    OPPOSITE,
    PALETTE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Shape,
    draw,
    held_out,
    sample_held_out_scene,
    sample_scene,
    sample_training_scene,
)
from scorer import compare, judge, matches, read_scene


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, Image.Image]]:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(100)]
    return [(scene, draw(scene, rng)) for scene in scenes]


def changed(scene: Scene) -> list[Scene]:
    """Scenes that differ from `scene` in one attribute."""
    others = [replace(scene, background=colour) for colour in COLOURS if colour != scene.background]
    colours = [colour for colour in COLOURS if colour != scene.first.colour]
    names = [name for name in SHAPES if name != scene.first.name]
    others += [replace(scene, first=replace(scene.first, colour=colour)) for colour in colours]
    others += [replace(scene, first=replace(scene.first, name=name)) for name in names]
    if not scene.is_pair:
        return others + [replace(scene, size=size) for size in SIZES if size != scene.size]
    others += [replace(scene, relation=relation) for relation in RELATIONS if relation != scene.relation]
    return [*others, replace(scene, first=scene.second, second=scene.first)]


def test_drawn_scenes_are_right(drawn):
    assert [scene for scene, image in drawn if not matches(image, scene)] == []


def test_scenes_with_one_attribute_changed_are_wrong(drawn):
    for scene, image in drawn:
        reading = read_scene(image)
        assert not any(compare(reading, other).all_right for other in changed(scene))


def test_other_scenes_are_wrong(drawn):
    shifted = [scene for scene, _ in drawn[1:] + drawn[:1]]
    assert not any(matches(image, other) for (_, image), other in zip(drawn, shifted, strict=True))


def test_the_opposite_relation_of_exchanged_shapes_is_right(drawn):
    pairs = [(scene, image) for scene, image in drawn if scene.is_pair]
    for scene, image in pairs:
        turned = Scene(scene.background, scene.second, None, OPPOSITE[scene.relation], scene.first)
        assert matches(image, turned)


def test_verdict_names_what_is_wrong():
    scene = Scene("blue", Shape("star", "red"), None, "above", Shape("ring", "white"))
    image = draw(scene, np.random.default_rng(1))
    exchanged = replace(scene, first=Shape("ring", "red"), second=Shape("star", "white"))
    assert not judge(image, exchanged).all_right
    assert judge(image, replace(scene, relation="below")).relation is False
    assert judge(image, replace(scene, background="black")).background is False
    single = judge(image, Scene("blue", Shape("star", "red"), "large"))
    assert (single.background, single.count, single.relation) == (True, False, None)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [128, 256])
def test_size_is_read_at_any_resolution(size, side):
    scene = Scene("green", Shape("triangle", "yellow"), size)
    assert read_scene(draw(scene, np.random.default_rng(2), side)).shapes[0].size == size


@pytest.mark.parametrize("colour", COLOURS)
def test_an_empty_picture_has_no_shapes(colour):
    reading = read_scene(Image.new("RGB", (128, 128), PALETTE[colour]))
    assert (reading.background, reading.shapes) == (colour, ())


def test_noise_is_no_scene():
    noise = np.random.default_rng(3).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert not matches(Image.fromarray(noise), Scene("blue", Shape("star", "red"), "large"))


def test_about_a_tenth_is_held_out():
    rng = np.random.default_rng(4)
    share = np.mean([held_out(sample_scene(rng)) for _ in range(4000)])
    assert 0.07 < share < 0.14


def test_held_out_is_stable():
    shapes = [Shape(name, "yellow") for name in ("triangle", "star", "circle")]
    singles = [Scene("red", shape, size) for shape in shapes for size in SIZES]
    assert [(scene.first.name, scene.size) for scene in singles if held_out(scene)] == [
        ("triangle", "large"),
        ("star", "small"),
    ]


def test_held_out_does_not_depend_on_how_a_pair_is_told():
    rng = np.random.default_rng(5)
    for scene in [sample_scene(rng, pair=True) for _ in range(300)]:
        turned = Scene(scene.background, scene.second, None, OPPOSITE[scene.relation], scene.first)
        assert held_out(turned) == held_out(scene)


def test_training_and_evaluation_do_not_share_combinations():
    rng = np.random.default_rng(6)
    assert not any(held_out(sample_training_scene(rng)) for _ in range(500))
    assert all(held_out(sample_held_out_scene(rng)) for _ in range(100))


def test_prompts_parse_to_their_scenes():
    rng = np.random.default_rng(7)
    for scene in [sample_scene(rng) for _ in range(1500)]:
        assert parse_prompt(canonical_prompt(scene)) == scene
        prompt = sample_prompt(scene, rng, plain=0.0)
        assert parse_prompt(prompt) == scene, prompt


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("A big red circle, blue background.", Scene("blue", Shape("circle", "red"), "large")),
        ("orange ring on black", Scene("black", Shape("ring", "orange"), "medium")),
        ("a white star", Scene("black", Shape("star", "white"), "medium")),
        (
            "on a green background there is a red star to the left of an orange donut",
            Scene("green", Shape("star", "red"), None, "left of", Shape("ring", "orange")),
        ),
    ],
)
def test_known_prompts(prompt, scene):
    assert parse_prompt(prompt) == scene


@pytest.mark.parametrize("prompt", ["", "a circle", "a red circle blue square on white", "a cat on a blue background"])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match=r"not a sentence|no relation"):
        parse_prompt(prompt)


def test_articles_agree():
    prompt = canonical_prompt(Scene("orange", Shape("ring", "orange"), "medium"))
    assert prompt == "an orange ring on an orange background"


def test_evaluation_prompts_are_stable_and_held_out():
    examples = held_out_prompts(50)
    assert examples == held_out_prompts(50)
    assert all(held_out(scene) and parse_prompt(prompt) == scene for scene, prompt in examples)


def test_rates_leave_out_what_a_scene_has_not(drawn):
    singles = [judge(image, scene) for scene, image in drawn if not scene.is_pair]
    shares = rates(singles)
    assert shares["all"] == shares["size"] == 1.0
    assert "relation" not in shares
