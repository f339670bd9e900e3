"""The autoencoder in row strips: results of the whole image, with bounded memory."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.mlx_state import randomized
from mlx.utils import tree_map
from PIL import Image

from flux2_mlx import Flux2Pipeline
from flux2_mlx.config import VARIANTS, VAEConfig
from flux2_mlx.memory import Plan, Workload
from flux2_mlx.networks import Networks
from flux2_mlx.vae import STRIP_BYTES, VAE, VAECost, model
from flux2_mlx.vae.layers import Conv2d, GroupNorm
from flux2_mlx.vae.strips import Doubled, Meter, Runner, Stored, strip_height

FULL = VAEConfig()
TINY = VAEConfig((8, 16, 24), None, 1, 4, 4)
TINY_SMALL_DECODER = VAEConfig((8, 16, 24), (4, 8, 12), 2, 4, 4)
# Wide enough that one row of attention scores is small beside the last level.
SMALL = VAEConfig((16, 32, 32), None, 1, 4, 4)
MIB = 1024 * 1024
WHOLE, ROW = 1 << 50, 1  # strip budgets: the whole image, and less than one row takes


def network(config: VAEConfig, dtype: mx.Dtype = mx.float32) -> VAE:
    """Random weights; default biases and scales would hide mistakes."""
    vae = randomized(VAE(config))
    vae.update(tree_map(lambda x: x + mx.random.normal(x.shape, scale=0.2) if x.ndim == 1 else x, vae.parameters()))
    vae.set_dtype(dtype)
    mx.eval(vae.parameters())
    return vae


def latents(config: VAEConfig, batch: int, height: int, width: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((batch, height, width, config.latent_channels), key=mx.random.key(1)).astype(dtype)


def image(batch: int, height: int, width: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.uniform(-1, 1, (batch, height, width, 3), key=mx.random.key(2)).astype(dtype)


def relative_error(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()


def peak_memory(function, *args) -> int:
    """Bytes that a call has at once above its arguments and all else that was there before."""
    mx.eval(args)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function(*args))
    mx.synchronize()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("config", [TINY, TINY_SMALL_DECODER], ids=["equal", "small decoder"])
@pytest.mark.parametrize("strip_bytes", [ROW, 6_000, 20_000, 60_000, 200_000])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 2, 3), (2, 6, 5), (1, 9, 4), (1, 13, 2)])
def test_strips_equal_the_whole_image(config, strip_bytes, batch, height, width):
    vae = network(config)
    z = latents(config, batch, height, width)
    assert relative_error(vae.decode(z, strip_bytes), vae.decode(z, WHOLE)) <= 1e-5
    x = image(batch, 4 * height + 1, 4 * width + 3)
    assert relative_error(vae.encode(x, strip_bytes), vae.encode(x, WHOLE)) <= 1e-5


def test_strips_of_the_released_sizes():
    vae = network(FULL)
    z, x = latents(FULL, 1, 5, 3), image(1, 40, 24)
    assert relative_error(vae.decode(z, MIB), vae.decode(z, WHOLE)) <= 1e-5
    assert relative_error(vae.encode(x, MIB), vae.encode(x, WHOLE)) <= 1e-5


def test_strips_in_bfloat16():
    vae, exact = network(TINY, mx.bfloat16), network(TINY, mx.bfloat16)
    exact.set_dtype(mx.float32)
    z, x = latents(TINY, 1, 13, 9, mx.bfloat16), image(1, 52, 36, mx.bfloat16)
    for got, whole, right in (
        (vae.decode(z, ROW), vae.decode(z, WHOLE), exact.decode(z.astype(mx.float32))),
        (vae.encode(x, ROW), vae.encode(x, WHOLE), exact.encode(x.astype(mx.float32))),
    ):
        assert got.dtype == mx.bfloat16
        assert relative_error(got, right) <= 1.1 * relative_error(whole, right)


def test_group_norm_is_exact_over_many_pixels():
    """A plain float32 sum over so many pixels, or E[x²] − E[x]², would be off by more than 1e-4."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 200, 256, 16)) + 100 + np.linspace(-1, 1, 200)[None, :, None, None]
    groups = x.astype(np.float32).astype(np.float64).reshape(2, -1, 4, 4)
    right = (groups - groups.mean((1, 3), keepdims=True)) / groups.std((1, 3), keepdims=True)
    for strip_bytes in (WHOLE, MIB):
        got = GroupNorm(16, 4)(Stored([mx.array(x.astype(np.float32))], Runner(strip_bytes))).store().whole()
        assert np.abs(np.array(got) - right.reshape(x.shape)).max() <= 1e-4


