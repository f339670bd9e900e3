"""Text on the command line: `upsample`, `describe`, and prompts that `t2i` has rewritten before it paints."""

import gc
import json
import shutil
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.checkpoints import convert, save_dev, save_small
from helpers.cli_runner import DEMO, PROMPT, SMALL, done, pixels, refusal
from PIL import Image, PngImagePlugin

from flux2_mlx import upsampling
from flux2_mlx.checkpoint import Checkpoint, Component
from flux2_mlx.errors import DownloadError
from flux2_mlx.images import read_settings
from flux2_mlx.text.generation import generate

DESCRIBED = "Describe this image."
# What follows the prompt in the chat template of klein.
KLEIN_END = "\nassistant\n\n\n\n\n"


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dev")
    save_dev(folder / "official")
    return convert(folder / "official", folder / "mine", variant="dev")


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("klein")
    return convert(save_small(folder / "official"), folder / "mine")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLUX2_MLX_HOME", str(tmp_path / "models"))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save("photo.png")
    return tmp_path


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let the answer be the question's last letters backwards, and one more of them for an odd seed."""
    heard = []

    def answer(model: Any, ids: Sequence[int], ends: frozenset[int], **settings: Any) -> Iterator[int]:
        heard.append(settings)
        # Byte tokens of both families: 0 to 255 without, and 19 to 274 behind the special tokens.
        letters = [number for number in ids if 18 < number < 256]
        return reversed(letters[-8 - settings["seed"] % 2 :])

    monkeypatch.setattr(upsampling, "generate", answer)
    return heard


def answered(text: str, seed: int, end: str = "") -> str:
    return (text + end)[::-1][: 8 + seed % 2].strip()


def painted(model: Path | str, *arguments: object, prompt: str | None = PROMPT) -> dict[str, Any]:
    words = [] if prompt is None else [prompt]
    size = ("-W", "32", "-H", "32", "-s", "1")
    return json.loads(done("t2i", *words, "-m", model, *size, "--json", *arguments).stdout)


def phases(report: dict[str, Any]) -> list[str]:
    return [phase["name"] for phase in report["phases"]]


def test_upsample(dev):
    result = done("upsample", PROMPT, "-m", dev, "--seed", "6")
    assert result.stdout == f"{answered(PROMPT, 6)}\n"
    assert answered(PROMPT, 6) in result.stderr
    assert done("upsample", PROMPT, "-m", dev, "--seed", "6", "--quiet").stderr == ""


def test_upsample_with_images(dev, calls):
    done("upsample", PROMPT, "-m", dev, "--seed", "6")
    result = done("upsample", PROMPT, "-m", dev, "-i", "photo.png", "-i", "photo.png", "--seed", "6")
    assert result.stdout == f"{answered(PROMPT, 6)}\n"
    assert [call["embeddings"] is None for call in calls] == [True, False]


def test_settings_of_the_text_reach_the_model(dev, calls):
    done("upsample", PROMPT, "-m", dev, "--seed", "5", "--temperature", "0.7")
    done("describe", "photo.png", "-m", dev, "--seed", "5", "--temperature", "0")
    done("describe", "photo.png", "-m", dev, "--seed", "5")
    assert [(call["seed"], call["temperature"]) for call in calls] == [(5, 0.7), (5, 0.0), (5, 0.15)]


def test_written_json(dev):
    result = done("upsample", "一 fox at night", "-m", dev, "--seed", "6", "--json")
    assert json.loads(result.stdout) == {"prompt": "一 fox at night", "upsampled_prompt": answered("at night", 6)}
    assert "一" in result.stdout
    result = done("describe", "photo.png", "-m", dev, "--seed", "6", "--json")
    assert json.loads(result.stdout) == {"image": "photo.png", "description": answered(DESCRIBED, 6)}


def test_describe(dev):
    assert done("describe", "photo.png", "-m", dev, "--seed", "7").stdout == f"{answered(DESCRIBED, 7)}\n"


def test_real_text_is_repeatable(dev, monkeypatch):
    def short(*arguments: Any, **settings: Any) -> Iterator[int]:
        return generate(*arguments, **settings | {"max_tokens": 10})

    monkeypatch.setattr(upsampling, "generate", short)
    monkeypatch.setattr(upsampling, "DESCRIBE", "Describe.")  # the message would be hundreds of byte tokens
    settings = ("-m", dev, "--temperature", "1", "--quiet", "--seed")
    first, second, other = (done("describe", "photo.png", *settings, seed).stdout for seed in (1, 1, 2))
    assert first == second != other


