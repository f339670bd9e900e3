"""What image files carry: no path of the machine they were made on, all or nothing, and shown by `info`."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.cli_runner import DEMO, PROMPT, difference, done, make, pixels, refusal, run
from helpers.remembered import remember
from PIL import Image

from flux2_mlx import device
from flux2_mlx.checkpoint import sealed
from flux2_mlx.images import read_settings

EDIT = ("-m", "demo", "-s", "1", "--seed", "3")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A folder whose name no image may tell, and in it the working folder with pictures."""
    work = tmp_path / "secret-home" / "work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("FLUX2_MLX_HOME", str(tmp_path / "secret-home" / "models"))
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(random.integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(f"{name}.png")
    Image.new("L", (96, 80), "white").save("mask.png")
    return work


def embedded(path):
    """Every byte of an image file, and its settings."""
    return Path(path).read_bytes(), read_settings(Path(path))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_no_image_tells_a_folder(home, suffix):
    shutil.copytree(DEMO, "mine")
    pictures = [word for name in ("a.png", "b.png") for word in ("-i", home / name)]
    done("i2i", PROMPT, "-m", home / "mine", "-s", "1", *pictures, "--mask", home / "mask.png", "-o", f"out.{suffix}")
    data, settings = embedded(f"out.{suffix}")
    assert b"secret" not in data
    assert "secret".encode("utf-16-be") not in data
    assert settings["model"] == "mine"
    hashes = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in ("a.png", "b.png", "mask.png")}
    assert settings["edit"]["images"] == [{"path": name, "sha256": hashes[name]} for name in ("a.png", "b.png")]
    assert settings["edit"]["mask"] == {"path": "mask.png", "sha256": hashes["mask.png"]}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_may_carry_nothing(suffix):
    make("--seed", "7", "-o", f"with.{suffix}")
    make("--seed", "7", "-o", f"without.{suffix}", "--no-metadata")
    assert np.array_equal(pixels(f"with.{suffix}"), pixels(f"without.{suffix}"))
    with Image.open(f"without.{suffix}") as image:
        assert (dict(image.getexif()), getattr(image, "text", {})) == ({}, {})
        assert not {"exif", "parameters", "flux2-mlx", "comment", "xmp"} & set(image.info)
    assert b"flux2" not in Path(f"without.{suffix}").read_bytes()
    message = refusal("t2i", "--replay", f"without.{suffix}")
    assert (
        message == f"without.{suffix} carries no settings of flux2-mlx: another program made it, or they were left out"
    )


@pytest.fixture
def base(home):
    """The demo model as a base model, whose guidance is free: its folder."""
    shutil.copytree(DEMO, "base")
    manifest = json.loads(Path("base/flux2.json").read_text())
    Path("base/flux2.json").write_text(json.dumps(sealed(manifest | {"variant": "klein-base-4b"})))
    return ("-m", "base", "-W", "64", "-H", "64", "-s", "1", "--seed", "7")


def test_a_negative_prompt_is_kept_and_made_again(base):
    done("t2i", PROMPT, *base, "-g", "3", "-o", "plain.png")
    report = done("t2i", PROMPT, *base, "-g", "3", "--negative-prompt", "a blue ring", "-o", "made.png", "--json")
    assert json.loads(report.stdout)["negative_prompt"] == "a blue ring"
    assert not np.array_equal(pixels("plain.png"), pixels("made.png"))
    assert "negative_prompt" not in read_settings(Path("plain.png"))
    assert read_settings(Path("made.png"))["negative_prompt"] == "a blue ring"
    with Image.open("made.png") as image:
        assert image.text["parameters"].startswith(f"{PROMPT}\nNegative prompt: a blue ring\nSteps: 1, ")
    done("t2i", "--replay", "made.png", "-o", "again.png")
    assert Path("made.png").read_bytes() == Path("again.png").read_bytes()
    done("t2i", "--replay", "made.png", "--negative-prompt", "", "-o", "without.png")
    assert Path("plain.png").read_bytes() == Path("without.png").read_bytes()


def test_a_prompt_has_a_negative_prompt_of_its_own(base, caplog):
    lines = [{"prompt": PROMPT, "seed": 7}, {"prompt": PROMPT, "seed": 8, "negative_prompt": "a star"}]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = (
        "t2i",
        *base,
        "-g",
        "3",
        "--prompts-file",
        "a.jsonl",
        "--negative-prompt",
        "a ring",
        "-o",
        "{seed}.png",
    )
    images = json.loads(done(*arguments, "--json").stdout)["images"]
    assert [image["negative_prompt"] for image in images] == ["a ring", "a star"]
    done("t2i", PROMPT, *base, "--seed", "8", "-g", "3", "--negative-prompt", "a star", "-o", "b-{seed}.png")
    assert difference("8.png", "b-8.png") < 0.5
    done("t2i", PROMPT, *base, "-g", "3", "--negative-prompt", "a cat", "-o", "7.png", "--skip-existing")
    assert caplog.messages == ["7.png is left as it is, but was made with another negative prompt"]


def test_where_a_negative_prompt_has_no_effect(base):
    result = done("t2i", PROMPT, *base, "-g", "1", "--negative-prompt", "a star", "-o", "made.png")
    assert "a negative prompt has no effect at a guidance of 1\n" in result.stderr
    message = refusal("t2i", PROMPT, "-m", "demo", "--negative-prompt", "a star")
    assert message.startswith("demo has no use for a negative prompt; leave it out, or choose one of klein-base-4b")


