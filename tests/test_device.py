"""The device that MLX computes on. Stand-ins for what only a GPU has."""

import os
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.device_messages import HEAD, INTERACTIVITY, OUT_OF_MEMORY, TIMEOUT, TOO_LARGE

from flux2_mlx import device, layers
from flux2_mlx.device import (
    GIB,
    activation_dtype,
    device_memory,
    failures,
    foreign,
    fused,
    fuses_attention,
    memory_bytes,
    memory_reason,
    on_gpu,
    on_metal,
    parse_memory,
)
from flux2_mlx.errors import DeviceError, InputError


def pretend(monkeypatch: pytest.MonkeyPatch, metal: bool = True, **info: Any) -> None:
    """Be a GPU of which MLX says `info`."""
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(device, "on_metal", lambda: metal)
    monkeypatch.setattr(mx, "device_info", lambda of=None: info)


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [
        *((f"Apple M{number}{kind}", mx.float16) for number in (1, 2) for kind in ("", " Pro", " Max", " Ultra")),
        *((f"Apple M{number}{kind}", mx.bfloat16) for number in (3, 4, 5, 10, 21) for kind in ("", " Pro", " Max")),
        ("Apple Paravirtual device", mx.bfloat16),
        ("Apple A18 Pro", mx.bfloat16),
        ("NVIDIA GeForce RTX 4090", mx.bfloat16),
        ("", mx.bfloat16),
    ],
)
def test_the_chip_decides_what_is_computed_in(chip, dtype, monkeypatch):
    pretend(monkeypatch, device_name=chip)
    assert activation_dtype(None) == dtype
    assert activation_dtype("float32") == mx.float32


def test_a_cpu_computes_in_float32(monkeypatch):
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    assert activation_dtype(None) == mx.float32


def test_a_dtype_asked_for_is_taken():
    names = ("float32", "bfloat16", "float16")
    assert [activation_dtype(name) for name in names] == [mx.float32, mx.bfloat16, mx.float16]
    with pytest.raises(InputError, match="unknown dtype 'float64'; choose one of float32, bfloat16, float16"):
        activation_dtype("float64")


def test_the_tests_compute_on_a_cpu_and_in_whole_float32():
    assert not on_gpu()
    assert (os.environ["FLUX2_MLX_DEVICE"], os.environ["MLX_ENABLE_TF32"]) == ("cpu", "0")


def test_a_device_that_is_chosen_is_no_gpu(monkeypatch):
    monkeypatch.setattr(mx, "is_available", lambda of: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert (on_gpu(), on_metal()) == (False, False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert (on_gpu(), on_metal()) == (True, True)


@pytest.mark.parametrize(
    ("whole", "recommended", "expected"),
    [
        (8, 5.33, 4),
        (16, 10.67, 10),
        (18, 12, 11.5),
        (24, 16, 16),
        (36, 27, 27),
        (64, 48, 48),
        (96, 72, 72),
        (128, 96, 96),
        (192, 144, 144),
        (128, 125, 120),  # raised by the user with iogpu.wired_limit_mb
    ],
)
def test_a_mac_keeps_memory_for_its_system(whole, recommended, expected, monkeypatch):
    pretend(
        monkeypatch,
        memory_size=int(whole * GIB),
        max_recommended_working_set_size=int(recommended * GIB),
        device_name="",
    )
    assert device_memory() == pytest.approx(expected * GIB)


@pytest.mark.parametrize("whole", [2 * GIB, 7 * GIB, 8 * GIB - 1, 8 * GIB, 2**62, 2**64 - 1])
def test_there_is_always_a_limit(whole, monkeypatch):
    pretend(monkeypatch, memory_size=whole, max_recommended_working_set_size=whole, device_name="")
    assert min(whole, 2**62) // 2 <= device_memory() < 2**63
    assert device_memory() < whole
    assert parse_memory(device_memory()) < 2**63
    assert "a -" not in memory_reason()


@pytest.mark.parametrize("value", [None, 0])
@pytest.mark.parametrize("missing", ["memory_size", "max_recommended_working_set_size", "device_name"])
def test_what_metal_does_not_say_is_not_needed(missing, value, monkeypatch):
    info = {"memory_size": 16 * GIB, "max_recommended_working_set_size": 10 * GIB, "device_name": "Apple M4"}
    monkeypatch.setattr(device, "_host_memory", lambda: 16 * GIB)
    info |= {missing: value}
    if value is None:
        del info[missing]
    pretend(monkeypatch, **info)
    assert device_memory() == 10 * GIB
    assert memory_reason().startswith("of the 16 GiB of this Mac 6 GiB are kept for the system")
    assert device.chip() == ("an unknown chip" if missing == "device_name" else "Apple M4")
    assert activation_dtype(None) == mx.bfloat16


def test_a_card_of_unknown_memory_needs_a_limit(monkeypatch):
    pretend(monkeypatch, metal=False)
    with pytest.raises(
        DeviceError, match=r"^MLX does not say how much memory this GPU has; say it with a memory_limit"
    ):
        memory_bytes(None)
    assert memory_bytes("12GB") == 12 * 10**9


def test_the_memory_of_a_card_is_its_own(monkeypatch):
    pretend(monkeypatch, metal=False, total_memory=80 * GIB, free_memory=GIB)
    assert device_memory() == 72 * GIB


def test_the_memory_of_a_computer_without_a_gpu_is_what_it_has():
    assert GIB < device_memory() < 2**43


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12GB", 12 * 10**9), ("7.5GiB", 7.5 * 2**30), ("800 mb", 8e8), ("3g", 3e9), ("4000000", 4e6), (5 * 10**6, 5e6)],
)
def test_sizes_of_memory(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "3XB", "GB", "1e9", "100000000TB", "9" * 400 + "GB"])
def test_what_is_no_size_of_memory(text):
    with pytest.raises(InputError, match="memory_limit must be a size such as 12GB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("limit", "meant"), [("12", "12GB"), (12, "12GB"), ("7.5", "7.5GB"), (12000, "12000MB"), ("12B", "12GB")]
)
def test_a_number_whose_unit_was_forgotten(limit, meant):
    with pytest.raises(InputError, match=rf"^[\d.]+ bytes of memory are too few for any run; did you mean {meant}\?$"):
        parse_memory(limit)


