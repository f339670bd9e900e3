"""What a denoising pass is said to need, against what it takes."""

import mlx.core as mx
import numpy as np
import pytest

from flux2_mlx import Flux2Pipeline
from flux2_mlx.config import VARIANTS, TransformerConfig
from flux2_mlx.errors import InputError
from flux2_mlx.memory import (
    PhasePlan,
    Plan,
    activation_bytes,
    check_references,
    device_memory,
    max_tokens,
    parse_memory,
)
from flux2_mlx.transformer import Flux2Transformer, image_ids, rope_table, text_ids

DEV = VARIANTS["dev"].transformer


def measured_peak(config: TransformerConfig, side: int, text: int, dtype: mx.Dtype) -> int:
    model = Flux2Transformer(config)
    model.set_dtype(dtype)
    tokens = mx.random.normal((1, side * side, config.in_channels)).astype(dtype)
    states = mx.random.normal((1, text, config.hidden_size)).astype(dtype)
    rope = rope_table(np.concatenate([text_ids(text), image_ids(side, side)]), config)
    mx.eval(model.parameters(), tokens, states, rope)
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model(tokens, states, mx.array([0.5]), rope))
    return mx.get_peak_memory() - held


@pytest.mark.parametrize(
    ("heads", "side", "text", "dtype"),
    [(4, 16, 64, mx.float32), (4, 32, 64, mx.float32), (8, 32, 256, mx.float32), (2, 24, 64, mx.bfloat16)],
)
def test_the_prediction_is_near_the_peak_and_never_below(heads, side, text, dtype):
    config = TransformerConfig(1, 1, heads, 64, guidance_embeds=False)
    measured = measured_peak(config, side, text, dtype)
    predicted = activation_bytes(config, side * side + text, dtype.size)
    print(f"measured {measured}, predicted {predicted}: {predicted / measured:.3f}")
    assert measured <= predicted <= 1.15 * measured


def test_max_tokens_is_where_it_stops_fitting():
    weights, memory = 10**9, 3 * 10**9
    most = max_tokens(DEV, weights, 2, memory)
    assert weights + activation_bytes(DEV, most, 2) <= memory < weights + activation_bytes(DEV, most + 1, 2)
    assert max_tokens(DEV, weights, 2, weights - 1) == 0


def test_references_that_do_not_fit():
    small = (DEV, 2 * 10**9, 2, 6 * 10**9, 4608)
    check_references(*small, [1024], 16)
    with pytest.raises(InputError, match=r"need .* GiB: 10 references of (\d+)×\1 pixels would fit") as caught:
        check_references(*small, [4096] * 10, 16)
    side = int(str(caught.value).partition("references of ")[2].partition("references of ")[2].partition("×")[0])
    check_references(*small, [(side // 16) ** 2] * 10, 16)
    with pytest.raises(InputError, match="the reference of"):
        check_references(*small, [40960], 16)
    with pytest.raises(InputError, match="not even small ones"):
        check_references(DEV, 7 * 10**9, 2, 6 * 10**9, 4608, [4096], 16)


def test_device_memory_is_that_of_a_computer():
    assert 2**30 < device_memory() < 2**43


@pytest.mark.parametrize("size", [(128, 128), (256, 192), (512, 512)])
def test_a_plan_is_near_what_a_run_takes_and_never_below(size):
    width, height = size
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)
    planned = pipe.networks.plan(pipe.request(["a red ring"], width=width, height=height))
    pipe("a red ring", width=width, height=height, num_inference_steps=1)  # what is made once and stays
    base = mx.get_active_memory()
    run = pipe("a red ring", width=width, height=height, num_inference_steps=1, seed=0)
    for phase, took in zip(planned.phases, run.timings, strict=True):
        measured = took.peak_memory - base
        print(f"{phase.name}: measured {measured}, predicted {phase.peak_memory}: {phase.peak_memory / measured:.3f}")
        assert phase.name == took.name
        assert measured <= phase.peak_memory <= 1.3 * measured


def test_what_fits():
    phases = (PhasePlan("text_encoder", 3, 1), PhasePlan("transformer", 4, 2))
    assert (Plan(phases, 6).peak_memory, Plan(phases, 6).fits, Plan(phases, 5).fits) == (6, True, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12GB", 12 * 10**9), ("7.5GiB", 7.5 * 2**30), ("800 mb", 8e8), ("3g", 3e9), ("4096", 4096), (5000, 5000)],
)
def test_sizes_of_memory(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "3XB", "GB", "1e9"])
def test_what_is_no_size_of_memory(text):
    with pytest.raises(InputError, match="memory must be a size such as 12GB"):
        parse_memory(text)
