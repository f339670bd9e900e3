"""What a run gives saves itself, with settings that the command line makes it again from."""

from pathlib import Path

import numpy as np
import pytest
from helpers.cli_runner import done, pixels, refusal
from PIL import Image

from flux2_mlx import Flux2Pipeline, InputError
from flux2_mlx.images import read_settings
from flux2_mlx.output import Flux2Output

PROMPT = "a red ring, on white"
SIZE = {"height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe() -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)


@pytest.fixture(scope="module")
def two(pipe) -> Flux2Output:
    return pipe([PROMPT, "a cat"], seed=[7, 11], **SIZE)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(output: Flux2Output, *args, **settings) -> list[str]:
    paths = output.save(*args, **settings)
    assert all(path.is_file() for path in paths)
    return list(map(str, paths))


def test_one_image_has_the_name_that_is_given(pipe):
    output = pipe(PROMPT, seed=7, **SIZE)
    assert written(output, "a.png") == ["a.png"]
    assert written(output, Path("new") / "folder" / "a.webp") == ["new/folder/a.webp"]
    assert np.array_equal(pixels("a.png"), np.asarray(output.images[0]))


def test_several_images_are_told_apart(two, folder):
    assert written(two, "a.jpg") == ["a-7.jpg", "a-11.jpg"]
    assert written(two, "out") == ["out/demo-7.png", "out/demo-11.png"]
    assert written(two, "out/") == ["out/demo-7-2.png", "out/demo-11-2.png"]
    assert written(two, "{index}.png") == ["1.png", "2.png"]
    assert written(two, "{model}-{width}x{height}-{steps}.png") == ["demo-64x64-2-7.png", "demo-64x64-2-11.png"]
    assert written(two, "to/{model}-{prompt}-{seed}.png") == [
        "to/demo-a-red-ring-on-white-7.png",
        "to/demo-a-cat-11.png",
    ]


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("a.tiff", r"can't write a-7\.tiff: the name must end in \.png, \.jpg"),
        ("{prompt}{x}.png", r"there is no {x} in the name '{prompt}{x}\.png'; use {seed}, {prompt}"),
        ("there.png/a.png", "can't write there.png: File exists"),
        ("there-{seed}.png", "there-7.png exists; choose another name, or say replace=True"),
        ("x" * 300 + ".png", r"can't write 'x+'?: File name too long; choose another name"),
        ("x" * 300 + "{seed}.png", "File name too long"),
        ("x" * 300, "File name too long"),
        ("a\0{seed}.png", "can't write .*null"),
        (5, "a path must be text or a Path, got int"),
    ],
)
def test_what_can_not_be_saved(path, match, two, folder):
    for name in ("there.png", "there-7.png"):
        (folder / name).write_bytes(b"mine")
    with pytest.raises(InputError, match=match):
        two.save(path)
    assert sorted(folder.iterdir()) == [folder / "there-7.png", folder / "there.png"]
    assert (folder / "there-7.png").read_bytes() == b"mine"


def test_files_are_replaced_when_asked(two, folder):
    (folder / "a-7.png").write_bytes(b"old")
    two.save("a.png", replace=True)
    assert np.array_equal(pixels("a-7.png"), np.asarray(two.images[0]))


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_arrays_are_saved_as_images(output_type, pipe, two):
    pipe([PROMPT, "a cat"], seed=[7, 11], output_type=output_type, **SIZE).save("a.png")
    assert np.array_equal(pixels("a-11.png"), np.asarray(two.images[1]))


def test_latents_are_no_images(pipe):
    output = pipe(PROMPT, seed=7, output_type="latent", **SIZE)
    with pytest.raises(InputError, match=r"write Flux2Output\(pipe\.decode\(out\), out\.seeds\)\.save\(\.\.\.\)$"):
        output.save("a.png")
    assert written(Flux2Output(pipe.decode(output), output.seeds), "a.png") == ["a.png"]
    assert written(Flux2Output(pipe.decode(output)), "by-hand") == ["by-hand/flux2-1.png"]
    with pytest.raises(InputError, match="there are no images to save"):
        Flux2Output().save("b.png")


def test_an_image_is_made_again_by_the_command_line(pipe):
    pipe(["a cat", PROMPT], seed=[3, 7], **SIZE).save("{seed}.png")
    done("t2i", "--replay", "7.png", "-o", "again.png")
    assert np.abs(pixels("again.png").astype(int) - pixels("7.png")).max() <= 1
    assert read_settings(Path("again.png")) == read_settings(Path("7.png"))


def test_an_edit_is_made_again_by_the_command_line(pipe):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)).save("picture.png")
    mask = np.zeros((64, 80), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save("mask.png")
    settings = {"seed": 7, "num_inference_steps": 2, "strength": 0.8, "match_colors": True}
    pipe("red", image="picture.png", mask_image="mask.png", **settings).save("edit.png")
    assert read_settings(Path("edit.png"))["edit"]["images"][0]["path"] == "picture.png"
    done("i2i", "--replay", "edit.png", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("edit.png"))
    again, first = (read_settings(Path(name))["edit"] for name in ("again.png", "edit.png"))
    assert [file["sha256"] for file in (*again["images"], again["mask"])] == [
        file["sha256"] for file in (*first["images"], first["mask"])
    ]
    assert (again["match_colors"], again["strength"]) == (True, 0.8)


def test_an_edit_of_a_picture_without_a_file_asks_for_it(pipe):
    picture = Image.new("RGB", (64, 64), "red")
    pipe("blue", image=picture, seed=7, num_inference_steps=1).save("edit.png")
    assert "image 1, which" in refusal("t2i", "--replay", "edit.png")
    picture.save("red.png")
    done("i2i", "--replay", "edit.png", "-i", "red.png", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("edit.png"))


def test_what_no_file_holds_is_told(pipe):
    pipe(PROMPT, max_sequence_length=40, num_inference_steps=2, seed=7, height=64, width=64).save("a.png")
    assert refusal("t2i", "--replay", "a.png") == (
        "a.png was made in Python with max_sequence_length, which it does not hold; make it again there"
    )


def test_a_result_says_what_it_is(two):
    assert repr(two).startswith("Flux2Output(2 images, seeds=[7, 11], ")
    with pytest.raises(InputError, match="a result has no 'image'; it has images, seeds"):
        two["image"]
    with pytest.raises(IndexError):
        two[1]


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "y" * 300 + "/a.png"])
def test_a_name_that_no_file_can_have(name, two):
    with pytest.raises(InputError, match="File name too long"):
        two.save(name)


@pytest.mark.parametrize(("arguments", "match"), [(("demo",), r"from_pretrained\('demo'\)$"), ((), "from_pretrained")])
def test_a_pipeline_is_opened_not_built(arguments, match):
    with pytest.raises(InputError, match=f"write Flux2Pipeline.{match}"):
        Flux2Pipeline(*arguments)
