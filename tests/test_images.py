"""Image files: pixels, settings kept inside, complete or not at all."""

import errno
import json
import os
import random
import stat
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from flux2_mlx.errors import InputError
from flux2_mlx.images import (
    FORMATS,
    check_output,
    check_size,
    read_settings,
    save,
    to_pil,
)
from flux2_mlx.settings import describe

SETTINGS = {
    "prompt": "a red fox in snow",
    "model": "klein-4b",
    "quant": "qint8",
    "width": 32,
    "height": 24,
    "steps": 4,
    "guidance": 1.0,
    "seed": 42,
    "fingerprint": None,
    "version": "0.1.0",
}
SUFFIXES = list(FORMATS)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_every_image_of_a_batch_keeps_its_place():
    values = np.zeros((2, 16, 32, 3), dtype=np.float32)
    values[1, 3, 5] = [1, 0.5, 0]
    first, second = to_pil(values)
    assert first.size == second.size == (32, 16)
    assert first.getbbox() is None
    assert second.getpixel((5, 3)) == (255, 128, 0)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 2**64 - 1, "guidance": 0.1 + 0.2},
        {"prompt": "雪の中の赤い狐、рыжая лиса, ثعلب أحمر 🦊"},
        {"prompt": 'a "quoted" \\ prompt\r\n\tof two lines\0 with \x7f odd \ufeff ends\u2028'},
        {"prompt": "🦊" * 10_000},
        {"model": "/some folder/模型"},
        {"model": "/some folder/\udcff\\\udcfe", "edit": {"images": [{"path": "\udc80.png"}]}},
    ],
)
def test_settings_come_back_as_they_were(tmp_path, image, suffix, changes):
    path = tmp_path / f"a{suffix}"
    save(image, path, SETTINGS | changes)
    assert read_settings(path) == SETTINGS | changes


@pytest.mark.parametrize(
    ("suffix", "kind", "tolerance"),
    [(".png", "PNG", 0), (".jpg", "JPEG", 30), (".jpeg", "JPEG", 30), (".WebP", "WEBP", 40)],
)
def test_the_format_is_that_of_the_name(tmp_path, suffix, kind, tolerance):
    ramp = np.linspace(0, 255, 24 * 32 * 3).reshape(24, 32, 3).astype(np.uint8)
    path = tmp_path / f"a{suffix}"
    save(Image.fromarray(ramp), path, SETTINGS)
    with Image.open(path) as saved:
        assert (saved.format, saved.size) == (kind, (32, 24))
        assert np.abs(np.asarray(saved).astype(int) - ramp).max() <= tolerance


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_settings_a_file_carries_none(tmp_path, image, suffix):
    path = tmp_path / f"a{suffix}"
    save(image, path)
    with pytest.raises(InputError, match=r"a\.\w+ carries no settings of flux2-mlx: another program"):
        read_settings(path)


def test_a_new_file_has_the_rights_of_any_new_file(tmp_path, image):
    save(image, tmp_path / "a.png")
    (tmp_path / "b").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.png", "b")]
    assert modes[0] == modes[1]


def test_other_tools_find_the_settings_of_lossy_files(tmp_path, image):
    for name in ("a.jpg", "a.webp"):
        save(image, tmp_path / name, SETTINGS | {"prompt": "a fox 狐"})
        with Image.open(tmp_path / name) as saved:
            exif = saved.getexif()
        assert exif[ExifTags.Base.ImageDescription] == describe(SETTINGS | {"prompt": "a fox ?"})
        assert exif[ExifTags.Base.Software] == "flux2-mlx 0.1.0"


