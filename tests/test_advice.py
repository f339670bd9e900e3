"""What the refusal of a run that does not fit into memory says would fit, and that it does."""

import re

import pytest
from PIL import Image

from flux2_mlx import Flux2Pipeline
from flux2_mlx.advice import checked_plan, workload
from flux2_mlx.config import VARIANTS
from flux2_mlx.errors import InputError
from flux2_mlx.networks import Networks
from flux2_mlx.request import Request

GIB = 2**30


def refusal(pipe: Flux2Pipeline, images=(), **settings) -> str:
    edit = pipe.edit(images)
    with pytest.raises(InputError) as caught:
        checked_plan(pipe.networks, workload(pipe.request(["a"], edit=edit, **settings), edit), pipe.memory_limit)
    return str(caught.value)


def test_what_would_fit_is_said():
    limit = 60_000_000
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, memory_limit=limit)
    message = refusal(pipe, width=512, height=256)
    width, height = map(int, message.partition("an image of ")[2].partition(" would fit")[0].split("×"))
    assert "the VAE needs" in message
    assert pipe.plan(pipe.request(["a"], width=width, height=height)).fits
    refusal(pipe, width=width + 16, height=(width + 16) // 32 * 16 or 16)

    pictures = [Image.new("RGB", (512, 512))] * 3
    side = int(refusal(pipe, pictures, width=128, height=128).partition("3 references of ")[2].partition("×")[0])
    fitting = pipe.edit([Image.new("RGB", (side, side))] * 3)
    assert pipe.plan(pipe.request(["a"], edit=fitting, width=128, height=128), fitting).fits
    tiny = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, memory_limit=10**6)
    assert refusal(tiny, width=128, height=128).endswith("no size fits; choose a smaller model or a higher limit")


def test_the_smallest_image_may_fit():
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)
    limit = pipe.plan(pipe.request(["a"], width=48, height=48)).peak_memory
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, memory_limit=limit)
    assert refusal(pipe, width=128, height=128).endswith("an image of 48×48 would fit")


def test_fewer_images_may_fit():
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)
    limit = pipe.plan(pipe.request(["a"], width=64, height=64, images_per_prompt=20)).peak_memory
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, memory_limit=limit)
    message = refusal(pipe, width=64, height=64, images_per_prompt=300)
    count = int(re.search(r"; (\d+) at a time would fit", message)[1])
    assert 20 <= count < 300
    assert pipe.plan(pipe.request(["a"], width=64, height=64, images_per_prompt=count)).fits


def test_without_previews_it_may_fit():
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)
    request = pipe.request(["a"], width=256, height=192)
    limit = pipe.plan(request).peak_memory
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, memory_limit=limit)
    with pytest.raises(InputError, match="; without images between the steps it would fit"):
        checked_plan(pipe.networks, workload(request, previews=True), pipe.memory_limit)


@pytest.mark.parametrize(
    ("limit", "text_quant", "quants"),
    [
        (5, None, ("qint8", "qint8")),
        (3, None, ("qint6", "qint8")),
        (1.8, None, ("qint4", "qint6")),
        (5, "bf16", ("qint8", "bf16")),
    ],
)
def test_fewer_bits_may_fit(limit, text_quant, quants):
    def networks(quant: str, text_quant: str | None) -> Networks:
        return Networks.open(VARIANTS["dev"], quant=quant, text_quant=text_quant, dtype="bfloat16")

    request = Request.checked(VARIANTS["dev"], 16, ["a"], width=16, height=16)
    expected = "no size fits, but converted with quant='{}', text_quant='{}' it would".format(*quants)
    with pytest.raises(InputError, match=expected):
        checked_plan(networks("bf16", text_quant), workload(request), int(limit * GIB))
    assert networks(*quants).needs(workload(request)).plan(int(limit * GIB)).fits


@pytest.mark.parametrize("painted_over", [False, True])
def test_smaller_pictures_and_a_smaller_image_may_fit(painted_over):
    pipe = Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False, memory_limit=60_000_000)
    picture = Image.new("RGB", (512, 384), "teal")
    edit = pipe.edit([picture] * 2, on_canvas=painted_over)
    with pytest.raises(InputError, match="; pictures and an image of at most ") as caught:
        checked_plan(pipe.networks, workload(pipe.request(["a"], edit=edit), edit), pipe.memory_limit)
    side = int(re.search(r"at most (\d+) pixels a side would fit", str(caught.value))[1])
    for longest, fits in ((side, True), (side + 32, False)):
        smaller = pipe.edit([picture.resize((longest, longest * 3 // 4))] * 2, on_canvas=painted_over)
        needs = pipe.networks.needs(workload(pipe.request(["a"], edit=smaller), smaller))
        assert needs.plan(pipe.memory_limit).fits == fits
