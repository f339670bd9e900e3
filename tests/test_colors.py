"""Colours that a model has shifted are brought back, on the demonstration model's edits, and an edit keeps its own."""

import numpy as np
import pytest
from edits import KINDS, Edit, sample_held_out_edit
from helpers.cli_runner import done, pixels, refusal
from PIL import Image

from flux2_mlx import Flux2Pipeline, InputError
from flux2_mlx.colors import matched
from flux2_mlx.references import Canvas
from flux2_mlx.references import Edit as Pictures

# Saturation, brightness in levels, contrast.
DRIFTS = [(1.15, 0, 1.0), (1.1, 6, 1.05), (0.85, -8, 1.0), (0.9, 0, 0.9)]


def drifted(image: Image.Image, saturation: float, brightness: float, contrast: float) -> Image.Image:
    """Pillow's YCbCr, changed as models change pictures."""
    pixels = np.asarray(image.convert("YCbCr"), dtype=np.float32) - 127.5
    pixels *= (contrast, saturation, saturation)
    pixels[..., 0] += brightness
    return Image.fromarray(np.clip(np.round(pixels + 127.5), 0, 255).astype(np.uint8), "YCbCr").convert("RGB")


def distance(a: Image.Image, b: Image.Image) -> float:
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).mean()


def sampled(kind: str) -> list[tuple[Image.Image, Image.Image]]:
    rng = np.random.default_rng(0)
    edits: list[Edit] = [sample_held_out_edit(rng, kind) for _ in range(12)]
    return [tuple(Image.fromarray(np.asarray(x.draw())) for x in (edit.before, edit.after)) for edit in edits]


@pytest.mark.parametrize("drift", DRIFTS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "background"])
def test_drifted_edits_are_brought_back(kind, drift):
    before, after = [], []
    for source, edited in sampled(kind):
        shifted = drifted(edited, *drift)
        before.append(distance(shifted, edited))
        after.append(distance(matched(shifted, source), edited))
    assert np.mean(before) > 5
    assert np.mean(after) < 2


@pytest.mark.parametrize("drift", DRIFTS, ids=str)
def test_edits_that_leave_little_are_not_made_worse(drift):
    for source, edited in sampled("background"):
        shifted = drifted(edited, *drift)
        assert distance(matched(shifted, source), edited) <= distance(shifted, edited) + 4


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_keeps_its_own_colours(kind):
    for source, edited in sampled(kind):
        assert distance(matched(edited, source), edited) < 0.1


def noise(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(40, 216, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def test_the_unchanged_pixels_of_a_picture_get_its_statistics():
    source = noise(0)
    got = matched(drifted(source, 1.2, 10, 0.95), source)
    assert np.abs(np.asarray(got, int) - np.asarray(source, int)).max() <= 4


def test_another_picture_stays_as_it_is():
    source, other = Image.new("RGB", (64, 64), "black"), Image.new("RGB", (64, 64), "white")
    assert matched(other, source) is other
    assert matched(source, source).tobytes() == source.tobytes()


def test_with_a_mask_what_is_kept_decides():
    source = noise(0)
    mask = Image.new("L", source.size)
    mask.paste(255, (0, 0, 48, 64))
    painted = source.copy()
    painted.paste(noise(1, (48, 64)), (0, 0))  # what is new
    canvas = Canvas.checked(source, mask, 16)
    plain, told = canvas.paste(drifted(painted, 1.15, 8, 1.0)), canvas.paste(drifted(painted, 1.15, 8, 1.0), True)
    assert distance(plain, painted) > 3
    assert distance(told, painted) < 0.5
    right = (48, 0, 96, 64)
    assert told.crop(right).tobytes() == source.crop(right).tobytes()


@pytest.fixture(scope="module")
def pipe() -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)


SETTINGS = {"seed": 1, "num_inference_steps": 2}


def test_a_pipeline_matches_colours_when_asked(pipe):
    source, _ = sampled("colour")[0]
    plain, told = (
        pipe("make the star green", image=source, match_colors=match, **SETTINGS).images[0] for match in (False, True)
    )
    assert told == matched(plain, Pictures.checked([source], 16).references[0])
    assert told != plain


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "matching colours needs an image"),
        ({"image": noise(0), "width": 128, "height": 128}, "so the image keeps its size; leave width and height out"),
        ({"image": noise(0), "output_type": "np"}, "write output_type='pil', not 'np'"),
        ({"image": noise(0), "match_colors": "yes"}, "match_colors must be True or False, got 'yes'"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_what_can_not_be_matched(settings, match, pipe):
    with pytest.raises(InputError, match=match):
        pipe("red", **{"match_colors": True, **SETTINGS, **settings})


def test_the_command_line_matches_colours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = sampled("colour")[0][0]
    source.save("a.png")
    common = ("-m", "demo", "-s", "2", "--seed", "3")
    for name, extra in {"plain": (), "told": ("--match-colors",)}.items():
        done("i2i", "make the star green", "-i", "a.png", *common, *extra, "-o", f"{name}.png")
        done("outpaint", "a.png", *common, "--left", "32", *extra, "-o", f"{name}-wide.png")
    assert np.array_equal(pixels("told.png"), np.asarray(matched(Image.open("plain.png"), source)))
    kept = np.s_[:, 32 + 32 :]
    assert np.array_equal(pixels("told-wide.png")[kept], np.asarray(source)[:, 32:])
    assert not np.array_equal(pixels("told-wide.png"), pixels("plain-wide.png"))
    done("i2i", "--replay", "told.png", "-o", "again.png")
    done("i2i", "--replay", "told-wide.png", "-o", "again-wide.png")
    assert np.array_equal(pixels("again.png"), pixels("told.png"))
    assert np.array_equal(pixels("again-wide.png"), pixels("told-wide.png"))
    told = refusal("i2i", "red", "-i", "a.png", "--match-colors", "-W", "64", *common, "-o", "b.png")
    assert told == "colours are matched pixel by pixel, so the image keeps its size; leave width and height out"