@pytest.mark.parametrize(
    ("gpu", "metal", "head_dim", "itemsize", "expected"),
    [
        *((True, True, head_dim, itemsize, True) for head_dim in (64, 80, 128) for itemsize in (2, 4)),
        *((True, True, head_dim, 2, False) for head_dim in (32, 96, 512)),
        *((True, False, head_dim, 2, True) for head_dim in (8, 64, 96, 128)),
        *((True, False, head_dim, itemsize, False) for head_dim, itemsize in ((128, 4), (512, 2), (100, 2))),
        (False, False, 128, 2, False),
    ],
)
def test_which_attention_stores_no_scores(gpu, metal, head_dim, itemsize, expected, monkeypatch):
    monkeypatch.setattr(device, "on_gpu", lambda: gpu)
    monkeypatch.setattr(device, "on_metal", lambda: metal)
    assert fuses_attention(head_dim, itemsize) is expected


@pytest.mark.parametrize("masked", [False, True])
def test_a_fused_attention_is_bounded_by_its_work(masked, monkeypatch):
    """No dispatch has more operations than the constant says, and chunks give what the whole gives."""
    rng = np.random.default_rng(0)
    q, k, v = (mx.array(rng.normal(size=(2, heads, 50, 64)).astype(np.float32)) for heads in (4, 2, 2))
    mask = mx.array(rng.random((2, 1, 50, 50)) < 0.5) if masked else None
    whole = layers.attention(q, k, v, mask)
    monkeypatch.setattr(layers, "fuses_attention", lambda head_dim, itemsize: True)
    monkeypatch.setattr(layers, "OPERATIONS_PER_CHUNK", 1_000_000)
    work, attend = [], layers._attend

    def watched(q, k, v, mask):
        work.append(4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3])
        return attend(q, k, v, mask)

    monkeypatch.setattr(layers, "_attend", watched)
    chunked = layers.attention(q, k, v, mask)
    assert np.allclose(chunked, whole, rtol=0, atol=1e-6)
    assert max(work) <= 1_000_000
    assert len(work) > 1
    assert sum(work) == 4 * 2 * 4 * 50 * 50 * 64


def test_functions_are_compiled_on_a_gpu_only(monkeypatch):
    compiled = []
    monkeypatch.setattr(mx, "compile", lambda function, shapeless: lambda x: compiled.append(x) or function(x))
    double = fused(lambda x: 2 * x)
    assert (double(3), compiled) == (6, [])
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    assert (double(4), compiled) == (8, [4])


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (OUT_OF_MEMORY, r"^the GPU has no memory left for this; choose a lower memory_limit, .*\(\[METAL\] .*\)$"),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", "^the GPU has no memory left"),
        ("[malloc_or_wait] Unable to allocate 123 bytes.", "^the GPU has no memory left"),
        ("[metal::malloc] Resource limit (499000) exceeded.", r"^the GPU failed \(\[metal::malloc\]"),
        ("cublasLtMatmul(handle, desc) failed with code: 14.", r"^the GPU failed \(cublasLtMatmul"),
        ("cudaGraphLaunch(graph_exec, stream) failed: unspecified launch failure", "^the GPU failed "),
        (TIMEOUT, "^the GPU was stopped, as one of its operations took too long; choose a smaller image, or set AGX_"),
        (INTERACTIVITY, "^the GPU was stopped for the sake of the display; let the display sleep, "),
        (TOO_LARGE, "^one array would be larger than the GPU allows; choose a smaller image"),
        (f"{HEAD}Ignored (for causing prior/excessive GPU errors)\nmore", r"^the GPU failed \([^\n]*\)$"),
    ],
)
def test_what_a_gpu_says_becomes_one_line(message, match):
    with pytest.raises(DeviceError, match=match), failures():
        raise RuntimeError(message)


def said(message: str, **context: str | None) -> str:
    with pytest.raises(DeviceError) as raised, failures(), failures(**context):
        raise RuntimeError(message)
    return str(raised.value)


@pytest.mark.parametrize("message", [OUT_OF_MEMORY, TIMEOUT, INTERACTIVITY, TOO_LARGE])
def test_what_to_do_is_about_what_is_done(message):
    assert "a smaller image" in said(message)
    writing = said(message, smaller="a shorter prompt")
    assert "a shorter prompt" in writing
    assert "a smaller image" not in writing
    converting = said(message, smaller=None)
    assert "; close other programs, or set FLUX2_MLX_DEVICE=cpu in the environment" in converting
    assert not any(words in converting for words in ("image", "memory_limit", "display sleep"))


class OtherError(RuntimeError):
    """Such as PyTorch's for a GPU without memory."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[conv] Expect the input channels in the input and weight array to match"),
        RuntimeError("[load_safetensors] Failed to open file /models/cuda/out of memory/[METAL].safetensors"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("cublas runtime error: the GPU program failed to execute"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        OtherError(OUT_OF_MEMORY),
        ValueError(TIMEOUT),
    ],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, failures():
        raise error
    assert raised.value is error


def test_what_a_function_of_the_caller_raises_passes():
    error = RuntimeError(OUT_OF_MEMORY)
    with pytest.raises(RuntimeError) as raised, failures(), failures(), foreign():
        raise error
    assert raised.value is error
