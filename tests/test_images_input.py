"""Pictures that are read: which are taken, their colours and their transparency."""

import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from flux2_mlx.errors import InputError
from flux2_mlx.images import flattened, open_image


def test_the_first_picture_of_a_camera_is_taken(tmp_path, image):
    image.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    image.save(tmp_path / "b.jpg")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.jpg")), np.asarray(open_image(tmp_path / "b.jpg")))


def test_a_document_of_several_pages_is_refused(tmp_path, image):
    image.save(tmp_path / "a.tif", save_all=True, append_images=[image])
    with pytest.raises(InputError, match=r"a\.tif has several pages; save one of them as an image$"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", [".heic", ".HEIF"])
def test_pictures_of_phones(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(InputError, match=rf"can't read .*a{suffix}: export it as JPEG or PNG$"):
        open_image(tmp_path / f"a{suffix}")


def test_whatever_a_damaged_file_makes_pillow_raise_is_one_error(tmp_path, image):
    image.save(tmp_path / "a.bmp")
    data = bytearray((tmp_path / "a.bmp").read_bytes())
    data[30] = 99  # no kind of compression
    (tmp_path / "a.bmp").write_bytes(data)
    with pytest.raises(InputError, match=r"can't read .*a\.bmp: Unsupported BMP compression \(99\)$"):
        open_image(tmp_path / "a.bmp")


def test_a_picture_within_our_limit_is_not_warned_of(tmp_path, image, monkeypatch):
    image.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 32 - 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert open_image(tmp_path / "a.png").size == (32, 24)
    assert caught == []


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Red light and green light changed places.
SWAPPED = SRGB.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")


def grey_profile():
    """A profile of grey levels that are proportional to light."""
    line = b"curv" + bytes(8)
    table = SRGB.index(b"rTRC")
    grey = SRGB[:table] + struct.pack(">4sII", b"kTRC", len(SRGB), len(line)) + SRGB[table + 12 :] + line
    return struct.pack(">I", len(grey)) + grey[4:16] + b"GRAY" + grey[20:]


@pytest.mark.parametrize(
    ("mode", "color", "profile", "expected"),
    [
        ("RGB", (255, 0, 0), SWAPPED, (0, 255, 0)),
        ("RGBA", (255, 0, 0, 255), SWAPPED, (0, 255, 0)),
        ("L", 100, SWAPPED, (100, 100, 100)),
        ("L", 128, grey_profile(), (188, 188, 188)),
        ("LA", (128, 255), grey_profile(), (188, 188, 188)),
        ("I;16", 128 * 257, grey_profile(), (188, 188, 188)),
    ],
)
def test_colours_are_converted_from_the_profile(tmp_path, mode, color, profile, expected):
    Image.new(mode, (8, 8), color).save(tmp_path / "a.png", icc_profile=profile)
    opened = open_image(tmp_path / "a.png")
    assert opened.getpixel((4, 4)) == pytest.approx(expected, abs=2)
    assert (opened.mode, opened.info) == ("RGB", {})


@pytest.mark.parametrize(
    ("mode", "profile"),
    [("RGB", SRGB), ("RGB", b"damaged"), ("RGB", SRGB[:300]), ("RGB", grey_profile()), ("CMYK", SWAPPED)],
)
def test_profiles_of_srgb_and_those_of_no_use_change_nothing(tmp_path, image, mode, profile):
    image.convert(mode).save(tmp_path / "a.tif", icc_profile=profile)
    opened = open_image(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(opened), np.asarray(image.convert(mode).convert("RGB")))
    assert opened.info == {}


@pytest.mark.parametrize(("ground", "expected"), [("white", 255), ("black", 0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_a_ground(mode, ground, expected):
    clear = Image.new("RGBA", (4, 4), (90, 90, 90, 0)).convert(mode)
    assert flattened(clear, ground).getpixel((0, 0)) == (expected,) * 3


@pytest.fixture(params=["in memory", "in a file"])
def read(request, tmp_path):
    """An image as RGB: one given as it is, or one opened from a TIFF."""

    def opened(image):
        if request.param == "in memory":
            return flattened(image)
        image.save(tmp_path / "a.tif")
        return open_image(tmp_path / "a.tif")

    return opened


def test_floating_point_numbers_are_light_from_0_to_1(read):
    levels = np.arange(256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(np.asarray(read(Image.fromarray(levels / 255)))[..., 1], levels)


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ([0, 1.5], r"the image has numbers from 0 to 1\.5, not 0 to 1; save it in 8 or 16 bits$"),
        ([0, 255], "numbers from 0 to 255, not 0 to 1"),
        ([-0.5, 0.5], r"numbers from -0\.5 to 0\.5, not 0 to 1"),
        ([0, np.nan], "numbers from nan to nan, not 0 to 1"),
        ([0, np.inf], "numbers from 0 to inf, not 0 to 1"),
    ],
)
def test_floating_point_numbers_of_another_range_are_refused(read, numbers, match):
    with pytest.raises(InputError, match=match):
        read(Image.fromarray(np.array([numbers], dtype=np.float32)))


def test_integers_are_of_16_bits(read):
    levels = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert np.array_equal(np.asarray(read(Image.fromarray(levels * 257)))[..., 1], levels)
    assert read(Image.fromarray(levels * 0)).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("numbers", [[0, 65536], [-1, 60_000]])
def test_integers_of_another_range_are_refused(read, numbers):
    match = f"numbers from {numbers[0]} to {numbers[1]}, not 0 to 65535; save it in 8 or 16 bits$"
    with pytest.raises(InputError, match=match):
        read(Image.fromarray(np.array([numbers], dtype=np.int32)))


@pytest.mark.parametrize("kind", [np.int32, np.uint16])
@pytest.mark.parametrize("most", [1, 255, 256])
def test_integers_that_16_bits_would_make_black_are_refused(read, kind, most):
    match = f"the image has numbers up to {most}, which of 16 bits are all black; save it in 8 bits$"
    with pytest.raises(InputError, match=match):
        read(Image.fromarray(np.array([[0, most]], dtype=kind)))
    assert read(Image.fromarray(np.array([[0, 257]], dtype=kind))).getextrema() == ((0, 1),) * 3


def in_mode(mode):
    """A picture of one colour, or of its grey, in this mode."""
    color = Image.new("RGB", (8, 8), (200, 100, 50))
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        return ImageCms.profileToProfile(color, *profiles, outputMode="LAB")
    if mode.startswith("I;"):
        return Image.new(mode, (8, 8), 124 * 257)
    steps = {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "PA": ("RGBA", "PA")}
    for step in steps.get(mode, (mode,)):
        color = color.convert(step)
    return color


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"])
def test_colours_of_every_mode(mode):
    assert flattened(in_mode(mode)).getpixel((4, 4)) == pytest.approx((200, 100, 50), abs=4)


@pytest.mark.parametrize("mode", ["L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N"])
def test_grey_of_every_mode(mode):
    assert flattened(in_mode(mode)).getpixel((4, 4)) == (124, 124, 124)


@pytest.mark.parametrize(("color", "expected"), [(0, 0), (1, 255)])
def test_black_and_white(color, expected):
    assert flattened(Image.new("1", (8, 8), color)).getpixel((4, 4)) == (expected,) * 3


@pytest.mark.parametrize(
    ("mode", "clear", "other", "expected"),
    [
        ("1", 0, 1, 255),
        ("L", 70, 71, 71),
        ("I;16", 70 * 257, 71 * 257, 71),
        ("P", 0, 7, 0),
        ("RGB", (7, 70, 7), (71, 71, 71), 71),
    ],
)
@pytest.mark.parametrize("ground", ["white", "black"])
def test_a_colour_that_is_transparent(tmp_path, mode, clear, other, expected, ground):
    picture = Image.new(mode, (8, 8), clear)
    picture.paste(other, (4, 0, 8, 8))
    picture.save(tmp_path / "a.png", transparency=clear)
    opened = open_image(tmp_path / "a.png", ground)
    assert opened.getpixel((0, 0)) == ((255, 255, 255) if ground == "white" else (0, 0, 0))
    assert opened.getpixel((7, 0)) == (expected,) * 3


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_picture_that_is_damaged_further_on(tmp_path, image, suffix):
    image.save(tmp_path / f"a{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(data[: len(data) * 3 // 4])
    with Image.open(tmp_path / f"a{suffix}") as opened, pytest.raises(InputError, match=r"^can't read the image: "):
        flattened(opened)
    with pytest.raises(InputError, match="can't read"):
        open_image(tmp_path / f"a{suffix}")


def test_what_is_flat_already_is_not_copied(image):
    assert flattened(image) is image


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"safetensors is too large: 1,099,511,627,776 bytes, of which at"):
        open_image(tmp_path / "model.safetensors")
