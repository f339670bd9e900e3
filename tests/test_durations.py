"""How long runs are expected to take, by what is known of a chip."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.cli_runner import done, refusal
from published_speeds import PUBLISHED

from flux2_mlx import durations
from flux2_mlx.advice import workload
from flux2_mlx.chips import chip_named
from flux2_mlx.config import QUANTIZATIONS, VARIANTS, TransformerConfig, VAEConfig
from flux2_mlx.durations import Rates, duration, own_chip, rates_of
from flux2_mlx.networks import Networks
from flux2_mlx.request import Request
from flux2_mlx.text import TextCost
from flux2_mlx.transformer import pass_operations, pass_products
from flux2_mlx.vae import VAE, VAECost
from flux2_mlx.vae import layers as vae_layers

M1, M3_MAX, M5 = (chip_named(name) for name in ("M1", "M3 Max", "M5"))


def expected(model: str, chip=M3_MAX, *, guidance=None, steps=4, quant="bf16", **changes):
    variant = VARIANTS[model]
    request = Request.checked(variant, 16, [""], steps=steps, guidance=guidance)
    networks = Networks.open(variant, quant=quant, dtype="bfloat16")
    return duration(networks, request, replace(workload(request), **changes), chip)


def test_published_runs_are_expected_within_what_the_table_tells():
    """Others' programs on others' Macs. Those of mflux, which multiplies as this program does, but for M5."""
    errors = {line: line.error for line in PUBLISHED}
    assert all(-0.7 < error < 0.35 for error in errors.values())
    alike = [error for line, error in errors.items() if line.program == "mflux" and "M5" not in line.chip]
    assert len(alike) == 10
    assert all(-0.25 < error < 0.15 for error in alike)
    fitted = [error for line, error in errors.items() if line.fitted and line.program == "mflux"]
    assert len(fitted) == 2
    assert all(abs(error) < 0.03 for error in fitted)


def test_what_bits_take_more_is_fitted_to_the_swift_port():
    for model in ("klein-4b", "klein-9b"):
        plain, *packed = (line for line in PUBLISHED if (line.program, line.model) == ("Swift port", model))
        ratios = [line.seconds / plain.seconds for line in packed]
        assert [durations._PACKED[line.quant] for line in packed] == pytest.approx(ratios, abs=0.01)


def test_every_line_names_its_run():
    lines = [str(line) for line in PUBLISHED]
    assert len(set(lines)) == len(lines) == 26
    assert "klein-9b-kv bf16 bfloat16 1024×1024, 1 reference" in "".join(lines)


def test_guidance_is_a_second_pass_and_a_second_text():
    once, twice = expected("klein-base-4b", guidance=1.0), expected("klein-base-4b", guidance=4.0)
    assert twice.step == pytest.approx(2 * once.step)
    assert twice.phases["text_encoder"] == pytest.approx(2 * once.phases["text_encoder"])
    assert twice.phases["vae"] == once.phases["vae"]


def test_images_and_steps_add_up():
    one, more = expected("klein-4b"), expected("klein-4b", steps=8, images=3)
    assert more.step == one.step
    assert more.phases["transformer"] == pytest.approx(6 * one.phases["transformer"])
    assert more.seconds == pytest.approx(sum(more.phases.values()))
    assert "vae_encoder" not in one.phases


def test_references_go_along_or_are_read_once():
    pictures = ((1024, 1024),) * 2
    plain, along, apart = (
        expected("klein-9b"), expected("klein-9b", references=pictures), expected("klein-9b-kv", references=pictures)
    )  # fmt: skip
    assert along.step > 2.5 * plain.step
    assert plain.step < apart.step < 1.5 * plain.step
    assert apart.phases["transformer"] - 4 * apart.step > plain.step
    assert along.phases["vae_encoder"] == apart.phases["vae_encoder"] > 0


@pytest.mark.parametrize("quant", ["qint8", "qint4", "another"])
def test_packed_weights_take_longer(quant):
    plain, packed = (rates_of(M3_MAX, mx.bfloat16, name) for name in ("bf16", quant))
    assert packed.products < plain.products
    assert packed.attention == plain.attention


def test_rates_of_all_quantizations_are_known():
    assert tuple(durations._PACKED) == QUANTIZATIONS


def test_rates_follow_the_chip_and_the_dtype():
    assert rates_of(M1, mx.float16).products > rates_of(M1, mx.bfloat16).products
    assert rates_of(M3_MAX, mx.float16) == rates_of(M3_MAX, mx.bfloat16) == rates_of(M3_MAX, mx.float32)
    assert rates_of(M5, mx.bfloat16).products == 4 * rates_of(M5, mx.float32).products
    assert rates_of(M5, mx.bfloat16).traffic == pytest.approx(0.8 * 153e9)


def test_traffic_counts_where_it_is_not_among_the_products():
    config = VARIANTS["klein-4b"].transformer
    alone = Rates(np.inf, np.inf, traffic=1e12).step_seconds(config, 4608)
    assert alone == pytest.approx(0.017, rel=0.1)  # 17 GB, where 16 were counted
    assert Rates(1e12, 1e12).step_seconds(config, 4608) == pytest.approx(sum(pass_operations(config, 4608)) / 1e12)


@pytest.mark.parametrize(
    ("chip", "macos", "units"),
    [("Apple M5 Max", "26.2", True), ("Apple M5 Max", "26.1", False), ("Apple M4 Max", "27.0", False)],
)
def test_this_mac_has_its_units_from_a_macos_on(chip, macos, units, monkeypatch):
    monkeypatch.setattr(durations, "on_metal", lambda: True)
    monkeypatch.setattr(durations, "chip_name", lambda: chip)
    monkeypatch.setattr(durations.platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    assert own_chip().has_matrix_units is units


def test_nothing_is_known_of_other_machines(monkeypatch):
    assert own_chip() is None
    monkeypatch.setattr(durations, "on_metal", lambda: True)
    monkeypatch.setattr(durations, "chip_name", lambda: "Apple M9 Giga")
    assert own_chip() is None


def test_products_are_all_that_are_counted():
    config = TransformerConfig(2, 3, 2, 96, 32, 32, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)
    counted = sum(2 * rows * columns * inner * n for (rows, columns, inner), n in pass_products(config, 7, 9).items())
    left_out = 2 * 7 * (2 * 64 * 64 + 3 * 64 * config.mlp_hidden_size)  # of the text, in the last block
    assert counted == pass_operations(config, 16)[0] - left_out
    assert pass_operations(config, 16, 4)[1] == 4 * 16 * 20 * 64 * 5


def test_the_text_encoder_s_operations_are_its_products():
    """Of Qwen3-4B, whose 27 layers have 2.72e9 weights."""
    operations = TextCost(VARIANTS["klein-4b"].text, mx.float32).operations(512)
    assert operations == pytest.approx(2 * 512 * 2.72e9, rel=0.05)


class Counted:
    """Counts what the autoencoder multiplies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.operations = 0
        self._conv2d = mx.conv2d
        monkeypatch.setattr(mx, "conv2d", self.conv2d)
        monkeypatch.setattr(vae_layers.Linear, "__call__", self.linear)
        monkeypatch.setattr(vae_layers, "attention", self.attention)

    def conv2d(self, x, weight, *settings, **named):
        y = self._conv2d(x, weight, *settings, **named)
        self.operations += 2 * y.size * weight[0].size
        return y

    def linear(self, x):
        self.operations += 2 * x.size * x.shape[-1]
        return x

    def attention(self, q, k, v):
        self.operations += 4 * q.size * k.shape[2]
        return q


