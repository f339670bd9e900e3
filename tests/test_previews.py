"""Images between the steps: the linear map, TAEF2, and what they take."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from helpers.cli_runner import PROMPT
from helpers.decoders import save_narrow, save_tiny
from PIL import Image

from flux2_mlx import Flux2Pipeline
from flux2_mlx.errors import InputError
from flux2_mlx.previews import sketches
from flux2_mlx.store import find_decoder
from flux2_mlx.vae import patches


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return find_decoder(save_tiny(tmp_path_factory.mktemp("tiny") / "tiny.safetensors"))


@pytest.fixture
def pipe():
    opened = Flux2Pipeline.from_pretrained("demo", progress=False, prompt_cache=False, keep=False)
    opened.set_progress_bar_config(disable=True)
    return opened


def psnr(first: Image.Image, second: Image.Image) -> float:
    difference = np.asarray(first, float) - np.asarray(second, float)
    return float(-20 * np.log10(np.sqrt(np.square(difference).mean()) / 255))


def last_step(
    pipe: Flux2Pipeline, previews: bool, size: int = 32, steps: int = 2, call: str = "preview", prompt=PROMPT
):
    """What a run with such previews gives after its last step, the tokens then, and the run's output."""
    kept = {}

    def hear(progress):
        if progress.step is not None:
            make = getattr(progress, call)
            kept.update(images=make and make(), tokens=progress.step.estimate)

    request = pipe.request([prompt], width=size, height=size, steps=steps, seed=7)
    output = pipe.run(request, previews=previews, on_progress=hear)
    return kept["images"], kept["tokens"], output


def test_a_sketch_is_there_after_every_step_and_resembles_the_image(pipe):
    square = "a large green square on a white background"
    (sketch,), tokens, output = last_step(pipe, previews=False, size=128, steps=4, call="sketch", prompt=square)
    assert sketch.size == (16, 16)
    small = output.images[0].resize(sketch.size, Image.Resampling.BOX)
    ground = Image.new("RGB", sketch.size, tuple(np.asarray(small).mean((0, 1)).astype(int)))
    assert psnr(sketch, small) > psnr(ground, small) + 1
    assert sketches(tokens, 128, 128) == [sketch]


def test_the_map_of_flux2_has_each_latent_at_its_place():
    """Channel 3 is brightness: one latent stands out as one pixel, whose place in its 2×2 patch counts."""
    latents = np.zeros((1, 4, 6, 32), np.float32)
    latents[0, 3, 2, 3] = 2
    (sketch,) = sketches(patches(mx.array(latents)), 48, 32)
    pixels = np.asarray(sketch, int)
    assert pixels.shape == (4, 6, 3)
    ground = pixels[0, 0]
    assert np.abs(ground - 255 * np.array([0.487, 0.488, 0.451])).max() <= 1
    bright = (pixels != ground).any(-1)
    assert np.argwhere(bright).tolist() == [[3, 2]]
    assert ((pixels[3, 2] - ground) > 40).all()


@pytest.mark.parametrize("shape", [(1, 6, 128), (1, 8, 128), (6, 128), (1, 6, 64)])
def test_sketches_of_other_tokens_are_refused(shape):
    if shape == (1, 6, 128):
        assert sketches(mx.zeros(shape), 48, 32)[0].size == (6, 4)
    else:
        with pytest.raises(InputError, match="are not those of 48×32 pixels"):
            sketches(mx.zeros(shape), 48, 32)


def test_previews_by_the_linear_map_have_the_images_size_and_take_nothing(pipe):
    request = pipe.request([PROMPT], width=32, height=32, steps=2, seed=7)
    plain = pipe.plan(request)
    pipe.preview_with("linear")
    assert pipe.plan(request, previews=True).phases == plain.phases
    (image,), tokens, _ = last_step(pipe, previews=True)
    assert image.size == (32, 32)
    assert psnr(image.resize((4, 4), Image.Resampling.BOX), sketches(tokens, 32, 32)[0]) > 25


def test_previews_by_taef2_are_planned_beside_the_transformer(pipe, tiny):
    request = pipe.request([PROMPT], width=32, height=32, steps=2, seed=7)
    plain = pipe.plan(request)
    pipe.preview_with(tiny)
    planned = pipe.plan(request, previews=True)
    assert not planned.beside
    assert planned.phase("transformer").peak_memory > plain.phase("transformer").peak_memory
    assert pipe.plan(request).phases == plain.phases
    gc.collect()
    held = mx.get_active_memory()  # by other tests
    (image,), _, output = last_step(pipe, previews=True)
    assert image.size == (32, 32)
    (peak,) = (phase.peak_memory for phase in output.timings if phase.name == "transformer")
    assert peak - held <= planned.phase("transformer").peak_memory <= 1.25 * (peak - held)


def test_where_taef2_has_no_room_a_run_without_it_is_advised(pipe, tiny):
    request = pipe.request([PROMPT], width=64, height=64, steps=2, seed=7)
    pipe.memory_limit = pipe.plan(request).peak_memory
    pipe.preview_with(tiny)
    with pytest.raises(InputError, match="without images between the steps it would fit"):
        pipe.plan(request, previews=True)


def test_taef2_gives_the_images_that_it_decodes_as_a_decoder(pipe, tiny):
    pipe.preview_with(tiny)
    (preview,), *_ = last_step(pipe, previews=True)
    other = Flux2Pipeline.from_pretrained("demo", progress=False, prompt_cache=False, decoder=tiny.path)
    request = other.request([PROMPT], width=32, height=32, steps=2, seed=7)
    image = other.run(request).images[0]
    assert np.abs(np.asarray(preview, int) - np.asarray(image, int)).max() <= 1


def test_previews_of_a_masked_picture_keep_the_rest(pipe):
    picture, mask = Image.new("RGB", (64, 64), "orange"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    edit = pipe.edit([picture], mask=mask)
    request = pipe.request([PROMPT], edit=edit, steps=2, seed=1)
    pipe.preview_with("linear")
    seen = []
    pipe.run(request, edit, previews=True, on_progress=lambda x: seen.extend(x.preview() if x.preview else []))
    assert all(np.array_equal(np.asarray(image)[:, 32:], np.asarray(picture)[:, 32:]) for image in seen)
    assert len(seen) == 2


def test_without_previews_planned_there_is_only_the_sketch(pipe, tiny):
    pipe.preview_with(tiny)
    assert last_step(pipe, previews=False)[0] is None
    pipe.preview_with(None)
    assert last_step(pipe, previews=True)[0][0].size == (32, 32)


def test_what_can_make_no_previews_is_refused(pipe, tmp_path):
    narrow = find_decoder(save_narrow(tmp_path / "narrow.safetensors"))
    for wrong in ("cubic", narrow, 3):
        with pytest.raises(InputError, match=r"previews of demo can't be made with .*; give TAEF2, 'linear' or None"):
            pipe.preview_with(wrong)
    with pytest.raises(InputError, match="is for latents of 32 channels"):
        pipe.preview_with(find_decoder(save_tiny(tmp_path / "taef2.safetensors", 32)))