MUTE = "has no language model, so it can't rewrite prompts or describe images; choose one of klein-4b, klein-base-4b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["upsample", PROMPT, "-m", "demo"], MUTE),
        (["describe", "none.png", "-m", "demo"], "can't read none.png: No such file or directory"),
        (["describe", "notes.txt", "-m", "demo"], "can't read notes.txt: it is not an image"),
        (["describe", "photo.png", "-m", "demo"], "demo has no language model that sees images; choose dev"),
        (
            ["describe", "photo.png", "-m", DEMO],
            "has no language model, so it can't rewrite prompts or describe images",
        ),
        (["describe", "photo.png", "-m", "nothing"], "there is no model or folder 'nothing'"),
        (["upsample", PROMPT, "-i", "none.png", "-m", "demo"], "can't read none.png: No such file or directory"),
        (["t2i", PROMPT, *SMALL, "--upsample-prompt"], MUTE),
        (["t2i", PROMPT, *SMALL, "--interpret", "none.png", "--vision-model", "demo"], "can't read none.png: No such"),
        (["t2i", PROMPT, *SMALL, "--interpret", "photo.png", "--vision-model", "demo"], "has no language model"),
    ],
)
def test_refusals(words, message, folder):
    (folder / "notes.txt").write_text("a red fox")
    assert message in refusal(*words, "--quiet")


def test_the_built_in_model_is_named_and_not_its_folder(folder):
    assert refusal("upsample", PROMPT, "-m", "demo", "--quiet").startswith(f"demo {MUTE}")


def test_a_model_that_does_not_see_is_refused(klein):
    assert "has no vision weights" in refusal("describe", "photo.png", "-m", klein)
    assert "has no vision weights" in refusal("upsample", PROMPT, "-m", klein, "-i", "photo.png")


@pytest.mark.parametrize(
    ("model", "quant", "words"),
    [
        ("klein-4b", "qint8", ["upsample", PROMPT]),
        ("klein-4b", "qint8", ["upsample", PROMPT, "--text-quant", "qint8"]),
        ("klein-4b", "qint4", ["upsample", PROMPT, "--text-quant", "qint4"]),
        ("dev", "bf16", ["describe", "photo.png"]),
        ("dev", "qint8", ["describe", "photo.png"]),
    ],
)
def test_the_language_model_of_a_converted_model_is_not_fetched(model, quant, words, folder, request, monkeypatch):
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: pytest.fail("asked for a download"))
    (folder / "models").mkdir()
    official = request.getfixturevalue(model.partition("-")[0]).with_name("official")
    convert(official, folder / "models" / f"{model}-{quant}", quant, None, variant=model)
    assert done(*words, "-m", model, "--seed", "6").stdout


def test_a_text_encoder_of_another_quantization_will_not_do(folder, klein, monkeypatch):
    def fetch(repo: str, **options: Any) -> None:
        raise DownloadError(f"asked for {repo}")

    monkeypatch.setattr("flux2_mlx.hub.fetch", fetch)
    shutil.copytree(klein, folder / "models" / "klein-4b-qint8")
    assert refusal("upsample", PROMPT, "-m", "klein-4b", "--text-quant", "qint4").startswith("asked for black-forest")


@pytest.mark.parametrize("words", [["describe", "photo.png"], ["upsample", PROMPT, "-i", "photo.png"]])
def test_a_model_that_is_known_not_to_see_is_not_fetched(words, monkeypatch):
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: pytest.fail("asked for a download"))
    expected = "klein-4b has no language model that sees images; choose dev"
    assert refusal(*words, "-m", "klein-4b") == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty; describe the image in words"),
        (" \n", "the prompt is empty; describe the image in words"),
        ("a" * 10_001, "a prompt of 10001 characters is too long; the limit is 10000"),
        ("\udcff", r"the prompt is not valid text: '\udcff'"),
    ],
)
@pytest.mark.parametrize("model", ["klein-4b", "demo"])
def test_a_prompt_that_can_not_be_rewritten(model, prompt, message, monkeypatch):
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: pytest.fail("asked for a download"))
    assert refusal("upsample", prompt, "-m", model) == message


def test_the_largest_seed_goes_with_several_images(dev, calls):
    arguments = ("--interpret", "photo.png", "--interpret", "photo.png", "--seed", str(2**64 - 1), "-o", "a.png")
    painted(dev, *arguments)
    assert [call["seed"] for call in calls] == [2**64 - 1, 0]