def test_describe():
    assert describe(SETTINGS) == (
        "a red fox in snow\nSteps: 4, Sampler: Euler, CFG scale: 1.0, Seed: 42, Size: 32x24, Model: klein-4b, "
        "Version: flux2-mlx 0.1.0"
    )


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize(
    ("error", "raised", "match"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            InputError,
            r"can't write .*a\.png: No space left on device$",
        ),
        (OSError("encoder error -2"), InputError, r"can't write .*a\.png: encoder error -2$"),
        (ValueError("encoding error 5"), InputError, r"can't write .*a\.png: encoding error 5$"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_failure_midway_leaves_what_was_there(tmp_path, image, monkeypatch, old, error, raised, match):
    def fail(image, file, **options):
        file.write(b"half of it")
        raise error

    if old is not None:
        (tmp_path / "a.png").write_bytes(old)
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(raised, match=match):
        save(image, tmp_path / "a.png", SETTINGS, replace=True)
    assert names(tmp_path) == ([] if old is None else ["a.png"])
    assert old is None or (tmp_path / "a.png").read_bytes() == old


def test_a_failure_to_put_the_file_in_place_leaves_what_was_there(tmp_path, image, monkeypatch):
    def fail(*paths):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match=r"a\.png: Operation not permitted$"):
        save(image, tmp_path / "a.png", replace=True)
    assert names(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"


def test_a_folder_that_is_gone(tmp_path, image):
    with pytest.raises(InputError, match=r"can't write .*a\.png: No such file or directory$"):
        save(image, tmp_path / "missing" / "a.png")


def test_settings_that_a_jpeg_does_not_hold_are_left_out(tmp_path, image, caplog):
    (tmp_path / "a.jpg").write_bytes(b"old")
    save(image, tmp_path / "a.jpg", SETTINGS | {"prompt": "🦊" * 20_000}, replace=True)
    assert caplog.messages == [
        f"{tmp_path / 'a.jpg'} does not carry its settings, which are too long for JPEG; choose .png to keep them"
    ]
    with pytest.raises(InputError, match="carries no settings of flux2-mlx"):
        read_settings(tmp_path / "a.jpg")
    save(image, tmp_path / "b.jpg")
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()


def test_a_name_of_the_largest_length_can_be_saved(tmp_path, image):
    path = tmp_path / ("a" * 251 + ".png")
    save(image, path, SETTINGS)
    assert read_settings(path) == SETTINGS


def test_outputs_that_can_be_written(tmp_path):
    (tmp_path / "old.png").touch()
    for name in ("a.png", "a.jpg", "a.jpeg", "a.webp", "A.PNG", "a.b.WebP", "狐.png", "new/newer/a.png"):
        check_output(tmp_path / name)
    check_output(tmp_path / "old.png", replace=True)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("a", r"a: the name must end in \.png, \.jpg, \.jpeg, \.webp, or in / to be a folder$"),
        ("a.gif", r"a\.gif: the name must end in "),
        (".png", r"\.png: the name must end in "),
        ("folder.png", r"folder\.png: it is a folder$"),
        ("old.png", r"old\.png exists; choose another name or pass replace=True to replace it$"),
        ("old.png/a.png", r"a\.png: .*old\.png is not a folder$"),
        ("old.png/new/a.png", r"a\.png: .*old\.png is not a folder$"),
    ],
)
def test_outputs_that_can_not_be_written(tmp_path, name, match):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "old.png").touch()
    with pytest.raises(InputError, match=match):
        check_output(tmp_path / name)
    if name != "old.png":
        with pytest.raises(InputError, match=match):
            check_output(tmp_path / name, replace=True)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(InputError, match=r"a\.png: no permission to write in "):
        check_output(tmp_path / "a.png")


@pytest.mark.parametrize(("name", "limit"), [("a.webp", 16383), ("a.jpg", 65500), ("a.jpeg", 65500)])
def test_the_largest_side_of_a_format(tmp_path, name, limit):
    check_size(tmp_path / name, limit, 16)
    save(Image.new("RGB", (limit, 1)), tmp_path / name)
    for width, height in ((limit + 1, 16), (16, limit + 1)):
        with pytest.raises(InputError, match=rf"has at most {limit} pixels a side; choose \.png$"):
            check_size(tmp_path / name, width, height)
        check_size(tmp_path / "a.png", width, height)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_damaged_files_raise_nothing_else(tmp_path, image, suffix):
    path, damaged = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    save(image, path, SETTINGS)
    data, dice = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        part = bytearray(data[: dice.randrange(len(data))] if dice.random() < 0.3 else data)
        for _ in range(dice.choice([0, 1, 1, 2, 20]) if part else 0):
            part[dice.randrange(len(part))] = dice.randrange(256)
        damaged.write_bytes(part)
        try:
            assert isinstance(read_settings(damaged), dict)
        except InputError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", r"can't read .*a\.png: it is not an image$"),
        (b"a red fox", r"can't read .*a\.png: it is not an image$"),
        (None, r"can't read .*a\.png: No such file or directory$"),
    ],
)
def test_no_image(tmp_path, data, match):
    if data is not None:
        (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=match):
        read_settings(tmp_path / "a.png")


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(InputError, match=r": Is a directory$"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        ("", "carries no settings"),
        ("[1]", "carries no settings"),
        ("null", "carries no settings"),
        ("{", "can't read"),
        ("[" * 100_000, "can't read"),
    ],
)
def test_settings_that_are_not_ours(tmp_path, image, payload, match):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("flux2-mlx", payload)
    image.save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InputError, match=match):
        read_settings(tmp_path / "a.png")


@pytest.mark.parametrize("comment", [None, b"", b"ASCII\0\0\0hello", b"hello", b"UNICODE\0", "text", 5])
def test_comments_of_other_tools(tmp_path, image, comment):
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "another tool"
    if comment is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    image.save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(InputError, match="carries no settings of flux2-mlx"):
        read_settings(tmp_path / "a.jpg")


def test_damaged_metadata_is_skipped_without_a_warning(tmp_path, image):
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "another tool, of a longer name than fits"
    image.save(tmp_path / "a.jpg", exif=exif.tobytes()[:-10])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(InputError, match="carries no settings of flux2-mlx"):
            read_settings(tmp_path / "a.jpg")
    assert caught == []


def test_settings_with_a_comment_that_is_cut(tmp_path, image):
    exif = Image.Exif()
    payload = json.dumps(SETTINGS).encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + payload[:-3]
    image.save(tmp_path / "a.webp", exif=exif)
    with pytest.raises(InputError, match=r"can't read .*a\.webp: "):
        read_settings(tmp_path / "a.webp")
