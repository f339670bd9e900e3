"""No operation keeps a GPU busy for long, as macOS stops one that does."""

import logging
from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.checkpoints import convert, save_dev

from flux2_mlx import Flux2Pipeline, device, layers, metering
from flux2_mlx.config import VARIANTS
from flux2_mlx.device import MOST_DISPATCH, chip_class, dispatch_seconds
from flux2_mlx.layers import OPERATIONS_PER_CHUNK, attention
from flux2_mlx.memory import Workload, Writing
from flux2_mlx.networks import Networks
from flux2_mlx.text import VisionCost, cost
from flux2_mlx.text.pixtral import VisionTower
from flux2_mlx.upsampling import Writer
from flux2_mlx.vae import VAE
from flux2_mlx.vae import layers as vae_layers
from flux2_mlx.vae.strips import STRIP_BYTES, Runner, Stored

RELEASED = [name for name, variant in VARIANTS.items() if variant.repo]


def on_chip(monkeypatch, name: str) -> None:
    monkeypatch.setattr(device, "on_metal", lambda: True)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda *device: {"device_name": name})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Apple M1", 1 / 1.56),
        ("Apple M1 Max", 1 / 6.24),
        ("Apple M4 Pro", 1 / 5.16),
        ("Apple M3 Ultra", 1 / 17.04),
        ("Apple M5 Max", 1 / 9.72),
    ],
)
def test_how_long_a_chip_takes(name, expected, monkeypatch):
    on_chip(monkeypatch, name)
    assert dispatch_seconds(10**12) == pytest.approx(expected)
    assert chip_class() == name


@pytest.mark.parametrize(
    ("name", "slower"),
    [
        ("Apple M4 Ultra", "Apple M4 Max"),
        ("Apple M5 Ultra", "Apple M5 Max"),
        ("Apple M6", "Apple M5"),
        ("Apple M6 Pro", "Apple M5 Pro"),
        ("Apple M19 Max", "Apple M5 Max"),
        ("Apple A18 Pro", "Apple M1"),
        ("Apple Paravirtual device", "Apple M1"),
        ("", "Apple M1"),
    ],
)
def test_a_chip_that_is_not_in_the_table_is_taken_for_a_slower_one(name, slower, monkeypatch):
    on_chip(monkeypatch, slower)
    expected = dispatch_seconds(10**12)
    on_chip(monkeypatch, name)
    assert (dispatch_seconds(10**12), chip_class()) == (expected, slower)


def test_what_is_no_mac_is_not_in_the_table():
    assert dispatch_seconds(10**15) is None


@pytest.mark.parametrize("model", RELEASED)
def test_no_released_model_keeps_the_slowest_chip_for_long(model, monkeypatch):
    """An image of 2048×2048 with as many references as are recommended."""
    on_chip(monkeypatch, "Apple M1")
    variant = VARIANTS[model]
    networks = Networks.open(variant, dtype="float16")
    references = ((1024, 1024),) * (variant.max_image_tokens // 4096)
    work = Workload(2048, 2048, variant.max_sequence_length, references)
    planned = networks.needs(work).plan(2**40)
    assert OPERATIONS_PER_CHUNK / 10 < planned.longest <= OPERATIONS_PER_CHUNK
    assert dispatch_seconds(planned.longest) < MOST_DISPATCH
    monkeypatch.setattr(layers, "OPERATIONS_PER_CHUNK", 10**20)
    assert dispatch_seconds(networks.needs(work).plan(2**40).longest) > MOST_DISPATCH


@pytest.mark.parametrize("slow", [False, True])
def test_a_run_tells_of_a_long_operation(slow, caplog, monkeypatch):
    monkeypatch.setattr(metering, "dispatch_seconds", lambda operations: operations / (1e3 if slow else 1e12))
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)
    with caplog.at_level(logging.WARNING, "flux2_mlx"):
        pipe("a red ring", width=64, height=64, num_inference_steps=1, seed=0)
    told = [record.getMessage() for record in caplog.records if "an operation takes this GPU about" in record.message]
    assert len(told) == slow
    assert all(" s if it is as fast as an Apple M1, and macOS may stop it; let the display sleep, " in x for x in told)
    assert all(line.endswith("or choose a smaller image or fewer references") for line in told)


