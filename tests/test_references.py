"""Pictures that a run starts from, as the library takes them: any mode, transparency, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_mlx.errors import InputError
from flux2_mlx.inputs import Pictures
from flux2_mlx.references import Edit, extended


def picture(mode: str = "RGB", size: tuple[int, int] = (96, 80)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    if mode.startswith("I"):
        return Image.fromarray(pixels[..., 0].astype(np.int32 if mode == "I" else np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


def half_mask(mode: str, kept: object, painted: object) -> Image.Image:
    mask = Image.new(mode, (96, 80), kept)
    mask.paste(painted, (48, 0, 96, 80))
    return mask


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16", "YCbCr", "HSV"])
def test_pictures_of_any_mode(mode):
    edit = Edit.checked([picture(mode), picture(mode)], 16, on_canvas=True)
    assert [image.mode for image in edit.references] == ["RGB", "RGB"]
    assert edit.canvas.original.mode == "RGB"


@pytest.mark.parametrize("thing", [None, "a.png", Path("a.png"), np.zeros((80, 96, 3), dtype=np.uint8)])
def test_what_is_no_picture_is_refused(thing):
    message = f"images must be PIL images, got {type(thing).__name__}; open files with PIL.Image.open"
    with pytest.raises(InputError, match=f"^{message}$"):
        Edit.checked([picture(), thing], 16)
    if thing is not None:
        with pytest.raises(InputError, match=f"^{message}$"):
            Edit.checked([picture()], 16, mask=thing)


@pytest.mark.parametrize(
    ("mode", "kept", "painted"),
    [
        ("L", 0, 255),
        ("1", 0, 1),
        ("RGB", "black", "white"),
        ("RGBA", (0, 0, 0, 0), "white"),
        ("RGBA", (255, 255, 255, 0), "white"),
        ("LA", (255, 0), (255, 255)),
    ],
)
def test_masks_of_any_mode(mode, kept, painted):
    mask = Edit.checked([picture()], 16, mask=half_mask(mode, kept, painted)).canvas.mask
    assert np.array_equal(np.asarray(mask), np.asarray(half_mask("L", 0, 255)))


@pytest.mark.parametrize(("sides", "overlap", "columns"), [((16, 16), 47, 2), ((16, 0), 95, 1), ((0, 16), 0, 96)])
def test_an_overlap_leaves_something_of_the_picture(sides, overlap, columns):
    kept = np.asarray(extended(picture(), *sides, 0, 0, overlap)[1])[0] == 0
    assert kept.sum() == columns
    assert kept[sides[0] : sides[0] + 96].sum() == columns


def test_a_negative_overlap_is_refused():
    with pytest.raises(InputError, match=r"^overlap must be 0 or more pixels, got -1$"):
        extended(picture(), 16, 0, 0, 0, -1)


def test_a_negative_padding_is_refused():
    with pytest.raises(InputError, match=r"^mask_crop must be 0 or more pixels around the mask, got -5$"):
        Edit.checked([picture()], 16, mask=half_mask("L", 0, 255), mask_crop=-5)


def test_a_crop_that_is_no_number_is_named_as_it_was_given():
    with pytest.raises(InputError, match=r"^mask_crop must be a whole number of pixels, got 'x'$"):
        Edit.checked([picture()], 16, mask=half_mask("L", 0, 255), mask_crop="x")
    pictures = Pictures.opened(picture(), half_mask("L", 0, 255))
    with pytest.raises(InputError, match=r"^padding_mask_crop must be a whole number of pixels, got 'x'$"):
        pictures.edit(16, None, "x", False, "pil")


@pytest.mark.parametrize(
    ("size", "crop", "least"),
    [((96, 80), None, 16), ((100, 84), None, 17), ((2048, 1024), None, 23), ((2048, 1024), 900, 21)],
)
def test_a_mask_that_marks_too_little_is_told_the_least_in_its_own_pixels(size, crop, least):
    mask = Image.new("L", size)
    mask.putpixel((32, 32), 255)
    message = f"^the mask marks too little: make the white parts at least {least} pixels wide$"
    with pytest.raises(InputError, match=message):
        Edit.checked([picture(size=size)], 16, mask=mask, mask_crop=crop)


@pytest.mark.parametrize("width", [17, 20, 33])
def test_a_white_part_of_that_width_is_enough(width):
    """Wherever it lies."""
    for left in range(32, 64):
        mask = Image.new("L", (width * 8, 128))
        mask.paste(255, (left, left, left + width, left + width))
        assert Edit.checked([picture(size=mask.size)], 16, mask=mask).canvas.tokens.any()


@pytest.mark.parametrize(("mask", "size"), [(None, (96, 80)), (half_mask("L", 0, 255).resize((100, 84)), (100, 84))])
def test_size_of_the_output(mask, size):
    edit = Edit.checked([picture(size=(100, 84))], 16, mask=mask, on_canvas=True)
    assert edit.working_size(None, None) == edit.working_size(96, None) == (96, 80)
    assert edit.output_size(96, 80) == size
    with pytest.raises(InputError, match="an image that is painted over keeps its size"):
        edit.working_size(None, 96)
    assert Edit().output_size(64, 48) == Edit().working_size(64, 48) == (64, 48)
    assert Edit.checked([picture(size=(100, 84))], 16).working_size(None, 48) == (96, 48)


def test_what_is_painted_over_in_whole_is_cut_and_not_stretched():
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(127, 79, 3), dtype=np.uint8))
    edit = Edit.checked([image], 16, on_canvas=True)
    assert edit.canvas.picture == edit.references[0] == image.crop((7, 7, 71, 119))
