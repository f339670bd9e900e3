"""Bringing an edited picture's colours back to those of the picture that it was made from."""

import numpy as np
from PIL import Image

# JPEG's luma and colour differences of sRGB: brightness and contrast are those of the first, and saturation is one gain
# of the other two about neutral grey. These are what models drift in; a cast is an offset of the other two.
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
_TO_RGB = np.linalg.inv(_TO_YCC)
_GREY = np.array([127.5, 0, 0], np.float32)
# A pixel is taken for unchanged if no channel differs by more than this many of 255 levels. The first is as far as
# models drift; each next one is what the correction that the last one led to may leave.
_LEVELS = (32, 16, 8, 8)
_LEAST_SHARE = 0.02  # of unchanged pixels; of fewer, nothing is known
# What stands against a gain: a variance in levels², so that noise and edges within flat colours are taken for none.
_AGAINST_GAIN = 13.0**2
# What stands against an offset, as a share: little, and less against brightness. It decides about a single flat colour,
# which a gain and an offset bring back alike: if it is a strong colour it is rather a gain, as casts are rare.
_AGAINST_OFFSET = np.array([0.002, 0.02, 0.02])
_MOST_GAIN = 1.5


def matched(image: Image.Image, source: Image.Image, kept: np.ndarray | None = None) -> Image.Image:
    """`image` with its colours brought back to those of `source`, an RGB picture of the same size.

    In YCbCr (JPEG's, of 0 to 255) the image gets one brightness, one contrast about mid-grey, one saturation and one
    cast, that bring the mean and the spread of the unchanged pixels to those of `source`: the least squares over them,
    with a slight preference for no change, which decides where they are all alike. Unchanged are the pixels where
    `kept` `[H, W]` is True. Where it is None they are found: those where no channel differs by more than 32 levels,
    then those that differ by no more than 16, then 8, with the colours so brought back. The changed ones get the same
    correction, but have no say in it, so an edit keeps its own colours. It follows that an edit that shifts all
    colours by a little, such as "slightly warmer", is taken back, too.

    Contrast and saturation change by a factor of 1.5 at most. The image stays as it is where fewer than 2 % of the
    pixels are unchanged, and where they would differ more afterwards.
    """
    wanted, given = _ycc(source), _ycc(image)
    result = given
    for levels in _LEVELS if kept is None else _LEVELS[:1]:
        unchanged = (np.abs(result - wanted) <= levels).all(axis=-1) if kept is None else kept
        if unchanged.mean() < _LEAST_SHARE:
            return image
        result = _corrected(given, *_fit(given[unchanged], wanted[unchanged]))
    if _distance(result, wanted, unchanged) >= _distance(given, wanted, unchanged):
        return image
    return Image.fromarray(np.clip(np.round((result + _GREY) @ _TO_RGB.T), 0, 255).astype(np.uint8))


def _ycc(image: Image.Image) -> np.ndarray:
    """Luma and colour differences about mid-grey, −127.5..127.5, float32 `[H, W, 3]`."""
    return np.asarray(image, dtype=np.float32) @ _TO_YCC.T - _GREY


def _fit(given: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset `[3]` that bring pixels `[N, 3]` nearest to others; the gain of the last two channels is one."""
    mean, aim = given.mean(axis=0, dtype=np.float64), wanted.mean(axis=0, dtype=np.float64)
    around, target = given - mean, wanted - aim
    squares, products = (around**2).mean(axis=0), (around * target).mean(axis=0)
    # With the best offsets the means differ by (aim − gain · mean) · left.
    left = _AGAINST_OFFSET / (1 + _AGAINST_OFFSET)
    bottom, top = squares + left * mean**2, products + left * mean * aim
    gains = []
    for channels in (slice(1), slice(1, 3)):
        gain = (top[channels].sum() + _AGAINST_GAIN) / (bottom[channels].sum() + _AGAINST_GAIN)
        gains += [np.clip(gain, 1 / _MOST_GAIN, _MOST_GAIN)] * len(top[channels])
    gain = np.array(gains)
    return gain, (aim - gain * mean) * (1 - left)


def _corrected(pixels: np.ndarray, gain: np.ndarray, offset: np.ndarray) -> np.ndarray:
    return (pixels * gain + offset).astype(np.float32)


def _distance(pixels: np.ndarray, others: np.ndarray, where: np.ndarray) -> float:
    return float(np.abs(pixels[where] - others[where]).mean())
