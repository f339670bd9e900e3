"""A GPU that fails, in Metal's own words, is one line and exit code 1 of every command, which names its own options."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.checkpoints import LARGE_TRANSFORMER, SHALLOW_TEXT, SHALLOW_VARIANT, convert, save_dev, save_small
from helpers.cli_runner import PROMPT, SMALL, error_line, run
from helpers.device_messages import INTERACTIVITY, OUT_OF_MEMORY, TIMEOUT, TOO_LARGE
from PIL import Image

from flux2_mlx import Flux2Pipeline, upsampling

TEXTS = [OUT_OF_MEMORY, TIMEOUT, INTERACTIVITY, TOO_LARGE]
SIZE = ("-W", "64", "-H", "48", "-s", "1", "--no-cache", "--dtype", "float32")
ON_CPU = "close other programs, or set FLUX2_MLX_DEVICE=cpu in the environment"
# What is advised, by what is done, for each of the texts.
PAINTING = [
    "choose a lower --memory-limit, a smaller image, or close other programs",
    "choose a smaller image, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1",
    "let the display sleep, choose a smaller image, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1",
    "choose a smaller image",
]
WRITING = [line.replace("a smaller image", "fewer images or a shorter prompt") for line in PAINTING]
CONVERTING = [ON_CPU] * 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_small(folder / "official", transformer=LARGE_TRANSFORMER, text=SHALLOW_TEXT)
    convert(folder / "official", folder / "plain", variant=SHALLOW_VARIANT)
    save_dev(folder / "official-dev")
    convert(folder / "official-dev", folder / "dev", variant="dev")
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save("photo.png")
    for name in ("UPSAMPLE_T2I", "DESCRIBE"):  # they would be hundreds of byte tokens
        monkeypatch.setattr(upsampling, name, name)


def limit(models: Path) -> int:
    """Bytes in which the transformer is streamed."""
    pipe = Flux2Pipeline.from_pretrained(models / "plain", dtype="float32", prompt_cache=False)
    return pipe.plan(pipe.request(["a"], width=64, height=48)).peak_memory * 3 // 4


@pytest.mark.parametrize("text", range(4))
@pytest.mark.parametrize(
    ("name", "function", "call", "advice"),
    [
        ("t2i", "eval", 8, PAINTING),
        ("t2i streamed", "eval", 30, PAINTING),
        ("t2i streamed", "async_eval", 20, PAINTING),
        ("t2i reading", "eval", 2, PAINTING),
        ("i2i", "eval", 8, PAINTING),
        ("convert", "eval", 8, CONVERTING),
        ("requantize", "eval", 8, CONVERTING),
        ("upsample", "eval", 8, WRITING),
        ("upsample", "async_eval", 1, WRITING),
        ("describe", "eval", 2, WRITING),
        ("describe", "async_eval", 1, WRITING),
    ],
)
def test_one_line_says_what_happened_and_what_to_do(name, function, call, advice, text, models, monkeypatch):
    plain, dev = models / "plain", models / "dev"
    commands = {
        "t2i": ("t2i", PROMPT, *SMALL, "--no-cache", "-o", "a.png"),
        "t2i streamed": ("t2i", PROMPT, "-m", plain, *SIZE, "-o", "a.png", "--memory-limit", limit(models)),
        "t2i reading": ("t2i", PROMPT, "-m", plain, *SIZE, "-o", "a.png", "--memory-limit", limit(models)),
        "i2i": ("i2i", PROMPT, "-m", "demo", "-s", "1", "-i", "photo.png", "--no-cache", "-o", "a.png"),
        "convert": ("convert", models / "official", "new", "--variant", SHALLOW_VARIANT, "-q", "qint8"),
        "requantize": ("convert", plain, "new", "-q", "qint4"),
        "upsample": ("upsample", PROMPT, "-m", dev),
        "describe": ("describe", "photo.png", "-m", dev),
    }
    work, calls = getattr(mx, function), []

    def failing(*arrays):
        if name != "t2i reading" or isinstance(arrays[0], dict):  # the weights of a block
            calls.append(arrays)
        if len(calls) > call:
            raise RuntimeError(TEXTS[text])
        work(*arrays)

    monkeypatch.setattr(mx, function, failing)
    result = run(*commands[name], "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    line = error_line(result.stderr)
    assert f"; {advice[text]}" in line
    assert line.endswith(f"({TEXTS[text]})")
    assert [path.name for path in Path().iterdir()] == ["photo.png"]
