"""Pictures that a run starts from, as the library takes them: any mode, transparency, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_mlx.errors import InputError
from flux2_mlx.references import Edit


def picture(mode: str = "RGB", size: tuple[int, int] = (96, 80)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert("L" if mode == "I;16" else mode).convert(mode)


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
