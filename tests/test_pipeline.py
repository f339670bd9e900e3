"""`Flux2Pipeline` on a small random model: phases, memory, batches, outputs and settings."""

import gc
import logging
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.checkpoints import SHALLOW_TEXT, SHALLOW_VARIANT, convert, save_small
from helpers.variants import change_variant
from PIL import Image

from flux2_mlx import Flux2Pipeline, device, memory
from flux2_mlx.checkpoint import Component
from flux2_mlx.errors import Flux2Error, InputError
from flux2_mlx.noise import initial_noise
from flux2_mlx.request import Progress

SETTINGS = {"height": 48, "width": 64, "num_inference_steps": 2, "seed": 5, "max_sequence_length": 40}
FOX, CAT = "a fox", "a cat"
PHASES = ["text_encoder", "transformer", "vae"]


@pytest.fixture(scope="module")
def official(small_model: Callable[..., Path]) -> Path:
    return small_model(text=SHALLOW_TEXT)


@pytest.fixture(scope="module")
def folder(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16."""
    return convert_shallow(official, tmp_path_factory.mktemp("converted") / "model")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained(folder, dtype="float32", prompt_cache=False, keep=False)


@pytest.fixture
def guided(folder: Path) -> Flux2Pipeline:
    """The same weights as a model with classifier-free guidance."""
    pipe = Flux2Pipeline.from_pretrained(folder, dtype="float32", prompt_cache=False, keep=False)
    return change_variant(pipe, distilled=False)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The networks loaded so far. A load fails while another network is still in memory, but for the transformer while
    the VAE is loaded for many images."""
    names, networks = [], []
    load = Component.load

    def recorded(component: Component, *args, **kwargs):
        gc.collect()
        alive = [name for name, network in zip(names, networks, strict=True) if network() is not None]
        beside = ["transformer"] if component.name == "vae" and memory._TOKENS_PER_PASS < 100 else []
        assert alive == beside, f"{alive} in memory while {component.name} is loaded"
        network = load(component, *args, **kwargs)
        names.append(component.name)
        networks.append(weakref.ref(network))
        return network

    monkeypatch.setattr(Component, "load", recorded)
    return names


def convert_shallow(*args: Any) -> Path:
    return convert(*args, variant=SHALLOW_VARIANT)


def latents(pipe: Flux2Pipeline, *args, **settings) -> np.ndarray:
    return pipe(*args, **{**SETTINGS, "output_type": "latent", **settings}).images


def assert_close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_phases_follow_each_other(pipe, loads):
    heard: list[Progress] = []
    request = pipe.request([FOX, CAT], height=48, width=64, steps=3, seed=0, max_sequence_length=40)
    output = pipe.run(request, on_progress=heard.append)
    assert loads == PHASES
    assert [phase.name for phase in output.timings] == PHASES
    assert [(p.phase, p.done, p.total) for p in heard] == [
        *(("text_encoder", done, 2) for done in range(3)),
        *(("transformer", done, 3) for done in range(4)),
        *(("vae", done, 2) for done in range(3)),
    ]
    steps = [(p.step.number, p.images) for p in heard if p.step is not None]
    assert steps == [(1, [0, 1]), (2, [0, 1]), (3, [0, 1])]
    assert output.peak_memory == max(phase.peak_memory for phase in output.timings) > 0
    assert all(phase.seconds > 0 for phase in output.timings)


def test_networks_are_released(pipe, loads):
    pipe(FOX, **SETTINGS)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    pipe(CAT, **SETTINGS)
    gc.collect()
    assert loads == PHASES * 2
    assert mx.get_active_memory() <= before


def test_networks_are_loaded_once_for_many_images(pipe, loads, monkeypatch):
    monkeypatch.setattr(memory, "_TOKENS_PER_PASS", 25)  # two images of 12 tokens
    heard: list[Progress] = []
    request = pipe.request([FOX, CAT, FOX], height=48, width=64, steps=2, images_per_prompt=3, max_sequence_length=40)
    pipe.run(request, on_progress=heard.append)
    assert loads == PHASES
    assert heard[0].total == 2  # the fox is encoded once
    steps = [(p.done, p.step.number, p.images) for p in heard if p.step is not None]
    passes = [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    assert steps == [(2 * i + n, n, images) for i, images in enumerate(passes) for n in (1, 2)]
    assert {p.total for p in heard if p.phase == "transformer"} == {10}


def test_images_do_not_depend_on_the_passes(pipe, monkeypatch):
    together = latents(pipe, [FOX, CAT], num_images_per_prompt=2)
    monkeypatch.setattr(memory, "_TOKENS_PER_PASS", 1)
    assert_close(latents(pipe, [FOX, CAT], num_images_per_prompt=2), together)


@pytest.mark.parametrize("name", ["pipe", "guided"])
def test_an_image_of_a_batch_equals_a_single_run(name, request):
    pipe = request.getfixturevalue(name)
    settings = {"guidance_scale": 3.0}
    batch = pipe([FOX, CAT], num_images_per_prompt=2, output_type="latent", **settings, **SETTINGS)
    assert batch.seeds == [5, 6, 7, 8]
    for i, prompt in enumerate([FOX, FOX, CAT, CAT]):
        single = latents(pipe, prompt, seed=5 + i, **settings)
        assert_close(batch.images[i], single[0])
    assert np.abs(batch.images[0] - batch.images[1]).max() > 0.1
    assert np.abs(latents(pipe, FOX, seed=7, **settings)[0] - batch.images[2]).max() > 1e-3


def test_the_same_seed_gives_the_same_bytes(pipe):
    np.testing.assert_array_equal(latents(pipe, FOX), latents(pipe, FOX))


def test_a_random_seed_is_told(pipe):
    settings = SETTINGS | {"seed": None}
    output = pipe(FOX, output_type="latent", **settings)
    np.testing.assert_array_equal(latents(pipe, FOX, seed=output.seeds[0]), output.images)


def test_output_types(pipe):
    images = pipe([FOX, CAT], **SETTINGS).images
    arrays = pipe([FOX, CAT], output_type="np", **SETTINGS).images
    states = pipe([FOX, CAT], output_type="latent", **SETTINGS).images
    assert [(image.mode, image.size) for image in images] == [("RGB", (64, 48))] * 2
    assert isinstance(images[0], Image.Image)
    assert (arrays.dtype, arrays.shape) == (np.float32, (2, 48, 64, 3))
    assert 0 <= arrays.min() < 0.2 < 0.8 < arrays.max() <= 1
    assert (states.dtype, states.shape) == (np.float32, (2, 4, 6, 8))
    for image, array in zip(images, arrays, strict=True):
        np.testing.assert_array_equal(np.array(image), np.round(array * 255))


@pytest.mark.parametrize("prompt", [FOX, [FOX, "", CAT]], ids=str)
def test_prompts_can_be_encoded_beforehand(prompt, pipe, loads):
    embeds = pipe.encode_prompt(prompt, max_sequence_length=40)
    assert embeds.shape == (1 if prompt == FOX else 3, 40, SHALLOW_TEXT.output_size)
    images = latents(pipe, prompt_embeds=embeds)
    assert loads == ["text_encoder", "transformer", "vae"]
    np.testing.assert_array_equal(images, latents(pipe, prompt))


def test_encoded_prompts_with_guidance_need_the_empty_prompt(guided, loads):
    embeds = guided.encode_prompt(FOX, max_sequence_length=40)
    images = latents(guided, prompt_embeds=embeds, guidance_scale=3.0)
    assert loads == ["text_encoder", *PHASES]
    np.testing.assert_array_equal(images, latents(guided, FOX, guidance_scale=3.0))
    before = len(loads)
    unguided = latents(guided, prompt_embeds=np.array(embeds), guidance_scale=1.0)
    assert loads[before:] == ["transformer", "vae"]
    assert np.abs(images - unguided).max() > 0.01


def test_guidance_of_a_distilled_model_is_ignored(pipe):
    np.testing.assert_array_equal(latents(pipe, FOX, guidance_scale=5.0), latents(pipe, FOX))


def test_a_prompt_that_is_cut_is_told(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe(FOX + " in the snow" * 9, **SETTINGS)
    assert "the model sees the first 40" in caplog.text


def test_given_noise(pipe):
    noise = initial_noise([5], 16, 3, 4)
    expected = latents(pipe, FOX)
    np.testing.assert_array_equal(latents(pipe, FOX, seed=99, latents=noise), expected)
    np.testing.assert_array_equal(latents(pipe, FOX, latents=mx.array(noise)), expected)
    np.testing.assert_array_equal(latents(pipe, FOX, latents=noise.tolist()), expected)
    rounded = mx.array(noise).astype(mx.bfloat16)
    assert_close(latents(pipe, FOX, latents=rounded), latents(pipe, FOX, latents=rounded.astype(mx.float32)))


@pytest.mark.parametrize(
    "kind", [mx.array, np.array, lambda x: mx.array(x).astype(mx.bfloat16)], ids=["mx", "np", "16"]
)
def test_a_callback_may_change_the_latents(kind, pipe):
    calls = []

    def callback(caller, step: int, timestep: float, tensors: dict) -> dict | None:
        calls.append((caller, step, round(timestep), tensors["latents"].shape))
        return {"latents": kind(np.zeros((1, 12, 16), dtype=np.float32))} if step == 1 else None

    changed = latents(pipe, FOX, callback_on_step_end=callback, sigmas=[1.0, 0.5])
    assert [call[:2] for call in calls] == [(pipe, 0), (pipe, 1)]
    assert calls[0][2:] == (1000, (1, 12, 16))
    assert 500 < calls[1][2] < 1000
    vae = pipe.checkpoint.components["vae"].load(mx.float32)
    empty = np.array(vae.from_tokens(mx.zeros((1, 12, 16)), 3, 4).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(changed, empty)


@pytest.mark.parametrize(
    ("returned", "match"),
    [
        ({"latents": np.zeros((1, 12, 8), np.float32)}, r"returned latents \(1, 12, 8\); give finite numbers of the"),
        ({"latents": np.full((1, 12, 16), np.nan, np.float32)}, "give finite numbers"),
        ({"latents": "much"}, "a callback returned str for latents"),
        (np.zeros((1, 12, 16)), "a callback returned ndarray; give a dictionary of latents or None"),
    ],
)
def test_what_a_callback_returns_is_checked(returned, match, pipe):
    with pytest.raises(InputError, match=match):
        pipe(FOX, callback_on_step_end=lambda *step: returned, **SETTINGS)


def test_encoded_prompts_can_be_used_in_another_thread(pipe):
    with ThreadPoolExecutor(1) as executor:
        embeds = executor.submit(pipe.encode_prompt, FOX, 40).result()
    np.testing.assert_array_equal(latents(pipe, prompt_embeds=embeds), latents(pipe, FOX))


def test_a_callback_may_cancel(pipe, loads):
    def cancel(*args):
        raise KeyboardInterrupt

    expected = latents(pipe, FOX)
    with pytest.raises(KeyboardInterrupt):
        pipe(FOX, callback_on_step_end=cancel, **SETTINGS)
    assert loads == [*PHASES, "text_encoder", "transformer"]
    np.testing.assert_array_equal(latents(pipe, FOX), expected)


def test_preview(pipe):
    states = {}
    request = pipe.request([FOX], height=48, width=64, steps=2, seed=5, max_sequence_length=40)
    output = pipe.run(request, on_progress=lambda p: states.update({p.step.number: p.step}) if p.step else None)
    (early,), (late,) = (pipe.preview(request, states[number].estimate) for number in (1, 2))
    assert late == output.images[0] != early


EMBEDS = np.zeros((1, 40, 192), dtype=np.float32)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "give either prompt or prompt_embeds"),
        ({"prompt": FOX, "prompt_embeds": EMBEDS}, "give either prompt or prompt_embeds"),
        ({"prompt": []}, "there is no prompt"),
        ({"prompt_embeds": EMBEDS[:0]}, "there is no prompt"),
        ({"prompt_embeds": EMBEDS[0]}, r"prompt_embeds must be \[prompts, tokens, 192\], got \(40, 192\)"),
        ({"prompt_embeds": EMBEDS[..., :64]}, r"prompt_embeds must be .* got \(1, 40, 64\)"),
        ({"prompt_embeds": np.full((1, 40, 192), np.nan, np.float32)}, r"prompt_embeds \(1, 40, 192\) must be finite"),
        ({"prompt_embeds": np.zeros((1, 0, 192), np.float32)}, "for one token at least"),
        ({"prompt": FOX, "latents": np.full((1, 16, 3, 4), np.inf)}, "latents have values that are not finite"),
        ({"prompt": FOX, "output_type": "pic"}, "unknown output_type 'pic'; choose one of pil, np, pt, latent"),
        (
            {"prompt": FOX, "latents": np.zeros((1, 16, 4, 3))},
            r"latents have shape \(1, 16, 4, 3\), this run needs \(1",
        ),
        ({"prompt": [FOX, CAT], "latents": np.zeros((1, 16, 3, 4))}, r"needs \(2, 16, 3, 4\)"),
        ({"prompt": FOX, "latents": np.zeros((1, 16, 3, 4), np.complex64)}, "latents must be real numbers"),
        ({"prompt_embeds": "much"}, "prompt_embeds must be an array, got str"),
        ({"prompt": FOX, "height": 50}, "height 50 must be a positive multiple of 16"),
        ({"prompt": FOX, "num_inference_steps": 0}, "num_inference_steps must be 1 to 1000"),
        ({"prompt": FOX, "num_images_per_prompt": 0}, "num_images_per_prompt must be 1 or more"),
        ({"prompt": FOX, "guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"prompt": FOX, "sigmas": [0.5, 1.0]}, "2 sigmas|sigmas must fall"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_told_before_anything_is_loaded(settings, match, pipe, loads):
    with pytest.raises(InputError, match=match):
        pipe(**{**SETTINGS, **settings})
    assert loads == []


def test_wrong_lengths_of_encoded_prompts(pipe, loads):
    with pytest.raises(InputError, match="max_sequence_length must be 1 to 48, got 600"):
        pipe.encode_prompt(FOX, max_sequence_length=600)
    assert loads == []


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        ({"dtype": "int8"}, InputError, "unknown dtype 'int8'; choose one of float32, bfloat16, float16"),
        ({"quant": "int8"}, InputError, "unknown quantization 'int8'; choose one of bf16, qint8, qint6, mixed4, qint4"),
        ({"text_quant": "fp8"}, InputError, "unknown quantization 'fp8'"),
    ],
)
def test_wrong_settings_of_a_model(settings, kind: type[Flux2Error], match, folder):
    with pytest.raises(kind, match=match):
        Flux2Pipeline.from_pretrained(folder, **settings)


def test_stored_quantization_can_not_be_changed(official, tmp_path):
    stored = convert_shallow(official, tmp_path / "stored", "qint8", "qint4")
    pipe = Flux2Pipeline.from_pretrained(stored)
    assert (pipe.quant, pipe.text_quant) == ("qint8", "qint4")
    assert Flux2Pipeline.from_pretrained(stored, quant="qint8").text_quant == "qint4"
    for wanted in ("qint4", "bf16"):
        with pytest.raises(InputError, match=f"the transformer is stored as qint8, which can't become {wanted}"):
            Flux2Pipeline.from_pretrained(stored, quant=wanted)
    with pytest.raises(InputError, match="the text encoder is stored as qint4, which can't become qint8; convert"):
        Flux2Pipeline.from_pretrained(stored, text_quant="qint8")


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ({}, ("bf16", "bf16")),
        ({"quant": "bf16"}, ("bf16", "qint8")),
        ({"quant": "qint8"}, ("qint8", "qint8")),
        ({"quant": "qint4"}, ("qint4", "qint4")),
        ({"quant": "qint4", "text_quant": "qint8"}, ("qint4", "qint8")),
        ({"text_quant": "qint4"}, ("bf16", "qint4")),
    ],
    ids=str,
)
def test_quantizing_at_loading(asked, got, folder):
    pipe = Flux2Pipeline.from_pretrained(folder, **asked)
    assert (pipe.quant, pipe.text_quant) == got


def test_a_stored_and_a_loaded_quantization_give_the_same_image(official, folder, tmp_path):
    stored = Flux2Pipeline.from_pretrained(convert_shallow(official, tmp_path / "stored", "qint8", "qint8"))
    loaded = Flux2Pipeline.from_pretrained(folder, quant="qint8")
    images = latents(stored, FOX)
    np.testing.assert_array_equal(images, latents(loaded, FOX))
    assert np.abs(images - latents(Flux2Pipeline.from_pretrained(folder), FOX)).max() > 1e-4


@pytest.mark.parametrize(
    ("gpu", "asked", "got"),
    [
        (False, None, mx.float32),
        (True, None, mx.bfloat16),
        (True, "float16", mx.float16),
        (False, "bfloat16", mx.bfloat16),
    ],
)
def test_dtype(gpu, asked, got, folder, monkeypatch):
    with monkeypatch.context() as pretended:
        pretended.setattr(device, "on_gpu", lambda: gpu)
        pretended.setattr(device, "device_memory", lambda: 2**40)
        pipe = Flux2Pipeline.from_pretrained(folder, dtype=asked)
    assert pipe.dtype == got
    assert pipe.encode_prompt(FOX, max_sequence_length=20).dtype == got


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_precision_is_close(dtype, tolerance, folder, pipe):
    exact, half = latents(pipe, FOX), latents(Flux2Pipeline.from_pretrained(folder, dtype=dtype), FOX)
    assert np.linalg.norm(half - exact) <= tolerance * np.linalg.norm(exact)


def test_an_official_folder_is_converted_once(official, tmp_path, monkeypatch):
    settings = {"variant": SHALLOW_VARIANT, "models_dir": tmp_path / "models"}
    pipe = Flux2Pipeline.from_pretrained(official, **settings)
    assert (pipe.quant, pipe.text_quant) == ("bf16", "qint8")
    assert pipe.checkpoint.folder.parent == tmp_path / "models"
    written = (pipe.checkpoint.folder / "flux2.json").stat().st_mtime_ns
    again = Flux2Pipeline.from_pretrained(official, **settings)
    assert again.checkpoint.folder == pipe.checkpoint.folder
    assert (again.checkpoint.folder / "flux2.json").stat().st_mtime_ns == written
    finetune = save_small(tmp_path / "model", text=SHALLOW_TEXT, seed=1)
    other = Flux2Pipeline.from_pretrained(finetune, **settings)
    assert other.checkpoint.folder != pipe.checkpoint.folder
    assert np.abs(latents(other, FOX) - latents(pipe, FOX)).max() > 0.01