@pytest.mark.parametrize("height", [1, 2, 5, 37, 64])
@pytest.mark.parametrize("strip_bytes", [ROW, 10_000, 50_000, WHOLE])
def test_strip_height(height, strip_bytes):
    rows = Conv2d(4, 8, 3, padding=1)(Doubled(Stored([mx.zeros((1, height, 10, 4))], Runner(0))))
    chosen = strip_height(rows, strip_bytes)
    assert 1 <= chosen <= 2 * height
    assert chosen == 1 or rows.temporaries(chosen) <= strip_bytes
    assert strip_bytes != WHOLE or chosen == 2 * height
    strips = -(-2 * height // chosen)
    assert chosen == 2 * height or rows.temporaries(-(-2 * height // max(strips - 1, 1))) > strip_bytes


def test_small_images_run_in_one_strip():
    heights = []

    class Recorder(Runner):
        def _compute(self, rows, start, stop):
            heights.append((stop - start, rows.shape[1]))
            return super()._compute(rows, start, stop)

    network(TINY)._decode(Stored([latents(TINY, 1, 8, 8)], Recorder(256 * MIB)))
    assert heights
    assert all(strip == height for strip, height in heights)


def test_memory_grows_with_stored_rows_only():
    vae, width, strip_bytes = network(SMALL), 192, MIB
    peaks = [peak_memory(vae.decode, latents(SMALL, 1, height, width // 4), strip_bytes) for height in (16, 32)]
    # In the first block of the last level: its input of 32 channels and the first convolution's output of 16.
    stored = (32 - 16) * 4 * width * (32 + 16) * mx.float32.size
    assert peaks[1] - peaks[0] <= 1.1 * stored  # the allocator rounds sizes up
    assert peaks[0] <= stored + 1.1 * strip_bytes


@pytest.mark.parametrize("strip_bytes", [MIB, 3 * MIB])
@pytest.mark.parametrize(("height", "width"), [(256, 192), (128, 256)])
def test_predicted_memory(height, width, strip_bytes):
    vae = network(SMALL)
    cost = VAECost(SMALL, mx.float32, strip_bytes)
    encoding, decoding = cost.encoding(height, width), cost.decoding(height, width)
    measured = peak_memory(vae.encode, image(1, height, width), strip_bytes)
    assert measured <= encoding <= 1.1 * measured
    measured = peak_memory(vae.decode, latents(SMALL, 1, height // 4, width // 4), strip_bytes)
    assert measured <= decoding <= 1.1 * measured


def test_predicted_memory_of_the_released_sizes():
    cost = VAECost(FULL, mx.bfloat16)
    for peak in (cost.encoding, cost.decoding):
        assert peak_memory(lambda peak=peak: peak(1024, 1024) and []) < MIB
        assert peak(1024, 1024) <= 1.2 * 1024 * MIB


def test_very_tall_images():
    vae = network(TINY)
    z = latents(TINY, 1, 1024, 4)
    assert relative_error(vae.decode(z, MIB), vae.decode(z, WHOLE)) <= 1e-5


def gpu(monkeypatch) -> None:
    for module in ("device", "vae.cost", "vae.strips", "vae.layers", "transformer.execution", "footprints"):
        monkeypatch.setattr(f"flux2_mlx.{module}.on_gpu", lambda: True)


def planned(side: int, limit: int, **settings) -> Plan:
    return (
        Networks.open(VARIANTS["klein-4b"], dtype="bfloat16").needs(Workload(side, side, 512, **settings)).plan(limit)
    )


@pytest.mark.parametrize("settings", [{}, {"references": ((1024, 1024),)}, {"previews": True}, {"images": 3}], ids=str)
@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_strips_are_larger_where_the_transformer_takes_as_much(side, settings, monkeypatch):
    """And nothing that a plan says of other phases or of the whole run changes."""
    usual = planned(side, 2**40, **settings)
    assert usual.strip_bytes == STRIP_BYTES  # on a CPU, where no strip is waited for
    gpu(monkeypatch)
    larger = planned(side, 2**40, **settings)
    monkeypatch.setattr(VAECost, "ways", property(lambda cost: iter([cost])))
    usual = planned(side, 2**40, **settings)
    assert larger.strip_bytes in (2 * STRIP_BYTES, 4 * STRIP_BYTES, 8 * STRIP_BYTES)
    room = larger.phase("transformer").activations
    for phase, before in zip(larger.phases, usual.phases, strict=True):
        if phase.name.startswith("vae"):
            assert before.activations <= phase.activations <= room
            assert phase.weights == before.weights
        else:
            assert phase == before
    assert larger.peak_memory == usual.peak_memory


@pytest.mark.parametrize("limit", [2 * 10**9, 4 * 10**9, 12 * 10**9])
def test_larger_strips_take_nothing_from_a_tight_plan(limit, monkeypatch):
    gpu(monkeypatch)
    larger = planned(1024, limit)
    monkeypatch.setattr(VAECost, "ways", property(lambda cost: iter([cost])))
    usual = planned(1024, limit)
    assert (larger.peak_memory, larger.fits, larger.phase("transformer")) == (
        *(usual.peak_memory, usual.fits, usual.phase("transformer")),
    )


def counted_strips(strip_bytes: int, side: int) -> int:
    counts = []

    class Counter(Meter):
        def _compute(self, rows, start, stop):
            counts.append(stop - start)
            return super()._compute(rows, start, stop)

    latents = mx.zeros((1, side // 8, side // 8, FULL.latent_channels), mx.bfloat16)
    VAE(FULL)._decode(Stored([latents], Counter(strip_bytes)))
    return len(counts)


def test_larger_strips_are_fewer(monkeypatch):
    gpu(monkeypatch)
    counts = [counted_strips(times * STRIP_BYTES, 1024) for times in (1, 2, 4, 8)]
    print(counts)
    assert counts[0] == 401
    assert counts[2] < counts[0] / 2.9
    assert counts == sorted(counts, reverse=True)


def test_a_run_decodes_and_encodes_in_the_strips_of_its_plan(monkeypatch):
    sizes = []

    class Spy(Runner):
        def __init__(self, strip_bytes):
            sizes.append(strip_bytes)
            super().__init__(strip_bytes)

    monkeypatch.setattr(model, "Runner", Spy)
    monkeypatch.setattr(VAECost, "ways", property(lambda cost: iter([replace(cost, strip_bytes=123_456)])))
    monkeypatch.setattr(VAECost, "decoding", lambda *_: 1)
    monkeypatch.setattr(VAECost, "encoding", lambda *_: 1)
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)
    settings = {"width": 64, "height": 64, "num_inference_steps": 1, "seed": 0}
    pipe("a red ring", image=Image.new("RGB", (64, 64), "teal"), **settings)
    pipe("a red ring", output_type="np", **settings)
    assert sizes == [123_456] * 3
