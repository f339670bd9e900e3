"""Inputs of strangers: what is no file, pictures that hold something else, and hostile settings inside them."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import pytest
from helpers.cli_runner import DEMO, PROMPT, SMALL, done, refusal, run
from helpers.remembered import save_remembering
from PIL import Image, PngImagePlugin

from flux2_mlx.config import VARIANTS
from flux2_mlx.errors import InputError
from flux2_mlx.images import open_image, read_settings

BASE = {
    "prompt": PROMPT,
    "upsampled_prompt": None,
    "model": "demo",
    "quant": "bf16",
    "text_quant": "bf16",
    "dtype": "float32",
    "width": 64,
    "height": 64,
    "steps": 1,
    "guidance": 1.0,
    "seed": 7,
    "variant": "demo",
    "fingerprint": None,
    "version": "0.1.0",
}
PICTURE = {"path": "b.png", "sha256": "0" * 64}
EDIT = {"images": [PICTURE], "strength": None, "mask": None, "mask_crop": None, "extend": None}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("FLUX2_MLX_HOME", str(tmp_path / "models"))
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: pytest.fail("asked for a download"))
    return tmp_path / "work"


def remember(path="a.png", **changes):
    """A picture with these settings."""
    save_remembering(path, BASE | changes)


@pytest.fixture(params=["a named pipe", "a device"])
def special(request, folder):
    """What it is called, and the name of what is no file."""
    if request.param == "a named pipe":
        os.mkfifo("x.png")
    else:
        (folder / "x.png").symlink_to("/dev/zero")
    return request.param


@pytest.mark.parametrize(
    "arguments",
    [
        ("t2i", "--replay", "x.png"),
        ("t2i", PROMPT, *SMALL, "--interpret", "x.png"),
        ("i2i", PROMPT, *SMALL, "-i", "x.png"),
        ("i2i", PROMPT, *SMALL, "-i", "a.png", "--mask", "x.png"),
        ("outpaint", "x.png", "--left", "64", "-m", "demo"),
        ("describe", "x.png"),
        ("upsample", PROMPT, "-i", "x.png"),
    ],
)
def test_a_picture_that_is_no_file(special, folder, arguments):
    remember()
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (1, f"Error: can't read x.png: it is {special}; give a file\n")


def test_prompts_from_a_pipe_that_nobody_writes_to():
    os.mkfifo("prompts")
    result = run("t2i", *SMALL, "--prompts-file", "prompts")
    assert (result.exit_code, result.stderr) == (1, "Error: prompts holds no prompt; write one a line\n")


def test_prompts_from_a_device():
    message = refusal("t2i", *SMALL, "--prompts-file", "/dev/zero")
    assert message == "can't read /dev/zero: it is a device; give a file"


@pytest.fixture
def pipe():
    """A pipe with a prompt in it, as a shell gives it for <(…): its name, and who can write more."""
    reading, writing = os.pipe()
    os.write(writing, b"a red circle\n")
    yield f"/dev/fd/{reading}", writing
    os.close(reading)


def test_prompts_from_a_pipe(pipe):
    name, writing = pipe
    os.close(writing)
    assert done("t2i", *SMALL, "--seed", "7", "--prompts-file", name).stdout == "demo-7-a-red-circle.png\n"


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "endless"])
def test_prompts_without_an_end(folder, name):
    """Of 10 MB no more is read, whatever it is read from."""
    if name == "endless":
        (folder / name).write_bytes(b"red\n" * 2_500_001)
    script = "import sys; from flux2_mlx.cli.main import main; main()"
    command = [sys.executable, "-c", script, "t2i", *SMALL, "--prompts-file", name]
    with subprocess.Popen(["yes", "red"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as endless:
        result = subprocess.run(command, stdin=endless.stdout, capture_output=True, text=True, timeout=60, check=False)
        endless.stdout.close()
        endless.kill()
    expected = "10,000,004 bytes, of which at most 10,000,000 are read" if name == "endless" else "it has more than"
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: {name} is too large: {expected}")


def test_absurd_numbers_of_images_take_no_time():
    for count in (10**9, 10**30):
        message = refusal("t2i", PROMPT, *SMALL, "-n", count)
        assert message == f"the number of images must be 1 to 100,000, got {count:,}"


@pytest.fixture
def ghostscript(folder, monkeypatch):
    """A stand-in for Ghostscript that leaves a file when it is started."""
    (folder / "bin").mkdir()
    (folder / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {folder}/started\n")
    (folder / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    return folder / "started"


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_postscript_is_no_picture(folder, ghostscript, name):
    (folder / name).write_bytes(POSTSCRIPT)
    for read in (open_image, read_settings):
        with pytest.raises(InputError, match=rf"can't read .*{name}: it is not an image$"):
            read(folder / name)
    for arguments in (("i2i", PROMPT, "-i", name), ("i2i", PROMPT, "-i", "b.png", "--mask", name), ("describe", name)):
        remember("b.png")
        assert run(*arguments).stderr == f"Error: can't read {name}: it is not an image\n"
    assert not ghostscript.exists()


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "DDS", "SGI", "JPEG2000", "PDF"])
def test_formats_that_are_not_meant(folder, kind):
    Image.new("RGB", (64, 64)).save("a.png", format=kind)
    with pytest.raises(InputError, match=r"it is not an image$"):
        open_image(folder / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "MPO"])
def test_formats_that_are_meant(folder, kind):
    Image.new("RGB", (64, 64), "white").save("a", format=kind)
    assert open_image(folder / "a").getpixel((9, 9)) == (255, 255, 255)


def test_a_bomb_is_refused_before_it_is_unpacked(folder):
    """10 kB that are a picture of 120 million pixels, with settings."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("flux2-mlx", json.dumps(BASE))
    Image.new("1", (12_000, 10_000)).save("a.png", pnginfo=info)
    tracemalloc.start()
    for read in (open_image, read_settings):
        with pytest.raises(InputError, match=r"a\.png is too large: 12000×10000; scale it down first$"):
            read(folder / "a.png")
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_settings_of_absurd_length(folder):
    remember(prompt="a" * 1_000_001)
    with pytest.raises(InputError, match=r"its settings have 1,000,\d+ characters, of which at most 1,000,000 are"):
        read_settings(folder / "a.png")