def test_t2i_upsamples_first(dev):
    report = painted(dev, "--upsample-prompt", "--seed", "6", "-o", "a.png")
    assert (report["prompt"], report["upsampled_prompt"]) == (PROMPT, answered(PROMPT, 6))
    assert phases(report) == ["language_model", "text_encoder", "transformer", "vae"]
    settings = read_settings("a.png")
    assert (settings["prompt"], settings["upsampled_prompt"]) == (PROMPT, answered(PROMPT, 6))
    painted(dev, "--seed", "6", "-o", "b.png", prompt=answered(PROMPT, 6))
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert painted(dev, "--seed", "6", "-o", "c.png")["upsampled_prompt"] is None
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(dev, calls):
    words = ("t2i", PROMPT, "-m", dev, "-W", "1024", "-H", "1024", "--upsample-prompt", "--memory-limit", "60MB")
    assert " would fit" in refusal(*words, "-o", "a.png", "--quiet")
    assert calls == []


def test_every_prompt_of_a_file_is_upsampled(klein, folder):
    (folder / "prompts.txt").write_text("a large red fox\na small blue dog\n")
    arguments = ("--upsample-prompt", "--prompts-file", "prompts.txt", "-n", "2", "--seed", "6", "-o", "a.png")
    report = painted(klein, *arguments, prompt=None)
    expected = [answered("a large red fox", 6, KLEIN_END), answered("a small blue dog", 7, KLEIN_END)]
    assert report["upsampled_prompt"] == expected
    remembered = [read_settings(f"a-{seed}.png")["upsampled_prompt"] for seed in range(6, 10)]
    assert remembered == [text for text in expected for _ in range(2)]


def test_interpret_adds_descriptions(dev):
    report = painted(dev, "--interpret", "photo.png", "--interpret", "photo.png", "--seed", "6", "-o", "a.png")
    expected = "\n\n".join([PROMPT, answered(DESCRIBED, 6), answered(DESCRIBED, 7)])
    assert (report["prompt"], report["upsampled_prompt"]) == (PROMPT, expected)
    assert phases(report) == ["vision", "language_model", "text_encoder", "transformer", "vae"]
    assert read_settings("a.png")["upsampled_prompt"] == expected


def test_interpret_and_upsample(dev):
    report = painted(dev, "--interpret", "photo.png", "--upsample-prompt", "--seed", "6", "-o", "a.png")
    assert report["upsampled_prompt"] == answered(answered(DESCRIBED, 6), 6)
    assert phases(report) == ["vision", "language_model", "language_model", "text_encoder", "transformer", "vae"]


def test_all_that_is_written_is_shown(dev):
    size = ("-W", "32", "-H", "32", "-s", "1", "--seed", "6", "-o", "a.png")
    result = done("t2i", PROMPT, "-m", dev, *size, "--interpret", "photo.png", "--upsample-prompt")
    described = answered(DESCRIBED, 6)
    assert f"{described}\n{answered(described, 6)}\n" in result.stderr


def test_another_model_describes_for_one_that_does_not_see(dev):
    arguments = ("--interpret", "photo.png", "--vision-model", dev, "--seed", "6", "-o", "a.png")
    report = painted("demo", *arguments)
    assert report["upsampled_prompt"] == "\n\n".join([PROMPT, answered(DESCRIBED, 6)])
    assert report["model"] == "demo"
    assert phases(report) == ["vision", "language_model", "text_encoder", "transformer", "vae"]


def edited(model: str | Path, *arguments: object) -> dict[str, Any]:
    Image.open("photo.png").resize((90, 64)).save("large.png")
    return json.loads(done("i2i", PROMPT, "-m", model, "-s", "1", "-i", "large.png", "--json", *arguments).stdout)


def test_another_model_looks_at_the_references_for_one_that_does_not_see(dev, calls):
    report = edited("demo", "--upsample-prompt", "--vision-model", dev, "--seed", "6", "-o", "a.png")
    assert report["upsampled_prompt"] == answered(PROMPT, 6)
    assert phases(report) == ["vision", "language_model", "text_encoder", "vae_encoder", "transformer", "vae"]
    assert calls[0]["embeddings"] is not None  # it saw the image


def test_dev_looks_at_the_references_itself(dev, calls):
    report = edited(dev, "--upsample-prompt", "--interpret", "photo.png", "--seed", "6", "-o", "a.png")
    assert phases(report) == [
        *["vision", "language_model"] * 2,
        "text_encoder",
        "vae_encoder",
        "transformer",
        "vae",
    ]
    assert [call["embeddings"] is not None for call in calls] == [True, True]
    assert (
        read_settings("a.png")["upsampled_prompt"] == report["upsampled_prompt"] == answered(answered(DESCRIBED, 6), 6)
    )


