"""Of a check-up, whether memory is what is planned: every check passes here, and fails with a part that is broken."""

import mlx.core as mx
import pytest
from helpers.findings import as_gpu, verdict

from flux2_mlx import layers
from flux2_mlx.config import TransformerConfig
from flux2_mlx.doctor import peaks
from flux2_mlx.transformer import TransformerCost
from flux2_mlx.vae import VAECost


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_STEP", TransformerConfig(5, 20, 4, 64, guidance_embeds=False))
    monkeypatch.setattr(peaks, "_DECODED_SIDE", (64, 64))


@pytest.mark.parametrize(
    ("check", "cost", "name"),
    [(peaks.check_step, TransformerCost, "passing"), (peaks.check_decoding, VAECost, "decoding")],
)
def test_a_plan_that_lies_fails(check, cost, name, monkeypatch):
    small(monkeypatch)
    assert verdict(check(mx.float32)) == "pass"
    honest = getattr(cost, name)
    for lie in (0.5, 4, 100):
        monkeypatch.setattr(cost, name, lambda *args, lie=lie, **given: int(lie * honest(*args, **given)))
        assert verdict(check(mx.float32)) == "fail"


@pytest.mark.parametrize("check", [peaks.check_step, peaks.check_decoding])
def test_memory_that_is_not_counted_fails(check, monkeypatch):
    small(monkeypatch)
    monkeypatch.setattr(mx, "get_peak_memory", mx.get_active_memory)
    assert verdict(check(mx.float32)) == "fail"


def test_attention_that_stores_its_scores_is_told(monkeypatch):
    assert peaks.check_attention(mx.float32).verdict == "skip"
    as_gpu(monkeypatch)
    monkeypatch.setattr(peaks, "_TOKENS", 512)
    monkeypatch.setattr(layers, "attention", lambda q, k, v: q + 1)
    assert verdict(peaks.check_attention(mx.float32)) == "pass"
    monkeypatch.setattr(layers, "attention", lambda q, k, v: q)  # which takes nothing, and so is none
    assert verdict(peaks.check_attention(mx.float32)) == "fail"
    monkeypatch.setattr(layers, "attention", lambda q, k, v: mx.softmax(q @ k.swapaxes(2, 3), axis=-1) @ v)
    assert verdict(peaks.check_attention(mx.float32)) == "fail"


@pytest.mark.parametrize("kept", [True, False])
def test_memory_that_is_not_wired_is_told(kept, monkeypatch):
    assert peaks.check_wiring().verdict == "skip"
    limit = [5]

    def set_wired_limit(nbytes: int) -> int:
        before, limit[0] = limit[0], nbytes if kept else 0
        return before

    monkeypatch.setattr(peaks, "on_metal", lambda: True)
    monkeypatch.setattr(peaks, "device_memory", lambda: 2**30)
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    assert verdict(peaks.check_wiring()) == ("pass" if kept else "warn")
    assert limit == [5 if kept else 0]
