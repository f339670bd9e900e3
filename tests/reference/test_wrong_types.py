"""Whatever is given to the public methods, what comes back is a result or one line."""

import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from flux2_mlx import Flux2Error, Flux2Pipeline
from flux2_mlx.output import Flux2Output
from flux2_mlx.run import Run

VALUES = [
    True,
    -1,
    10**30,
    3.5,
    float("nan"),
    "x",
    "",
    "a\0b",
    b"x",
    [],
    [None],
    [[1]],
    ("x", 1),
    {},
    {"x": 1},
    object(),
    lambda: None,
    np.zeros((2, 2)),
    np.array(None),
    mx.zeros((1, 2, 3)),
    torch.zeros(2, 2),
    torch.float32,
    torch.Generator(),
]


@pytest.fixture(scope="module")
def pipe() -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", dtype="float32", prompt_cache=False)


@pytest.fixture(autouse=True)
def _no_run(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """A run makes nothing, so that only what comes before it takes time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "make", lambda run, *given: run.output)
    monkeypatch.setattr(Run, "encode", lambda run, prompts: {prompt: mx.zeros((2, 3)) for prompt in prompts})


def try_all(call: Callable[..., Any], given: dict[str, Any], names: list[str]) -> None:
    wrong = []
    for name in names:
        for value in VALUES:
            try:
                call(**{**given, name: value})
            except Flux2Error:
                pass
            except Exception as error:  # a test of what must not be
                wrong.append((name, value, repr(error)))
    assert not wrong, "\n".join(map(str, wrong))


def names_of(method: Callable) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name not in ("self", "cls")]


def test_calls(pipe):
    try_all(pipe, {"prompt": "red", "height": 32, "width": 32}, names_of(pipe.__call__))


def test_edits(pipe):
    image = np.zeros((64, 64, 3))
    try_all(pipe, {"prompt": "red", "image": image}, names_of(pipe.__call__))
    try_all(pipe, {"prompt": "red", "image": image, "mask_image": image + 1}, ["padding_mask_crop", "mask_image"])


def test_models():
    names = [name for name in names_of(Flux2Pipeline.from_pretrained) if name != "progress"]
    try_all(Flux2Pipeline.from_pretrained, {"source": "demo"}, names)


@pytest.mark.parametrize(
    "name", ["encode_prompt", "decode", "upsample_prompt", "describe_image", "set_progress_bar_config", "to"]
)
def test_other_methods(name, pipe):
    given = {
        "encode_prompt": {"prompt": "red"},
        "upsample_prompt": {"prompt": "red"},
        "describe_image": {"image": np.zeros((64, 64, 3))},
        "decode": {"latents": np.zeros((1, 4, 2, 2))},
    }.get(name, {})
    method = getattr(pipe, name)
    try_all(method, given, names_of(method))


def test_saving():
    output = Flux2Output(images=[], seeds=[1])
    try_all(output.save, {"path": "x.png"}, ["path"])