def moved(home, image, *files):
    """Move an image and files that it was made from into a folder of its own, away from where they were."""
    target = home.parent / "elsewhere"
    target.mkdir()
    for name in (image, *files):
        Path(name).rename(target / name)
    return target / image


@pytest.mark.parametrize("beside", [True, False])
def test_files_are_found_beside_the_image_and_in_the_current_folder(home, monkeypatch, beside):
    done("i2i", PROMPT, *EDIT, "-i", home / "a.png", "-i", "b.png", "--mask", "mask.png", "-o", "first.png")
    files = ("a.png", "b.png", "mask.png")
    image = moved(home, "first.png", *(files if beside else ()))
    done("i2i", "--replay", image, "-o", "again.png")
    assert np.array_equal(pixels(image), pixels("again.png"))
    assert read_settings(image) == read_settings(Path("again.png"))


def test_a_file_of_the_name_that_is_another_is_passed_over(home):
    done("i2i", PROMPT, *EDIT, "-i", "a.png", "-o", "first.png")
    image = moved(home, "first.png")
    shutil.copy("b.png", image.parent / "a.png")
    done("i2i", "--replay", image, "-o", "again.png")
    assert np.array_equal(pixels(image), pixels("again.png"))
    Path("a.png").unlink()
    message = (
        f"a.png, which {image} was made from, is neither beside it nor here, or has changed; give the images with -i"
    )
    assert refusal("i2i", "--replay", image) == message


def test_files_that_are_given_are_compared(home):
    done("i2i", PROMPT, *EDIT, "-i", "a.png", "-o", "first.png")
    Path("a.png").rename("moved.png")
    same = done("i2i", "--replay", "first.png", "-i", "moved.png", "-o", "again.png")
    assert "differ" not in same.stderr
    assert np.array_equal(pixels("first.png"), pixels("again.png"))
    other = done("i2i", "--replay", "first.png", "-i", "b.png", "-o", "other.png")
    assert "b.png is not the a.png that the image was made from, so the new one will differ\n" in other.stderr
    assert done("i2i", "--replay", "first.png", "-i", "b.png", "-o", "o.png", "--quiet").stderr == ""


def test_an_image_of_before_with_whole_paths_is_made_again(home, monkeypatch):
    shutil.copytree(DEMO, "mine")
    done("i2i", PROMPT, *EDIT, "-i", "a.png", "-o", "first.png", "-m", "mine")
    settings = read_settings(Path("first.png"))
    settings["edit"]["images"][0]["path"] = str(home / "a.png")
    old = home.parent / "old.png"
    remember(old, "first.png", model=str(home / "mine"), edit=settings["edit"])
    monkeypatch.chdir(home.parent)
    done("i2i", "--replay", "old.png", "-o", "again.png")
    assert np.array_equal(pixels(home / "first.png"), pixels("again.png"))
    assert b"secret" not in Path("again.png").read_bytes()
    arguments = ("i2i", "--replay", "old.png", "-o", "again.png", "--skip-existing")
    assert "left as it is" not in done(*arguments).stderr
    (home / "a.png").rename("a.png")
    done("i2i", "--replay", "old.png", "-o", "moved.png")
    assert np.array_equal(pixels("again.png"), pixels("moved.png"))


def test_a_model_in_a_folder_is_found_by_its_name_or_by_its_weights(home, monkeypatch):
    shutil.copytree(DEMO, "mine")
    make("-m", home / "mine", "--seed", "7", "-o", "first.png")
    done("t2i", "--replay", "first.png", "-o", "here.png")
    monkeypatch.chdir(home.parent)
    message = refusal("t2i", "--replay", "work/first.png", "-o", "again.png")
    assert message == "work/first.png was made with the model 'mine', which is not here; name it with -m"
    done("t2i", "--replay", "work/first.png", "-m", home / "mine", "-o", "named.png")
    (home.parent / "models").mkdir(exist_ok=True)
    (home / "mine").rename(home.parent / "models" / "another-name")
    done("t2i", "--replay", "work/first.png", "-o", "found.png")
    for name in (home / "here.png", "named.png", "found.png"):
        assert np.array_equal(pixels(home / "first.png"), pixels(name))
    assert read_settings(Path("found.png")) == read_settings(home / "first.png")


def test_info_shows_the_settings_of_an_image():
    done("i2i", "a red\nring", *EDIT, "-i", "a.png", "-i", "b.png", "--strength", "0.5", "-o", "out.png")
    settings = read_settings(Path("out.png"))
    assert done("info", "out.png").stdout.splitlines() == [
        "prompt: a red",
        "  ring",
        "model: demo",
        "quant: bf16",
        "text quant: bf16",
        f"dtype: {settings['dtype']}",
        "width: 96",
        "height: 80",
        "steps: 1",
        "guidance: 1.0",
        "seed: 3",
        "edit images: a.png, b.png",
        "edit strength: 0.5",
        "variant: demo",
        f"fingerprint: {settings['fingerprint']}",
        f"version: {settings['version']}",
        *(f"machine {name}: {value}" for name, value in device.machine().items()),
    ]
    assert json.loads(done("info", "out.png", "--json").stdout) == settings


@pytest.mark.parametrize("name", ["a.png", "missing.jpg"])
def test_info_of_an_image_without_settings(name):
    reasons = {
        "a.png": "a.png carries no settings of flux2-mlx: another program made it, or they were left out",
        "missing.jpg": "can't read missing.jpg: No such file or directory",
    }
    assert refusal("info", name) == reasons[name]


def test_info_of_an_image_takes_no_options_of_a_model():
    result = run("info", "a.png", "-q", "qint8")
    assert (result.exit_code, "--quant is about one model; give a MODEL" in result.stderr) == (2, True)