def test_the_language_models_are_never_in_memory_together(dev, monkeypatch):
    """Each network is gone before the next phase's is loaded, so that the peak is the largest phase's alone."""
    own = peak_of("text_encoder", painted("demo", "--no-cache", "--seed", "6", "-o", "alone.png"))
    loaded: list[tuple[Path, str, weakref.ref]] = []
    load = Component.load

    def recorded(component: Component, *arguments: Any) -> Any:
        gc.collect()
        alive = [name for _, name, network in loaded if network() is not None]
        folder = component.files[0].parent.parent
        writing = component.name == "language_model"  # takes over the text encoder's layers
        assert alive == ["text_encoder"] * writing, f"{alive} in memory while {component.name} of {folder} is loaded"
        network = load(component, *arguments)
        part = network.layers[0] if "layers" in network else network
        loaded.append((folder, component.name, weakref.ref(part)))
        return network

    monkeypatch.setattr(Component, "load", recorded)
    report = edited("demo", "--no-cache", "--upsample-prompt", "--vision-model", dev, "--seed", "6", "-o", "a.png")
    names = [name for _, name, _ in loaded]
    assert names == ["vision", "text_encoder", "language_model", "text_encoder", "vae", "transformer", "vae"]
    peaks = {phase["name"]: phase["peak_memory"] for phase in report["phases"]}
    assert report["peak_memory"] == max(peaks.values())
    written = sum(Checkpoint.open(dev).components[name].nbytes for name in ("text_encoder", "language_model"))
    assert peaks["language_model"] >= written
    # What the phase before used is given back: the demo's encoder runs beside nothing of it.
    assert peaks["text_encoder"] <= own + written / 10


def peak_of(name: str, report: dict[str, Any]) -> int:
    return next(phase["peak_memory"] for phase in report["phases"] if phase["name"] == name)


def test_a_replay_paints_the_rewritten_prompt_without_writing_again(dev, monkeypatch):
    arguments = ("--interpret", "photo.png", "--vision-model", dev, "--seed", "6", "-o")
    painted("demo", *arguments, "a.png")
    Path("photo.png").unlink()

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(upsampling, "generate", fail)
    report = json.loads(done("t2i", "--replay", "a.png", "-o", "b.png", "--json").stdout)
    assert phases(report) == ["text_encoder", "transformer", "vae"]
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert read_settings("a.png") == read_settings("b.png")
    assert report["upsampled_prompt"] == read_settings("a.png")["upsampled_prompt"]
    report = json.loads(done("t2i", "a dog", "--replay", "a.png", "-o", "c.png", "--json").stdout)
    assert (report["prompt"], report["upsampled_prompt"]) == ("a dog", None)


def test_a_replay_with_a_wish_to_rewrite_writes_again(dev):
    painted("demo", "--interpret", "photo.png", "--vision-model", dev, "--seed", "6", "-o", "a.png")
    asked = ("--interpret", "photo.png", "--interpret", "photo.png", "--vision-model", dev)
    report = painted("demo", "--replay", "a.png", *asked, "-o", "b.png", prompt=None)
    assert report["upsampled_prompt"] == "\n\n".join([PROMPT, answered(DESCRIBED, 6), answered(DESCRIBED, 7)])
    report = painted("demo", "--replay", "a.png", "--upsample-prompt", "-m", dev, "-o", "c.png", prompt=None)
    assert report["upsampled_prompt"] == answered(PROMPT, 6)


@pytest.mark.parametrize("text", [5, ["a"], {}])
def test_a_damaged_rewritten_prompt(text):
    painted("demo", "--seed", "6", "-o", "a.png")
    with Image.open("a.png") as image:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("flux2-mlx", json.dumps(json.loads(image.text["flux2-mlx"]) | {"upsampled_prompt": text}))
        image.save("b.png", pnginfo=info)
    message = refusal("t2i", "--replay", "b.png", "-o", "c.png")
    assert message == f"the settings in b.png are damaged: upsampled_prompt is {text!r}"


def test_profile_names_the_phases_of_writing(dev):
    result = done(
        "t2i", PROMPT, "-m", dev, "-W", "32", "-H", "32", "-s", "1", "--upsample-prompt", "--interpret", "photo.png",
        "--profile", "--quiet", "-o", "a.png",
    )  # fmt: skip
    names = [line.split("  ")[0] for line in result.stderr.splitlines()]
    assert names == [
        "vision",
        "language_model",
        "language_model",
        "text_encoder",
        "transformer",
        "vae",
        "whole run",
    ]
