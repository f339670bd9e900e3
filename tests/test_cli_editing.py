"""`i2i` and `outpaint`: references, strength, masks, replays, and what they refuse."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.cli_runner import PROMPT, difference, done, pixels, refusal, run
from helpers.remembered import remember
from PIL import Image

from flux2_mlx.files import read_bytes
from flux2_mlx.images import read_settings

DEMO = ("-m", "demo", "-s", "2", "--seed", "3")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name, size in {"a": (96, 80), "b": (70, 131)}.items():
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(f"{name}.png")
    mask = np.zeros((80, 96), dtype=np.uint8)
    mask[30:, 40:] = 255
    Image.fromarray(mask).save("mask.png")
    return tmp_path


@pytest.fixture(scope="module")
def made_before(tmp_path_factory):
    """Copies an image that was made with these arguments, once for all tests, into the working folder."""
    made = {}

    def copy(*arguments):
        if arguments not in made:
            made[arguments] = tmp_path_factory.mktemp("made") / "first.png"
            edit(*arguments, "-o", "first.png")
            shutil.copyfile("first.png", made[arguments])
        shutil.copyfile(made[arguments], "first.png")

    return copy


def edit(*arguments):
    return done("i2i", PROMPT, *DEMO, *arguments)


def test_the_first_image_gives_the_size():
    edit("-i", "b.png", "-i", "a.png", "-o", "out.png")
    assert pixels("out.png").shape == (128, 64, 3)


def test_references_change_the_image(folder):
    for names in (("a.png",), ("b.png",), ("a.png", "b.png"), ("b.png", "a.png")):
        images = [word for name in names for word in ("-i", name)]
        edit(*images, "-W", "64", "-H", "64", "-o", f"out-{''.join(names)}.png")
    done("t2i", PROMPT, *DEMO, "-W", "64", "-H", "64", "-o", "out-none.png")
    outputs = sorted(path.name for path in folder.glob("out-*.png"))
    assert len(outputs) == 5
    assert all(difference(a, b) > 0.5 for a in outputs for b in outputs if a < b)


def test_tokens_are_counted_and_many_are_warned_of(caplog):
    text = edit("-i", "a.png", "-i", "b.png", "-o", "out.png").stderr
    assert "30 tokens of the image and 62 of 2 references" in text
    assert caplog.messages == []
    edit(*["-i", "b.png"] * 4, "-o", "more.png")
    assert "160 tokens, demo is recommended for 128" in caplog.text


def test_report():
    result = edit("-i", "a.png", "--strength", "0.5", "-o", "out.png", "--json", "--quiet")
    report = json.loads(result.stdout)
    assert [phase["name"] for phase in report["phases"]] == ["text_encoder", "vae_encoder", "transformer", "vae"]
    assert (report["width"], report["height"], report["steps"]) == (96, 80, 2)
    assert report["edit"]["images"][0]["path"] == "a.png"
    assert report["edit"]["strength"] == 0.5


def test_a_small_strength_stays_near_the_image():
    for strength in (0.1, 0.95):
        edit("-i", "a.png", "--strength", strength, "-o", f"{strength}.png")
    assert difference("a.png", "0.1.png") < difference("a.png", "0.95.png")


@pytest.mark.parametrize("crop", [(), ("--mask-crop", "4")])
def test_a_mask_leaves_the_rest_alone(crop):
    edit("-i", "a.png", "--mask", "mask.png", *crop, "-o", "out.png")
    inside = pixels("mask.png") > 0
    assert np.array_equal(pixels("out.png")[~inside], pixels("a.png")[~inside])
    assert not np.array_equal(pixels("out.png")[inside], pixels("a.png")[inside])


def test_images_between_the_steps_are_put_into_the_original():
    edit("-i", "a.png", "--mask", "mask.png", "--mask-crop", "4", "--checkpoint", "1", "-o", "out.png")
    inside = pixels("mask.png") > 0
    assert np.array_equal(pixels("out-step-001.png")[~inside], pixels("a.png")[~inside])


def test_outpainting_keeps_the_image():
    done("outpaint", "a.png", *DEMO, "--left", "32", "--bottom", "20", "--overlap", "8", "-o", "out.png")
    out, original = pixels("out.png"), pixels("a.png")
    assert out.shape == (100, 128, 3)
    assert np.array_equal(out[:72, 40:], original[:72, 8:])
    assert not np.array_equal(out[72:80, 40:], original[72:, 8:])


def test_seams_fade():
    """The opacity of what is new falls to nothing where the mask ends."""
    from flux2_mlx.references import Canvas, extended

    picture, mask = extended(Image.new("RGB", (128, 128)), 0, 128, 0, 0, overlap=32)
    canvas = Canvas.checked(picture, mask, 16, feather=16)
    row = np.asarray(canvas.paste(Image.new("RGB", canvas.picture.size, "white")))[64, :, 0].astype(int)
    assert (row[:96].max(), row[128:].min()) == (0, 255)
    assert (np.diff(row) >= 0).all()
    assert np.diff(row).max() < 40


@pytest.mark.parametrize(
    "arguments",
    [
        ("-i", "a.png"),
        ("-i", "a.png", "-i", "b.png", "-W", "64", "-H", "48"),
        ("-i", "a.png", "--strength", "0.6"),
        ("-i", "a.png", "--mask", "mask.png", "--mask-crop", "8"),
    ],
)
def test_replay(arguments, made_before):
    made_before(*arguments)
    done("i2i", "--replay", "first.png", "-o", "again.png")
    assert np.array_equal(pixels("first.png"), pixels("again.png"))
    assert read_settings("first.png")["edit"] == read_settings("again.png")["edit"]


def test_edits_in_float16():
    edit("-i", "a.png", "--dtype", "float16", "-o", "half.png")
    edit("-i", "a.png", "--dtype", "float32", "-o", "exact.png")
    assert 0 < difference("half.png", "exact.png") < 2
    done("outpaint", "a.png", *DEMO, "--top", "16", "--dtype", "float16", "-o", "first.png")
    done("i2i", "--replay", "first.png", "-o", "again.png")
    assert np.array_equal(pixels("first.png"), pixels("again.png"))
    assert [read_settings(name)["dtype"] for name in ("half.png", "first.png")] == ["float16"] * 2


def test_replay_of_outpainting():
    done("outpaint", "a.png", *DEMO, "--top", "16", "-o", "first.png")
    done("i2i", "--replay", "first.png", "-o", "again.png")
    assert np.array_equal(pixels("first.png"), pixels("again.png"))


def test_a_changed_image_is_not_replayed():
    edit("-i", "a.png", "--mask", "mask.png", "-o", "first.png")
    message = "was made from, is neither beside it nor here, or has changed; give the"
    Image.new("L", (96, 80)).save("mask.png")
    assert refusal("i2i", "--replay", "first.png") == f"mask.png, which first.png {message} mask with --mask"
    edit("-i", "a.png", "-o", "second.png")
    Image.new("RGB", (96, 80)).save("a.png")
    assert refusal("i2i", "--replay", "second.png") == f"a.png, which second.png {message} images with -i"


def test_a_replay_in_another_folder(folder, monkeypatch):
    edit("-i", "a.png", "-o", "first.png")
    (folder / "other").mkdir()
    monkeypatch.chdir(folder / "other")
    done("i2i", "--replay", "../first.png", "-o", "again.png")
    assert np.array_equal(pixels("../first.png"), pixels("again.png"))


def test_a_replay_of_files_that_were_moved(folder):
    Image.open("a.png").resize((100, 84)).save("odd.png")
    Image.open("mask.png").resize((100, 84)).save("odd-mask.png")
    edit("-i", "odd.png", "--mask", "odd-mask.png", "--mask-crop", "8", "--strength", "0.8", "-o", "first.png")
    for name in ("odd.png", "odd-mask.png"):
        (folder / name).rename(f"moved-{name}")
    done("i2i", "--replay", "first.png", "-i", "moved-odd.png", "--mask", "moved-odd-mask.png", "-o", "again.png")
    assert np.array_equal(pixels("first.png"), pixels("again.png"))


def test_a_replay_of_outpainting_an_image_that_was_moved(folder):
    done("outpaint", "a.png", *DEMO, "--top", "16", "-o", "first.png")
    (folder / "a.png").rename("moved.png")
    done("i2i", "--replay", "first.png", "-i", "moved.png", "-o", "again.png")
    assert np.array_equal(pixels("first.png"), pixels("again.png"))
    message = refusal("i2i", "--replay", "first.png", "-i", "moved.png", "--mask", "mask.png", "-o", "c.png")
    assert message == "first.png was extended, which marks what is new; leave out the mask mask.png"


def test_the_bytes_that_were_read_are_remembered(monkeypatch):
    """Whatever becomes of a file during the run; here it is gone as soon as it was read."""
    data = Path("a.png").read_bytes()

    def read_once(path, limit):
        read = read_bytes(path, limit)
        path.unlink()
        return read

    monkeypatch.setattr("flux2_mlx.images.read_bytes", read_once)
    edit("-i", "a.png", "-o", "first.png")
    expected = {"path": "a.png", "sha256": hashlib.sha256(data).hexdigest()}
    assert read_settings("first.png")["edit"]["images"] == [expected]


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (("--strength", "0.9"), "strength", 0.9),
        (("--mask-crop", "0"), "mask_crop", 0),
        (("--mask", "other.png"), "mask", "other.png"),
        (("-i", "c.png"), "images", "c.png"),
    ],
)
def test_what_is_given_of_an_edit_wins_and_the_rest_stays(arguments, name, value, made_before):
    Image.new("L", (96, 80), "white").save("other.png")
    Image.new("RGB", (96, 80), "red").save("c.png")
    made_before("-i", "a.png", "--mask", "mask.png", "--mask-crop", "8", "--strength", "0.6")
    done("i2i", "--replay", "first.png", *arguments, "-o", "again.png")
    first, again = (read_settings(path) for path in ("first.png", "again.png"))
    changed = again["edit"].pop(name)
    assert first["edit"].pop(name) != changed
    assert value == changed or value in str(changed)
    assert again == first


SIDES = {"left": 0, "right": 0, "top": 0, "bottom": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": "0.5"}, "the settings in b.png are damaged: strength is '0.5'"),
        ({"mask_crop": "x"}, "the settings in b.png are damaged: mask_crop is 'x'"),
        ({"mask": "mask.png"}, "the settings in b.png are damaged: mask is 'mask.png'"),
        ({"mask": {"path": 5}}, "the settings in b.png are damaged: path is 5"),
        ({"extend": {"foo": 1}}, "the settings in b.png are damaged: left is None"),
        ({"extend": SIDES | {"overlap": "z"}}, "the settings in b.png are damaged: overlap is 'z'"),
        ({"images": []}, "the settings in b.png are damaged: images is []"),
        ({"images": None}, "the settings in b.png are damaged: images is None"),
        ({"images": ["a.png"]}, "the settings in b.png are damaged: 'a.png' should say path, sha256"),
        ({"images": [{"path": "a.png"}]}, "the settings in b.png are damaged: sha256 is None"),
        ({"strength": float("nan")}, "the settings in b.png are damaged: strength is nan"),
    ],
)
def test_a_damaged_edit(changes, message, made_before):
    made_before("-i", "a.png")
    remember("b.png", "first.png", edit=read_settings("first.png")["edit"] | changes)
    assert refusal("i2i", "--replay", "b.png", "-o", "c.png") == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-i", "none.png"), "can't read none.png: No such file or directory"),
        (("-i", "text.png"), "can't read text.png: it is not an image"),
        (("-i", "tiny.png"), "an image of 63×64 is too small; each side must have at least 64 pixels"),
        (("-i", "narrow.png"), "an image of 1024×64 is too narrow; the sides may differ by a factor of 8"),
        (["-i", "a.png"] * 101, "101 images are too many; give at most 100"),
        (("-i", "a.png", "--strength", "0"), "strength must be above 0 and at most 1, got 0.0"),
        (("-i", "a.png", "--strength", "1.5"), "strength must be above 0 and at most 1, got 1.5"),
        (("-i", "a.png", "--strength", "nan"), "strength must be above 0 and at most 1, got nan"),
        (("-i", "a.png", "--strength", "0.001"), "2 steps at strength 0.001 are the end of a schedule of more than"),
        (("-i", "a.png", "--mask", "b.png"), "the mask has 70×131 pixels, its image 96×80; make them equal"),
        (("-i", "a.png", "--mask", "black.png"), "the mask is black, so nothing would change"),
        (("-i", "a.png", "--mask", "line.png"), "the mask marks too little: make the white parts at least 16 pixels"),
        (("-i", "a.png", "--mask", "mask.png", "-W", "64"), "an image that is painted over keeps its size; leave"),
        (("-i", "a.png", "--mask-crop", "5"), "cropping to the mask needs a mask"),
        (("-i", "a.png", "-W", "65"), "width 65 must be a positive multiple of 16"),
    ],
)
def test_refusals(arguments, message):
    Image.new("RGB", (63, 64)).save("tiny.png")
    Image.new("RGB", (1024, 64)).save("narrow.png")
    Image.new("L", (96, 80)).save("black.png")
    line = Image.new("L", (96, 80))
    line.putpixel((32, 32), 255)
    line.save("line.png")
    with open("text.png", "w") as file:
        file.write("no image")
    assert message in refusal("i2i", PROMPT, *DEMO, *arguments, "-o", "out.png")


def test_outpainting_says_how_far_the_seam_reaches():
    help_text = " ".join(done("outpaint", "--help").stdout.split())
    assert "the half beside what is new is painted anew, the other half fades into the image." in help_text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to add; say how many pixels on the left, right, top or bottom"),
        (("--left", "-5"), "left must be 0 or more pixels, got -5"),
        (("--left", "1000"), "an image of 1096×80 is too narrow"),
        (("--left", "100000000"), "an image of 100000096×80 is too narrow"),
        (("--left", "20000", "--top", "20000"), "an image of 20096×20080 is too large; at most 100,000,000 pixels"),
        (
            ("--left", "20", "--overlap", "96"),
            "an overlap of 96 leaves nothing of an image of 96×80; choose at most 95",
        ),
        (
            ("--top", "16", "--bottom", "16", "--overlap", "40"),
            "an overlap of 40 leaves nothing of an image of 96×80; choose at most 39",
        ),
    ],
)
def test_outpainting_refuses(arguments, message):
    assert message in refusal("outpaint", "a.png", *DEMO, *arguments, "-o", "out.png")


def test_an_image_that_its_format_can_not_hold_is_refused_before_anything_is_made(monkeypatch):
    from flux2_mlx import Flux2Pipeline

    monkeypatch.setattr(Flux2Pipeline, "run", None)
    Image.new("RGB", (16500, 2070)).save("wide.png")
    Image.new("L", (16500, 2070), "white").save("all.png")
    message = refusal("i2i", PROMPT, *DEMO, "-i", "wide.png", "--mask", "all.png", "-o", "out.webp", "--quiet")
    assert message == "can't write out.webp: WEBP has at most 16383 pixels a side; choose .png"


def test_help_says_what_gives_the_size():
    t2i, i2i = (" ".join(done(command, "--help").stdout.split()) for command in ("t2i", "i2i"))
    assert t2i.count("Pixels, a multiple of 16. [default: 1024; demo 128]") == 2
    expected = "Pixels, a multiple of 16; not with --mask, --strength or --match-colors. [default: the first image's]"
    assert i2i.count(expected) == 2


def test_an_image_is_needed():
    result = run("i2i", PROMPT, *DEMO)
    assert (result.exit_code, "give an image with -i, or --replay" in result.stderr) == (2, True)


def test_a_mask_of_everything_is_said_to_be_one(caplog):
    Image.new("L", (96, 80), "white").save("white.png")
    edit("-i", "a.png", "--mask", "white.png", "-o", "out.png")
    assert caplog.messages == ["the mask is white all over, so nothing of the image is kept"]


def test_references_beyond_the_memory_are_refused_before_anything_is_loaded(monkeypatch):
    from flux2_mlx import device
    from flux2_mlx.checkpoint import Component

    monkeypatch.setattr(device, "device_memory", lambda: 2**20)
    monkeypatch.setattr(Component, "load", None)
    message = refusal("i2i", PROMPT, *DEMO, "-i", "a.png", "-o", "out.png", "--quiet")
    assert "the limit is 1 MiB; no size fits" in message


def test_references_beyond_the_memory_are_refused_before_a_download(monkeypatch):
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: pytest.fail("asked for a download"))
    Image.new("RGB", (1024, 1024)).save("large.png")
    limit, images = ("--dtype", "bfloat16", "--memory-limit", "4GiB"), ["-i", "large.png"] * 20
    message = refusal("i2i", PROMPT, "-m", "klein-4b", *limit, *images, "-o", "out.png")
    assert re.search(r"^the transformer needs .* GiB, the limit is 4 GiB; 20 references of (\d+)×\1 pixels ", message)
