"""What somebody who knows diffusers types: it runs as there, or one line says what to write instead."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import save_small
from PIL import Image

from flux2_mlx import Flux2Error, Flux2Pipeline, InputError

PROMPT = "a red ring on a white background"
SIZE = {"height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe() -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8))


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def test_a_text_to_image_script(pipe):
    model = Flux2Pipeline.from_pretrained("demo", torch_dtype=torch.float32)
    model.to("cpu")
    model.enable_model_cpu_offload()
    model.enable_attention_slicing()
    image = model(prompt=PROMPT, guidance_scale=1.0, generator=generator(), **SIZE).images[0]
    assert image == pipe(PROMPT, seed=7, **SIZE).images[0]


def test_results_without_a_dict_and_by_index(pipe):
    (images,) = pipe(PROMPT, seed=7, return_dict=False, **SIZE)
    output = pipe(PROMPT, seed=7, **SIZE)
    assert images == output[0] == output["images"] == output.images
    assert type(pipe(PROMPT, seed=7, return_dict=False, **SIZE)) is tuple


def test_a_generator_for_each_image(pipe):
    batch = pipe([PROMPT, "a cat"], generator=[generator(3), generator(11)], **SIZE)
    assert batch.seeds == [3, 11]
    again = pipe([PROMPT, "a cat"], seed=[3, 11], **SIZE)
    assert batch.images == again.images
    alone = pipe("a cat", seed=11, **SIZE).images[0]
    assert np.abs(array(alone).astype(int) - array(batch.images[1])).max() <= 1


def test_images_as_tensors(pipe):
    tensors = pipe(PROMPT, seed=[7, 8], num_images_per_prompt=2, output_type="pt", **SIZE).images
    assert (tensors.dtype, tuple(tensors.shape)) == (torch.float32, (2, 3, 64, 64))
    arrays = pipe(PROMPT, seed=[7, 8], num_images_per_prompt=2, output_type="np", **SIZE).images
    np.testing.assert_array_equal(tensors.permute(0, 2, 3, 1).numpy(), arrays)
    assert 0 <= tensors.min() < tensors.max() <= 1


def test_an_edit_with_the_image_first(pipe, picture):
    expected = pipe("make it red", image=picture, seed=7, num_inference_steps=2).images
    assert pipe(picture, "make it red", seed=7, num_inference_steps=2).images == expected
    assert pipe([picture], "make it red", seed=7, num_inference_steps=2).images == expected
    assert pipe("make it red", picture, seed=7, num_inference_steps=2).images == expected


def test_an_edit_with_the_name_of_the_image_first(pipe, picture, tmp_path):
    name = str(tmp_path / "picture.png")
    picture.save(name)
    expected = pipe("make it red", image=picture, seed=7, num_inference_steps=2).images
    assert pipe(name, "make it red", seed=7, num_inference_steps=2).images == expected
    assert pipe("make it red", name, seed=7, num_inference_steps=2).images == expected
    with pytest.raises(InputError, match="give either prompt or prompt_embeds"):
        pipe(name)


def kinds(picture: Image.Image, folder: Path) -> dict[str, Any]:
    picture.save(folder / "picture.png")
    tensor = torch.from_numpy(array(picture).copy()).permute(2, 0, 1)
    return {
        "str": str(folder / "picture.png"),
        "Path": folder / "picture.png",
        "list of paths": [folder / "picture.png"],
        "bytes": array(picture),
        "floats": array(picture).astype(np.float32) / 255,
        "batch": array(picture)[None] / 255,
        "tensor": tensor,
        "float tensor": tensor[None].float() / 255,
        "half": (tensor.double() / 255).to(torch.float64),
    }


@pytest.mark.parametrize(
    "kind", ["str", "Path", "list of paths", "bytes", "floats", "batch", "tensor", "float tensor", "half"]
)
def test_an_edit_of_any_kind_of_image(kind, pipe, picture, tmp_path):
    settings = {"seed": 7, "num_inference_steps": 1}
    given = kinds(picture, tmp_path)[kind]
    assert pipe("red", image=given, **settings).images == pipe("red", image=picture, **settings).images


def test_masks_of_any_kind(pipe, picture):
    marks = np.zeros((64, 80), bool)
    marks[:32] = True
    settings = {"image": picture, "seed": 7, "num_inference_steps": 1}
    expected = pipe("red", mask_image=Image.fromarray(marks.astype(np.uint8) * 255), **settings).images
    for mask in (marks, marks.astype(np.float32), torch.from_numpy(marks)[None].float(), torch.from_numpy(marks)):
        assert pipe("red", mask_image=mask, **settings).images == expected


def test_latents_are_decoded_as_a_run_does(pipe):
    latents = pipe(PROMPT, seed=[7, 8], num_images_per_prompt=2, output_type="latent", **SIZE).images
    expected = pipe(PROMPT, seed=[7, 8], num_images_per_prompt=2, **SIZE).images
    assert pipe.decode(latents) == expected
    assert pipe.decode(torch.from_numpy(latents)) == expected
    np.testing.assert_array_equal(pipe.decode(latents, output_type="np").shape, (2, 64, 64, 3))


def test_callbacks_with_tensor_inputs(pipe):
    heard = []

    def callback(pipe: Flux2Pipeline, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        heard.append((step, list(tensors)))
        return tensors

    pipe(
        PROMPT,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents"],
        attention_kwargs=None,
        text_encoder_out_layers=pipe.checkpoint.components["text_encoder"].config.out_layers,
        **SIZE,
    )
    assert heard == [(0, ["latents"]), (1, ["latents"])]


def test_a_bar_of_steps(pipe, capfd):
    try:
        pipe(PROMPT, **SIZE)
        assert "2/2" in capfd.readouterr().err
        pipe.set_progress_bar_config(desc="drawing")
        pipe(PROMPT, **SIZE)
        assert "drawing: 100%" in capfd.readouterr().err
        pipe.set_progress_bar_config(disable=True)
        pipe(PROMPT, **SIZE)
        pipe.run(pipe.request([PROMPT], width=64, height=64, steps=1))
        assert capfd.readouterr() == ("", "")
    finally:
        pipe.set_progress_bar_config()


def test_a_bar_of_a_conversion(tmp_path, capfd):
    official = save_small(tmp_path / "official")
    for number, progress in enumerate((False, True)):
        capfd.readouterr()
        Flux2Pipeline.from_pretrained(
            official, variant="klein-4b", models_dir=tmp_path / str(number), progress=progress
        )
        captured = capfd.readouterr()
        assert captured.out == ""
        assert ("convert: 100%" in captured.err) == progress


def used() -> torch.Generator:
    one = generator()
    torch.randn(4, generator=one)
    return one


WRONG = [
    ({"genrator": 1}, "has no argument 'genrator'; did you mean generator?"),
    ({"num_inference_step": 4}, "did you mean num_inference_steps?"),
    ({"true_cfg_scale": 4}, "write guidance_scale="),
    ({"image_reference": 1}, r"give references after the image: image=\[image, \*references\]"),
    ({"wholly_unknown": 1}, "has no argument 'wholly_unknown'; choose from prompt, image, mask_image"),
    ({"generator": 42}, "generator must be a torch.Generator, got int 42; write seed=42"),
    ({"generator": np.random.default_rng(0)}, "generator must be a torch.Generator, got Generator"),
    ({"generator": generator(), "seed": 7}, "give either seed or generator"),
    ({"generator": generator(), "num_images_per_prompt": 2}, "1 generators don't go with 2 images; give one each"),
    ({"generator": [generator()] * 3}, "3 generators don't go with 1 images"),
    ({"generator": used()}, "has been drawn from before, .* or write seed=7"),
    ({"seed": [1, 2]}, "2 seeds don't go with 1 images; give one for each image"),
    ({"seed": [2**64]}, "seeds must be 0 to"),
    ({"seed": "7"}, "seed must be a whole number, got '7'"),
    ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, r"callbacks get latents only; write \['latents'\]"),
    ({"callback_on_step_end": 3}, "callback_on_step_end must be a function, got 3"),
    (
        {"attention_kwargs": {"masks": 1}},
        "attention_kwargs hold {'masks': 1}; of these there is only {'scale': number}",
    ),
    ({"text_encoder_out_layers": (9, 18, 27)}, "for this model; leave them out"),
    ({"output_type": "pic"}, "unknown output_type 'pic'; choose one of pil, np, pt, latent"),
    ({"output_type": None}, "unknown output_type None"),
    ({"prompt": 3}, "prompt must be text or a list of texts, got int 3"),
    ({"prompt": ["a", 3]}, "prompt must be text or a list of texts, got a list of int, str"),
    ({"image": 3}, "image must be a PIL image, a path, an array, or a list of those, got int 3"),
    ({"image": "nothing.png"}, r"can't read nothing\.png"),
    ({"image": "https://example.org/cat.png"}, "is an address; download https://example.org/cat.png and give the file"),
    ({"image": np.zeros((64, 64, 5))}, r"image of shape \(64, 64, 5\) must be \[H, W\], \[H, W, C\] or \[B, H, W, C\]"),
    ({"image": torch.zeros(64, 64, 3)}, r"image of shape \(64, 64, 3\) must be \[H, W\], \[C, H, W\] or"),
    ({"image": np.full((64, 64, 3), 200.0)}, "image has numbers from 200 to 200, not 0 to 1"),
    ({"image": -torch.ones(3, 64, 64)}, "image has numbers from -1 to -1, not 0 to 1"),
    ({"image": np.full((64, 64, 3), "x")}, "image must hold numbers, got <U1"),
    ({"image": np.zeros((64, 64, 3)), "padding_mask_crop": "x", "mask_image": np.ones((64, 64))}, "padding_mask_crop"),
    ({"image": np.zeros((64, 64, 3)), "mask_image": np.ones((2, 64, 64, 1))}, "2 masks are too many"),
    ({"latents": "x"}, "latents must be an array, got str"),
]


@pytest.mark.parametrize(("settings", "match"), WRONG, ids=[match[:40] for _, match in WRONG])
def test_one_line_says_what_to_write(settings, match, pipe, loads):
    with pytest.raises(InputError, match=match) as caught:
        pipe(**{"prompt": PROMPT, **SIZE, **settings})
    assert "\n" not in str(caught.value)
    assert loads == []


def test_a_generator_can_not_be_used_twice(pipe):
    one = generator()
    pipe(PROMPT, generator=one, **SIZE)
    with pytest.raises(InputError, match="drawn from before"):
        pipe(PROMPT, generator=one, **SIZE)


def test_too_many_arguments_without_names(pipe):
    with pytest.raises(InputError, match="too many positional arguments; give the others by name"):
        pipe(PROMPT, None, 64, 64)


def test_without_pytorch(pipe, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(InputError, match="'pt' needs PyTorch, which is not installed; choose 'np'"):
        pipe(PROMPT, output_type="pt", **SIZE)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"torch_dtype": torch.int8}, "unknown dtype 'int8'"),
        ({"dtype": 5}, "dtype must be float32, bfloat16 or float16, got int 5"),
        ({"dtype": "float32", "torch_dtype": torch.float32}, "give either dtype or torch_dtype"),
        ({"device_map": "auto"}, "has no argument 'device_map'; leave it out"),
        ({"quants": "qint8"}, "did you mean quant?"),
        ({"variant": "fp16"}, "leave out variant='fp16': here it names a model"),
        ({"models_dir": 5}, "models_dir must be a folder, got int"),
        ({"memory_limit": [1]}, "memory_limit must be a size such as 12GB"),
        ({"quant": 8}, "quant must be text, got int 8"),
    ],
    ids=str,
)
def test_wrong_settings_of_a_model(settings, match):
    with pytest.raises(InputError, match=match):
        Flux2Pipeline.from_pretrained("demo", **settings)


def test_a_model_that_is_no_name():
    with pytest.raises(InputError, match="a model is named by a text or a path, not by NoneType"):
        Flux2Pipeline.from_pretrained(None)


@pytest.mark.parametrize("name", ["fuse_lora", "save_pretrained", "vae", "transformer", "scheduler"])
def test_what_a_pipeline_lacks(name, pipe):
    assert not hasattr(pipe, name)
    with pytest.raises(Flux2Error, match=f"a pipeline has no '{name}': "):
        getattr(pipe, name)
    with pytest.raises(AttributeError):
        _ = pipe.nothing_at_all


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("cuda",), "MLX computes on 'cpu' here, not on 'cuda'; leave .to"),
        ((torch.float16,), "the dtype is chosen when a model is opened"),
        ((None, torch.float16), "the dtype is chosen when a model is opened"),
    ],
)
def test_moving_a_pipeline(arguments, match, pipe):
    assert pipe.to("cpu") is pipe is pipe.to()
    with pytest.raises(InputError, match=match):
        pipe.to(*arguments)


@pytest.mark.parametrize(
    ("latents", "match"),
    [
        (np.zeros((1, 3, 8, 8)), r"latents have shape \(1, 3, 8, 8\), this run needs \(any, \d+, any, any\)"),
        (np.zeros((4, 8, 8)), "latents have shape"),
        (np.zeros((1, 4, 7, 8)), "height 56 must be a positive multiple of 16|latents have shape"),
        ("x", "latents must be an array, got str"),
    ],
)
def test_what_can_not_be_decoded(latents, match, pipe, loads):
    with pytest.raises(InputError, match=match):
        pipe.decode(latents)
    assert loads == []


def test_a_pipeline_says_what_it_is(pipe):
    assert repr(pipe).startswith("Flux2Pipeline('demo', variant='demo', quant='bf16', text_quant='bf16', dtype='float3")
