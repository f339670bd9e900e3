"""`t2i --replay`: an image made again from what its file remembers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.cli_runner import PROMPT, difference, done, make, pixels, refusal
from helpers.remembered import remember
from PIL import Image

from flux2_mlx.images import read_settings

BIG_SEED = 2**64 - 1


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """An image of seed 7, made once."""
    (path,) = make("--seed", "7", "-o", tmp_path_factory.mktemp("made") / "a.png")
    return path


@pytest.fixture
def a_png(folder, seven):
    """The same as `a.png` in the working folder."""
    return shutil.copyfile(seven, folder / "a.png")


def replay(*arguments):
    return done("t2i", "--replay", *arguments)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("prompt", [PROMPT, "雪の中の\n赤い狐 🦊"])
def test_a_replay_is_the_same_file(folder, suffix, prompt):
    make("-W", "32", "--seed", BIG_SEED, "-s", "3", "-q", "qint4", "-o", f"a.{suffix}", prompt=prompt)
    assert replay(f"a.{suffix}", "-o", f"b.{suffix}").stdout == f"b.{suffix}\n"
    assert (folder / f"a.{suffix}").read_bytes() == (folder / f"b.{suffix}").read_bytes()


def test_a_replay_from_a_lossy_file_gives_the_lossless_image():
    make("--seed", "7", "-o", "a.png")
    make("--seed", "7", "-o", "a.jpg")
    replay("a.jpg", "-o", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_one_of_several_images_is_made_again_alone():
    make("--seed", "7", "-n", "3", "-o", "a.png")
    replay("a-8.png", "-o", "b.png")
    assert difference("a-8.png", "b.png") < 0.5


def test_a_replay_without_a_seed_given_still_has_one():
    (first,) = make()
    replay(first, "-o", "b.png")
    assert np.array_equal(pixels(first), pixels("b.png"))


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--seed", "8"], "seed", 8),
        (["--seed", "0"], "seed", 0),
        (["-s", "3"], "steps", 3),
        (["-W", "48"], "width", 48),
        (["-g", "0"], "guidance", 0.0),
        (["-q", "qint8", "--text-quant", "bf16"], "quant", "qint8"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["a large blue square"], "prompt", "a large blue square"),
    ],
)
def test_a_setting_given_wins_and_the_others_stay(arguments, name, value, a_png):
    replay("a.png", "-o", "b.png", *arguments)
    assert read_settings("b.png") == read_settings("a.png") | {name: value}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_replay_computes_in_what_the_image_was_computed_in(folder, dtype):
    make("--dtype", dtype, "--seed", "7", "-o", "a.png")
    replay("a.png", "-o", "b.png")
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()


def test_an_image_that_does_not_say_its_dtype_gets_the_usual_one(folder, a_png):
    remember("b.png", dtype=None)
    replay("b.png", "-o", "c.png")
    assert (folder / "a.png").read_bytes() == (folder / "c.png").read_bytes()


def test_other_weights_than_those_of_the_image_are_noticed(a_png):
    remember("b.png", fingerprint="0" * 64)
    message = "demo has other weights than when the image was made, so the new one will differ\n"
    assert message in replay("b.png", "-o", "c.png").stderr
    assert replay("b.png", "-o", "c.png", "--force", "--quiet").stderr == ""
    assert message not in replay("b.png", "-o", "c.png", "--force", "-m", "demo").stderr  # asked for as it is now
    assert message not in replay("a.png", "-o", "c.png", "--force").stderr
    remember("b.png", fingerprint=None)  # of a model whose checkpoint has none
    assert message not in replay("b.png", "-o", "c.png", "--force").stderr


def test_replay_goes_with_several_seeds_and_prompts(a_png):
    assert replay("a.png", "-n", "2", "-o", "b.png").stdout == "b-7.png\nb-8.png\n"
    assert difference("a.png", "b-7.png") < 0.5
    done("t2i", "--replay", "a.png", "--prompts-file", "-", "-o", "c.png", stdin="a large blue square\n")
    assert read_settings("c.png") == read_settings("a.png") | {"prompt": "a large blue square"}


def test_the_replayed_image_is_not_replaced_by_accident():
    before = make("--seed", "7")[0].read_bytes()
    assert done("t2i", "--replay", "demo-7.png").stdout == "demo-7-2.png\n"
    assert Path("demo-7.png").read_bytes() == before
    assert refusal("t2i", "--replay", "demo-7.png", "-o", "demo-7.png").startswith("demo-7.png exists")


def test_a_picture_without_settings(folder):
    for name in ("a.png", "a.jpg", "a.webp", "a.gif"):
        Image.new("RGB", (16, 16)).save(name)
        assert refusal("t2i", "--replay", name) == (
            f"{name} carries no settings of flux2-mlx: another program made it, or they were left out"
        )


def test_no_picture(folder):
    (folder / "a.txt").write_text("a red fox")
    (folder / "a.png").write_text("")
    assert refusal("t2i", "--replay", "a.txt") == "can't read a.txt: it is not an image"
    assert refusal("t2i", "--replay", "a.png") == "can't read a.png: it is not an image"
    assert refusal("t2i", "--replay", "b.png") == "can't read b.png: No such file or directory"
    assert refusal("t2i", "--replay", folder) == f"can't read {folder}: Is a directory"


def test_a_picture_cut_short_gives_one_line(folder, a_png):
    data = (folder / "a.png").read_bytes()
    for length in range(0, 1200, 37):
        (folder / "cut.png").write_bytes(data[:length])
        message = refusal("t2i", "--replay", "cut.png")
        assert "cut.png" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 5}, "the settings in b.png are damaged: prompt is 5"),
        ({"prompt": None}, "the settings in b.png are damaged: prompt is None"),
        ({"width": "wide"}, "the settings in b.png are damaged: width is 'wide'"),
        ({"guidance": [1.0]}, r"the settings in b.png are damaged: guidance is [1.0]"),
        ({"prompt": "  "}, "the prompt is empty; describe the image in words"),
        ({"prompt": "\ud800"}, r"the prompt is not valid text: '\ud800'"),
        ({"upsampled_prompt": "\ud800"}, r"the prompt is not valid text: '\ud800'"),
        ({"fingerprint": 5}, "the settings in b.png are damaged: fingerprint is 5"),
        ({"upsampled_prompt": 5}, "the settings in b.png are damaged: upsampled_prompt is 5"),
        ({"width": 17}, "width 17 must be a positive multiple of 16; nearest are 16 and 32"),
        ({"step_cache": float("nan")}, "the settings in b.png are damaged: step_cache is nan"),
        ({"guidance": float("nan")}, "the settings in b.png are damaged: guidance is nan"),
        ({"quant": "qint2"}, "unknown quantization 'qint2'; choose one of bf16, qint8, qint6, mixed4, qint4"),
        ({"dtype": "half"}, "unknown dtype 'half'; choose one of float32, bfloat16, float16"),
        ({"dtype": 16}, "the settings in b.png are damaged: dtype is 16"),
        ({"seed": -1}, f"seeds must be 0 to {BIG_SEED}, got -1"),
    ],
)
def test_wrong_settings_in_a_picture(changes, message, a_png):
    remember("b.png", **changes)
    assert refusal("t2i", "--replay", "b.png", "-o", "c.png") == message
