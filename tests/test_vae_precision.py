"""What Winograd's convolutions, which MLX has on Metal, would do to an image in 16 bits, and that the VAE avoids them.

The method is emulated: F(6, 3) with its intermediates rounded to 16 bits.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import mlx.core as mx
import numpy as np
import pytest
from helpers.cli_runner import DEMO
from PIL import Image

from flux2_mlx import Flux2Pipeline, metering
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.device import direct_convolutions
from flux2_mlx.vae import VAE, model

SETTING = "MLX_CONV_WINOGRAD"
# Transforms of tiles, kernels and outputs for the points 0, ±1, ±2, ±1/2 and infinity.
TILES = np.array(
    [
        [1, 0, -21 / 4, 0, 21 / 4, 0, -1, 0],
        [0, 1, 1, -17 / 4, -17 / 4, 1, 1, 0],
        [0, -1, 1, 17 / 4, -17 / 4, -1, 1, 0],
        [0, 1 / 2, 1 / 4, -5 / 2, -5 / 4, 2, 1, 0],
        [0, -1 / 2, 1 / 4, 5 / 2, -5 / 4, -2, 1, 0],
        [0, 2, 4, -5 / 2, -5, 1 / 2, 1, 0],
        [0, -2, 4, 5 / 2, -5, -1 / 2, 1, 0],
        [0, -1, 0, 21 / 4, 0, -21 / 4, 0, 1],
    ]
)
KERNELS = np.array(
    [
        [1, 0, 0],
        [-2 / 9, -2 / 9, -2 / 9],
        [-2 / 9, 2 / 9, -2 / 9],
        [1 / 90, 1 / 45, 2 / 45],
        [1 / 90, -1 / 45, 2 / 45],
        [32 / 45, 16 / 45, 8 / 45],
        [32 / 45, -16 / 45, 8 / 45],
        [0, 0, 1],
    ]
)
POINTS = np.array([0, 1, -1, 2, -2, 1 / 2, -1 / 2])
OUTPUTS = np.concatenate([POINTS ** np.arange(6)[:, None], np.eye(6)[:, 5:]], axis=1)

Rounding = Callable[[np.ndarray], np.ndarray]


def winograd(x: np.ndarray, kernels: np.ndarray, rounded: Rounding) -> np.ndarray:
    """The convolution of `x` `[B, H, W, C]` with `[O, 3, 3, C]` without padding; what is stored is `rounded`."""
    B, H, W, _ = x.shape
    rows, columns = -(-(H - 2) // 6), -(-(W - 2) // 6)
    x = np.pad(x, ((0, 0), (0, 6 * rows + 2 - H), (0, 6 * columns + 2 - W), (0, 0)))
    tiles = np.lib.stride_tricks.sliding_window_view(x, (8, 8), axis=(1, 2))[:, ::6, ::6]
    tiles = rounded(np.einsum("ij,bhwcjk,lk->ilbhwc", TILES, tiles, TILES, optimize=True))
    kernels = rounded(np.einsum("ij,ojkc,lk->ilco", KERNELS, kernels, KERNELS, optimize=True))
    products = rounded((tiles.reshape(8, 8, -1, tiles.shape[-1]) @ kernels).reshape(*tiles.shape[:-1], -1))
    y = np.einsum("ij,jkbhwo,lk->bhiwlo", OUTPUTS, products, OUTPUTS, optimize=True)
    return y.reshape(B, 6 * rows, 6 * columns, -1)[:, : H - 2, : W - 2]


def in_bfloat16(x: np.ndarray) -> np.ndarray:
    return np.array(mx.array(x.astype(np.float32)).astype(mx.bfloat16).astype(mx.float32))


def metal(x: mx.array, weight: mx.array, stride: object = 1, padding: object = 0) -> mx.array:
    """`mx.conv2d` as Metal has it, in any size."""
    narrow = x.dtype != mx.float32
    wide = [a.astype(mx.float32) for a in (x, weight)]
    if narrow and weight.shape[1] == 3 and stride in (1, (1, 1)) and os.environ.get(SETTING) != "0":
        top, left = padding if isinstance(padding, tuple) else (padding, padding)
        padded = np.pad(np.array(wide[0]), ((0, 0), (top, top), (left, left), (0, 0)))
        return mx.array(winograd(padded, np.array(wide[1]), in_bfloat16).astype(np.float32)).astype(x.dtype)
    return CONVOLVE(*wide, stride, padding).astype(x.dtype)


CONVOLVE = mx.conv2d


@pytest.fixture(scope="module")
def vae() -> VAE:
    return Checkpoint.open(DEMO).components["vae"].load(mx.float32)


@pytest.fixture(scope="module")
def picture() -> mx.array:
    pixels = np.asarray(Image.open(DEMO / "star.png").convert("RGB"), np.float32)
    return mx.array(pixels[None] / 127.5 - 1)


def decibels(x: mx.array, expected: mx.array) -> float:
    """Peak signal-to-noise ratio of images in −1..1."""
    error = np.mean((np.array(x.astype(mx.float32)) - np.array(expected.astype(mx.float32))) ** 2)
    return 10 * np.log10(4 / error)


def narrow(vae: VAE) -> VAE:
    copy = Checkpoint.open(DEMO).components["vae"].load(mx.bfloat16)
    assert copy is not vae
    return copy


def test_the_emulated_method_is_a_convolution():
    rng = np.random.default_rng(0)
    x, kernels = rng.normal(size=(2, 11, 9, 5)), rng.normal(size=(4, 3, 3, 5))
    expected = CONVOLVE(mx.array(x.astype(np.float32)), mx.array(kernels.astype(np.float32)))
    assert np.abs(winograd(x, kernels, lambda x: x) - np.array(expected)).max() < 1e-5


def test_one_convolution_loses_by_it_in_16_bits():
    rng = np.random.default_rng(0)
    x, kernels = (in_bfloat16(rng.normal(size=shape)) for shape in ((1, 20, 20, 64), (32, 3, 3, 64)))
    exact = winograd(x.astype(np.float64), kernels.astype(np.float64), lambda x: x)
    errors = [
        np.linalg.norm(y - exact) / np.linalg.norm(exact)
        for y in (in_bfloat16(exact), winograd(x, kernels, in_bfloat16))
    ]
    assert errors[0] < 2e-3
    assert errors[1] > 5 * errors[0]


@pytest.mark.parametrize("step", ["encode", "decode"])
def test_the_autoencoder_is_spared_it(step, vae, picture, monkeypatch):
    """In bfloat16 it is as exact as without Winograd, where it would be far off if the setting were not in force."""
    x = picture if step == "encode" else vae.encode(picture)
    exact, small = getattr(vae, step)(x), narrow(vae)
    x = x.astype(mx.bfloat16)
    plain = decibels(getattr(small, step)(x), exact)
    monkeypatch.setattr(mx, "conv2d", metal)
    spared = decibels(getattr(small, step)(x), exact)
    monkeypatch.setattr(model, "direct_convolutions", nullcontext)
    hit = decibels(getattr(small, step)(x), exact)
    assert abs(spared - plain) < 1
    assert hit < spared - 4


@pytest.mark.parametrize("before", [None, "1", "0"])
def test_the_setting_is_what_it_was_afterwards(before, monkeypatch):
    monkeypatch.delenv(SETTING, raising=False)
    if before is not None:
        monkeypatch.setenv(SETTING, before)
    inside = []

    def interrupted() -> None:
        with direct_convolutions():
            inside.append(os.environ[SETTING])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert inside == ["0"]
    assert os.environ.get(SETTING) == before


def is_free() -> bool:
    """Whether another thread could begin a run now."""
    free = []

    def try_it() -> None:
        if metering._TURN.acquire(blocking=False):
            metering._TURN.release()
            free.append(True)

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    return bool(free)


@pytest.mark.parametrize("work", ["preview", "decode", "call"])
def test_no_two_threads_change_the_setting_at_a_time(work, monkeypatch):
    """Neither would the other convolve with it, nor would it be what it was afterwards."""
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)
    request, alone = pipe.request(["a ring"], width=64, height=64, steps=1, seed=1), []

    @contextmanager
    def watched() -> Iterator[None]:
        alone.append(not is_free())
        yield

    monkeypatch.setattr(model, "direct_convolutions", watched)
    if work == "preview":
        pipe.preview(request, mx.zeros((1, 16, 32)))
    elif work == "decode":
        pipe.decode(mx.zeros((1, 8, 8, 8)))
    else:
        pipe.run(request)
    assert alone == [True]
    assert is_free()
