"""Text written by the language models of checkpoints, checkpoints of these alone, and images to be looked at."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.checkpoints import DEV_VISION, WEIGHTS, convert, save_dev, save_small
from mlx.utils import tree_map
from PIL import ExifTags, Image

from flux2_mlx import Flux2Pipeline, images, upsampling
from flux2_mlx.checkpoint import Checkpoint, Component
from flux2_mlx.errors import CheckpointError, InputError, RangeError
from flux2_mlx.store import find_checkpoint
from flux2_mlx.text.generation import generate
from flux2_mlx.upsampling import Writer

SHORT = {"max_new_tokens": 6, "temperature": 1.0}


@pytest.fixture(autouse=True)
def _short_system_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be hundreds of byte tokens."""
    for name in ("UPSAMPLE_T2I", "UPSAMPLE_I2I", "DESCRIBE"):
        monkeypatch.setattr(upsampling, name, name[:12])


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dev in the official layout; not to be changed."""
    folder = tmp_path_factory.mktemp("official") / "dev"
    save_dev(folder)
    return folder


@pytest.fixture(scope="module")
def writer(official: Path) -> Writer:
    return Writer.from_pretrained(convert(official, official.with_name("dev-mlx"), variant="dev"), dtype="bfloat16")


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    folder = tmp_path_factory.mktemp("klein")
    return Writer.from_pretrained(convert(save_small(folder / "official"), folder / "mlx"), dtype="float32")


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["writer", "klein"])
def test_a_seed_makes_an_answer_repeatable(name, request):
    model = request.getfixturevalue(name)
    first, second, other = (model.upsample(["a red fox"], seed=seed, **SHORT) for seed in (7, 7, 8))
    assert first == second != other


def test_each_answer_without_a_seed_is_another(writer, monkeypatch):
    seeds = iter((7, 8))
    monkeypatch.setattr("flux2_mlx.text.generation.secrets.randbits", lambda bits: next(seeds))
    without = [writer.upsample(["a red fox"], **SHORT) for _ in range(2)]
    assert without == [writer.upsample(["a red fox"], seed=seed, **SHORT) for seed in (7, 8)]


@pytest.mark.parametrize("name", ["writer", "klein"])
def test_text_is_never_written_in_float16(name, request, picture):
    """Its hidden states overflow that."""
    folder = request.getfixturevalue(name).checkpoint.folder
    half, brain = (Writer.from_pretrained(folder, dtype=dtype) for dtype in ("float16", "bfloat16"))
    images = [picture] if half.can_see else []
    assert half.upsample(["a fox"], images, seed=7, **SHORT) == brain.upsample(["a fox"], images, seed=7, **SHORT)
    phase = half._plan([[1]], [], 1).phase("language_model")
    assert half.networks.load_language_model(phase).norm.weight.dtype == mx.bfloat16


def test_answer_k_has_seed_plus_k(writer):
    both = writer.upsample(["a red fox", "a dog"], seed=7, **SHORT)
    assert both == [writer.upsample([p], seed=s, **SHORT)[0] for s, p in ((7, "a red fox"), (8, "a dog"))]


def test_images_and_prompts_change_the_answer(writer, picture):
    other = Image.new("RGB", picture.size, "red")
    settings = {"seed": 7, **SHORT, "temperature": 0}
    answers = [
        *writer.upsample(["a red fox", "a dog"], **settings),
        *writer.upsample(["a red fox"], [picture], **settings),
        *writer.upsample(["a red fox"], [picture, other], **settings),
        *writer.describe([picture, other], **settings),
    ]
    assert len(set(answers)) == len(answers)


def test_the_text_is_heard_while_it_is_written(writer):
    heard = []
    answers = writer.upsample(["fox", "dog"], seed=7, on_text=lambda *report: heard.append(report), **SHORT)
    assert {number for number, _ in heard} == {0, 1}
    for number, answer in enumerate(answers):
        texts = [text for k, text in heard if k == number]
        assert 1 < len(texts) <= SHORT["max_new_tokens"]
        assert texts[-1].strip() == answer


def test_defaults_reach_the_generation(writer, monkeypatch):
    calls = []

    def record(model, ids, ends, **settings):
        calls.append(settings)
        return generate(model, ids, ends, **settings | {"max_tokens": 4})

    monkeypatch.setattr(upsampling, "generate", record)
    writer.upsample(["fox"])
    assert (calls[0]["temperature"], calls[0]["max_tokens"], calls[0]["seed"]) == (0.15, 512, None)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_answer_is_refused(text, writer, monkeypatch):
    monkeypatch.setattr(upsampling, "generate", lambda *_, **__: iter(writer.checkpoint.tokenizer.encode(text)))
    with pytest.raises(InputError, match="the language model answered nothing; try another seed"):
        writer.upsample(["a red fox"])


@pytest.mark.parametrize(("network", "name"), [("language_model", "language model"), ("vision", "vision tower")])
def test_a_network_that_gives_no_numbers_is_told(network, name, writer, picture, monkeypatch):
    load = Component.load

    def spoiled(component, *arguments):
        module = load(component, *arguments)
        if component.name == network:
            module.update(tree_map(lambda weight: weight * float("nan"), module.parameters()))
        return module

    monkeypatch.setattr(Component, "load", spoiled)
    with pytest.raises(RangeError, match=f"the {name} gave values that are not finite numbers"):
        writer.upsample(["a red fox"], [picture], seed=7, **SHORT)


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "is empty"), ("a" * 10_001, "is too long"), ("a \ud800", "is not valid text")]
)
def test_a_prompt_that_can_not_be_rewritten(writer, prompt, message):
    with pytest.raises(InputError, match=message):
        writer.upsample(["a red fox", prompt])


def test_a_model_without_the_needed_parts_is_refused(klein, picture):
    demo = Writer.from_pretrained("demo")
    with pytest.raises(CheckpointError, match=r"demo has no language model, so it can't rewrite prompts"):
        demo.upsample(["a red fox"])
    assert not klein.can_see
    for ask in (lambda: klein.describe([picture]), lambda: klein.upsample(["a red fox"], [picture])):
        with pytest.raises(CheckpointError, match=f"{klein.checkpoint.folder} has no vision weights"):
            ask()


def test_the_pipeline_writes_with_its_own_model_or_with_another(writer, klein, picture):
    pipe = Flux2Pipeline.from_pretrained(klein.checkpoint.folder, dtype="float32")
    settings = {"seed": 7, **SHORT}
    assert pipe.upsample_prompt("a red fox", vision=writer, **settings) == klein.upsample(["a red fox"], **settings)
    ours = pipe.upsample_prompt("a red fox", [picture], vision=writer, **settings)
    assert ours == writer.upsample(["a red fox"], [picture], **settings)
    assert pipe.describe_image(picture, vision=writer, **settings) == writer.describe([picture], **settings)[0]
    with pytest.raises(CheckpointError, match="has no vision weights"):
        pipe.describe_image(picture)


@pytest.mark.parametrize("quant", ["qint8", "qint4"])
def test_quantized_models_write_and_see(quant, official, tmp_path, picture):
    folder = convert(official, tmp_path / "mlx", "bf16", quant, variant="dev")
    parts = Checkpoint.open(folder).components
    bits = {name: (part.quantization or {}).get("bits") for name, part in parts.items()}
    number = {"qint8": 8, "qint4": 4}[quant]
    assert bits == {
        "transformer": None, "text_encoder": number, "language_model": number, "vision": number, "vae": None
    }  # fmt: skip
    assert Writer.from_pretrained(folder, dtype="bfloat16").describe([picture], seed=7, **SHORT)[0]


def test_the_vision_tower_is_stored_as_it_is(writer):
    config = writer.checkpoint.components["vision"].config
    assert config == DEV_VISION
    stored = json.loads((writer.checkpoint.folder / "vision" / "config.json").read_text())
    assert stored["image_size"] == DEV_VISION.image_size
    kernel = writer.checkpoint.components["vision"].load(mx.float32).vision_tower.patch_conv.weight
    assert kernel.shape == (DEV_VISION.hidden_size, 14, 14, 3)


def test_a_language_model_alone(official, tmp_path, writer):
    source = Path(shutil.copytree(official, tmp_path / "dev"))
    for name in ("transformer", "vae"):
        (source / WEIGHTS[name]).unlink()
    settings = {"variant": "dev", "models_dir": tmp_path / "models"}
    ours = Writer.from_pretrained(source, text_quant="bf16", dtype="bfloat16", **settings)
    folder = ours.checkpoint.folder
    assert set(ours.checkpoint.components) == {"text_encoder", "language_model", "vision"}
    assert folder.parent == tmp_path / "models"
    assert {path.name for path in folder.iterdir() if path.is_dir()} >= {"text_encoder", "language_model", "vision"}
    assert not (folder / "transformer").exists()
    assert find_checkpoint(str(source), text_quant="bf16", text_only=True, **settings) == folder
    assert ours.upsample(["a fox"], seed=7, **SHORT) == writer.upsample(["a fox"], seed=7, **SHORT)
    with pytest.raises(CheckpointError, match=f"{folder} holds a language model only; it can't make images"):
        Flux2Pipeline.from_pretrained(folder)
    whole = find_checkpoint(str(official), text_quant="bf16", **settings)
    assert whole != folder
    Flux2Pipeline.from_pretrained(whole)


def test_orientation_and_transparency(tmp_path):
    image = Image.new("RGB", (30, 20), "blue")
    image.paste((255, 0, 0), (0, 0, 10, 20))  # red on the left
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned right: what was left is on top
    image.save(tmp_path / "a.png", exif=exif)
    turned = images.open_image(tmp_path / "a.png")
    assert (turned.mode, turned.size) == ("RGB", (20, 30))
    assert [turned.getpixel((10, y)) for y in (2, 27)] == [(255, 0, 0), (0, 0, 255)]
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 128))
    clear.save(tmp_path / "b.png")
    flat = images.open_image(tmp_path / "b.png")
    assert flat.getpixel((0, 0)) == (255, 255, 255)
    assert flat.getpixel((1, 0)) == pytest.approx((255, 127, 127), abs=1)


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "expected"),
    [
        ("L", 100, "png", (100, 100, 100)),
        ("LA", (100, 0), "png", (255, 255, 255)),
        ("1", 1, "png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0)),
        ("I;16", 0x8000, "png", (128, 128, 128)),
        ("I;16", 0x0101, "png", (1, 1, 1)),
    ],
)
def test_modes(mode, color, suffix, expected, tmp_path):
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (16, 16), color).save(path)
    image = images.open_image(path)
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert image.getpixel((8, 8)) == pytest.approx(expected, abs=3)


def test_palettes(tmp_path):
    image = Image.new("RGB", (4, 4), "red").convert("P")
    image.save(tmp_path / "a.gif")
    assert images.open_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)
    image.save(tmp_path / "b.png", transparency=image.getpixel((0, 0)))
    assert images.open_image(tmp_path / "b.png").getpixel((0, 0)) == (255, 255, 255)


def test_what_is_no_image_to_look_at(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"moving.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        with pytest.raises(InputError, match=f"moving.{suffix} is an animation; save one of its frames"):
            images.open_image(path)
    (tmp_path / "a.txt").write_text("a red fox")
    frames[0].resize((300, 300)).effect_spread(99).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:150])
    for name, reason in {
        "a.txt": "it is not an image",
        "none.png": "No such file or directory",
        ".": "Is a directory",
        "cut.png": ".",
    }.items():
        with pytest.raises(InputError, match=f"^can't read {tmp_path / name}: {reason}") as caught:
            images.open_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(images, "MAX_INPUT_PIXELS", 15)
    frames[0].save(tmp_path / "large.png")
    with pytest.raises(InputError, match=r"large\.png is too large: 4×4; scale it down first"):
        images.open_image(tmp_path / "large.png")