class Lazy(Runner):
    """Strips that are never computed, of the heights that they would have."""

    def _compute(self, rows, start, stop):
        return rows.read(start, stop)


@pytest.mark.parametrize("times", [1, 8])
@pytest.mark.parametrize("side", [1024, 2048, 4096])
def test_strips_of_the_autoencoder_are_short_operations(side, times, monkeypatch):
    convolve, work = mx.conv2d, []

    def counted(x, weight, *options):
        y = convolve(x, weight, *options)
        work.append(2 * y.size * weight[0].size)
        return y

    def attended(q, k, v):
        work.append(layers.attention_operations(1, q.shape[2], k.shape[2], q.shape[3], q.dtype.size))
        return mx.zeros((1, q.shape[2], q.shape[3]), q.dtype)

    monkeypatch.setattr(vae_layers, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "conv2d", counted)
    monkeypatch.setattr(vae_layers, "attention", attended)
    config = VARIANTS["dev"].vae
    vae = VAE(config)
    vae._encode(Stored([mx.zeros((1, side, side, 3), mx.bfloat16)], Lazy(times * STRIP_BYTES)))
    latents = mx.zeros((1, side // 8, side // 8, config.latent_channels), mx.bfloat16)
    vae._decode(Stored([latents], Lazy(times * STRIP_BYTES)))
    assert max(work) <= OPERATIONS_PER_CHUNK / 2
    print(side, max(work) / 1e12, len(work))


def test_the_vision_tower_attends_in_chunks(monkeypatch):
    config = replace(VARIANTS["dev"].vision, num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    config = replace(config, num_attention_heads=1)
    called = []
    monkeypatch.setattr("flux2_mlx.text.pixtral.attention", lambda *qkv: called.append(qkv) or attention(*qkv))
    mx.eval(VisionTower(config)(mx.zeros((1, 56, 56, 3))))
    assert len(called) == 1
    whole = VARIANTS["dev"].vision
    patches = (whole.image_size // whole.patch_size) ** 2
    longest = layers.attention_operations(whole.num_attention_heads, patches, patches, whole.head_dim, 2)
    products = 2 * patches * whole.hidden_size * whole.text_hidden_size
    assert VisionCost(whole, mx.bfloat16).longest(whole.image_size**2) == max(longest, products) <= OPERATIONS_PER_CHUNK


@pytest.mark.parametrize("pixels", [(), (768 * 768,)])
@pytest.mark.parametrize("tokens", [10, 2000, 100_000])
def test_the_plan_of_text_knows_its_longest_operation(tokens, pixels, monkeypatch):
    """mlx-lm reads 2048 tokens of a prompt at a time, which look at all before them."""
    config = VARIANTS["dev"].text
    monkeypatch.setattr(cost, "attention_operations", lambda heads, queries, keys, width, size: queries * keys * heads)
    networks = Networks.open(VARIANTS["dev"], dtype="bfloat16")
    longest = networks.writing_needs(Writing(tokens, 10, pixels)).plan(2**40).longest
    read, heads = min(tokens, 2048), config.num_attention_heads
    text = max(2 * read * config.hidden_size * config.intermediate_size, read * tokens * heads)
    vision = VisionCost(VARIANTS["dev"].vision, mx.bfloat16).longest(pixels[0]) if pixels else 0
    assert longest == max(text, vision) > 0
    assert not vision or tokens > 10 or longest == vision


@pytest.mark.parametrize("slow", [False, True])
def test_text_tells_of_a_long_operation(slow, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(metering, "dispatch_seconds", lambda operations: operations / (1e3 if slow else 1e14))
    save_dev(tmp_path / "official")
    writer = Writer.from_pretrained(convert(tmp_path / "official", tmp_path / "mine", variant="dev"), dtype="float32")
    with caplog.at_level(logging.WARNING, "flux2_mlx"):
        writer.write([("a", [])], "b", max_new_tokens=1, seed=1)
    told = [record.getMessage() for record in caplog.records if "an operation takes this GPU about" in record.message]
    assert len(told) == slow
    assert all(line.endswith("or choose fewer images or a shorter prompt") for line in told)