UNKNOWN_MODEL = "did you mean klein-4b, klein-9b or klein-9b-kv?"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant": "qint2"}, "unknown quantization 'qint2'; choose one of bf16, qint8, qint6, mixed4, qint4"),
        ({"text_quant": "qint2"}, "unknown quantization 'qint2'; choose one of bf16, qint8, qint6, mixed4, qint4"),
        ({"model": "klein-4b", "variant": "klein-4b", "text_quant": "x"}, "unknown quantization 'x'; choose one of"),
        ({"model": "klein-4b", "variant": None}, "the settings in a.png are damaged: variant is None"),
        ({"variant": "klein-5b"}, f"unknown model 'klein-5b'; {UNKNOWN_MODEL}"),
        ({"variant": "klein-4b"}, "demo holds demo, not klein-4b"),
        ({"model": "klein-4b", "variant": "dev"}, "klein-4b is not dev; leave the variant out, or choose another"),
        ({"dtype": "half"}, "unknown dtype 'half'; choose one of float32, bfloat16, float16"),
        ({"steps": 10**9}, "steps must be 1 to 1000, got 1000000000"),
        ({"steps": True}, "the settings in a.png are damaged: steps is True"),
        ({"width": 10**40}, "size 1"),
        ({"seed": False}, "the settings in a.png are damaged: seed is False"),
        ({"guidance": float("-inf")}, "the settings in a.png are damaged: guidance is -inf"),
        (
            {"edit": EDIT},
            "b.png, which a.png was made from, is neither beside it nor here, or has changed; give the im",
        ),
        ({"edit": EDIT | {"images": [PICTURE] * 101}}, "the settings in a.png are damaged: it was made from 101"),
        ({"edit": EDIT | {"images": []}}, "the settings in a.png are damaged: images is []"),
        ({"edit": EDIT | {"strength": True}}, "the settings in a.png are damaged: strength is True"),
        ({"edit": EDIT | {"images": [PICTURE | {"path": "b\0.png"}]}}, "b"),
        ({"edit": EDIT | {"images": [PICTURE | {"path": "/dev/zero"}]}}, "zero, which a.png was made from, is neither"),
        ({"edit": EDIT | {"images": [PICTURE | {"path": "pipe"}]}}, "pipe, which a.png was made from, is neither"),
        ({"edit": EDIT | {"images": [PICTURE | {"path": "huge"}]}}, "huge, which a.png was made from, is neither"),
        ({"edit": EDIT | {"images": [PICTURE | {"path": "."}]}}, "., which a.png was made from, is neither"),
    ],
)
def test_hostile_settings(folder, changes, message):
    os.mkfifo("pipe")
    with (folder / "huge").open("wb") as file:
        file.truncate(2**40)
    remember(**changes)
    result = run("t2i" if "edit" not in changes else "i2i", "--replay", "a.png")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize("model", ["org/model", "source"])
def test_a_stranger_s_picture_has_nothing_fetched_or_converted(folder, monkeypatch, model):
    (folder / "source").mkdir()
    quants = lambda *_: ("bf16", "qint8")  # noqa: E731
    opened = SimpleNamespace(variant=VARIANTS["klein-4b"], fingerprint="0" * 64, quants=quants)
    monkeypatch.setattr("flux2_mlx.convert.Source.open", lambda *_, **__: opened)
    monkeypatch.setattr("flux2_mlx.store.acquisition.write_checkpoint", lambda *_, **__: pytest.fail("converted"))
    remember(model=model, variant="klein-4b")
    message = refusal("t2i", "--replay", "a.png")
    assert message == f"{model} is not converted yet; name it with -m to have it fetched and converted"


def test_a_model_that_a_picture_names_may_be_one_that_is_here(folder):
    shutil.copytree(DEMO, folder / "mine")
    shutil.copytree(DEMO, folder.parent / "models" / "org--model-bf16-text-bf16")
    for model in ("mine", "org/model"):
        remember(model=model)
        assert done("t2i", "--replay", "a.png", "-o", "b.png", "--force").stdout == "b.png\n"


@pytest.mark.parametrize(("pictured", "given"), [("klein-4b", []), ("org/model", ["-m", "org/other"])])
def test_a_model_of_the_table_or_one_that_is_named_is_fetched(monkeypatch, pictured, given):
    def fetched(repo, **_):
        raise InputError(f"fetched {repo}")

    monkeypatch.setattr("flux2_mlx.hub.fetch", fetched)
    remember(model=pictured, variant="klein-4b")
    expected = given[1] if given else VARIANTS[pictured].repo
    assert refusal("t2i", "--replay", "a.png", *given) == f"fetched {expected}"