@pytest.mark.parametrize("decoder", [None, (32, 64, 32, 64)])
def test_the_autoencoder_s_operations_are_those_that_it_does(decoder, monkeypatch):
    config = VAEConfig((32, 32, 64, 96), decoder, 2, 4, 8)
    cost, vae = VAECost(config, mx.float32), VAE(config)
    counted = Counted(monkeypatch)
    vae.decode(mx.zeros((1, 8, 4, 4)), 2**40)
    assert counted.operations == cost.decoding_operations(64, 32)
    counted.operations = 0
    vae.encode(mx.zeros((1, 64, 32, 3)), 2**40)
    assert counted.operations == cost.encoding_operations(64, 32)


@pytest.mark.parametrize(
    ("chip", "dtype", "computes"),
    [
        ("M5 Max", None, "bfloat16"), ("M2 Max", None, "float16"), ("M5 Max", "float32", "float32"),
        ("M2 Max", "bfloat16", "bfloat16"),
    ],
)  # fmt: skip
def test_a_chip_computes_in_its_own_dtype(chip, dtype, computes):
    given = ("--dtype", dtype) if dtype else ()
    told = json.loads(done("info", "klein-4b", "--chip", chip, *given, "--json").stdout)["expected"]
    variant = VARIANTS["klein-4b"]
    networks = Networks.open(variant, dtype=computes)
    request = Request.checked(variant, 16, [""])
    assert told["dtype"] == computes
    assert told["step"] == duration(networks, request, workload(request), chip_named(chip)).step


def test_info_tells_what_is_expected_of_a_chip():
    line = done("info", "klein-4b", "--chip", "m3 max").stdout.splitlines()[-1]
    assert line == (
        "expected of an M3 Max in bfloat16: about 3.6 s a step, 17 s for 4 steps with text and image, "
        "besides reading from disk"
    )
    assert " 55 min for 50 steps " in done("info", "klein-base-9b", "-q", "qint8", "--chip", "M2").stdout
    assert "expected" not in done("info", "klein-4b").stdout
    assert refusal("info", "klein-4b", "--chip", "M7").startswith("unknown chip 'M7'; choose one of M1, ")
