"""What a GPU that fails says is one line wherever it says it, and afterwards the pipeline works as before."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert import requantize
from helpers.checkpoints import LARGE_TRANSFORMER, SHALLOW_TEXT, SHALLOW_VARIANT, convert, save_small
from helpers.mlx_state import mlx_limits
from mlx_lm.generate import generation_stream

from flux2_mlx import Flux2Pipeline, memory
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.errors import DeviceError
from flux2_mlx.text.generation import generate

NO_MEMORY = "[METAL] Command buffer execution failed: Insufficient Memory (kIOGPUCommandBufferCallbackErrorOutOfMemory)"
ADVICE = r"^the GPU has no memory left for this; choose a lower memory_limit[^\n]*(\n\d finished images are [^\n]*)?$"
CONVERTING = r"^the GPU has no memory left for this; close other programs, or set FLUX2_MLX_DEVICE=cpu in the [^\n]*$"
SETTINGS = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 3, "output_type": "np"}


def fail_at(call: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Let the evaluation of this number fail; gives the numbers of those that there were."""
    evaluate, calls = mx.eval, []

    def failing(*arrays):
        calls.append(len(calls))
        if calls[-1] == call:
            raise RuntimeError(NO_MEMORY)
        evaluate(*arrays)

    patch.setattr(mx, "eval", failing)
    return calls


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "official"
    return save_small(folder, transformer=LARGE_TRANSFORMER, text=SHALLOW_TEXT)


@pytest.fixture(scope="module", params=["resident", "streamed"])
def pipe(request, official):
    folder = official.with_name("ours")
    if not folder.exists():
        convert(official, folder, variant=SHALLOW_VARIANT)
    options = {"dtype": "float32", "prompt_cache": False, "keep": False}
    whole = Flux2Pipeline.from_pretrained(folder, **options)
    if request.param == "resident":
        return whole
    needed = whole.plan(whole.request(["a"], width=64, height=48)).peak_memory
    return Flux2Pipeline.from_pretrained(folder, **options, memory_limit=needed * 3 // 4)


def taken() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.fixture(scope="module")
def whole(pipe) -> tuple[int, np.ndarray]:
    """How many evaluations a run has that nothing stops, and its image."""
    with pytest.MonkeyPatch.context() as patch:
        calls = fail_at(-1, patch)
        images = pipe("a fox", **SETTINGS).images
        return len(calls), images


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97])
def test_after_a_run_without_memory_the_pipeline_is_as_before(pipe, whole, share, monkeypatch):
    calls, expected = whole
    before, limits = taken(), mlx_limits()
    with monkeypatch.context() as patch:
        fail_at(int(share * calls), patch)
        with pytest.raises(DeviceError, match=ADVICE) as caught:
            pipe("a fox", **SETTINGS)
    del caught
    assert mlx_limits() == limits
    assert taken() <= before + 2**12
    assert np.array_equal(pipe("a fox", **SETTINGS).images, expected)


@pytest.mark.parametrize(("message", "kind"), [(NO_MEMORY, DeviceError), ("[eval] other", RuntimeError)])
def test_what_was_finished_goes_with_the_failure(message, kind, pipe, monkeypatch):
    """Images are made one after the other, as large ones are, and the second one fails."""
    monkeypatch.setattr(memory, "_TOKENS_PER_PASS", 12)
    settings = SETTINGS | {"num_images_per_prompt": 3}
    whole, evaluate, steps = pipe("a fox", **settings).images, mx.eval, []

    def failing(*arrays):
        monkeypatch.setattr(mx, "eval", evaluate)
        raise RuntimeError(message)

    def on_step(*values):
        steps.append(values)
        if len(steps) == 3:
            monkeypatch.setattr(mx, "eval", failing)
        return {}

    with pytest.raises(kind) as caught:
        pipe("a fox", **settings, callback_on_step_end=on_step)
    assert type(caught.value) is kind
    assert caught.value.partial_output.seeds == [3]
    assert np.array_equal(caught.value.partial_output.images, whole[:1])
    assert caught.value.__notes__ == ["1 finished images are in the exception's partial_output"]


def test_what_a_callback_raises_is_its_own(pipe, monkeypatch):
    error = RuntimeError(NO_MEMORY)

    def on_step(*values):
        raise error

    with pytest.raises(RuntimeError) as caught:
        pipe("a fox", **SETTINGS, callback_on_step_end=on_step)
    assert caught.value is error


def test_a_preview_that_a_callback_asks_for_without_memory(pipe, monkeypatch):
    request = pipe.request(["a"], width=64, height=48, steps=2)

    def on_progress(progress):
        if progress.step is not None:
            fail_at(0, monkeypatch)
            progress.preview()

    with pytest.raises(DeviceError, match=ADVICE):
        pipe.run(request, on_progress=on_progress, previews=True)


def test_a_preview_without_memory(pipe, monkeypatch):
    request, tokens = pipe.request(["a"], width=64, height=48), mx.zeros((1, 12, 64))
    fail_at(0, monkeypatch)
    with pytest.raises(DeviceError, match=ADVICE):
        pipe.preview(request, tokens)


def test_prompts_without_memory(pipe, monkeypatch):
    with monkeypatch.context() as patch:
        calls = fail_at(-1, patch)
        pipe.encode_prompt("a fox")
    for call in (3, len(calls) - 1):
        with monkeypatch.context() as patch:
            fail_at(call, patch)
            with pytest.raises(DeviceError, match=ADVICE):
                pipe.encode_prompt("a fox")


def test_conversions_without_memory(official, tmp_path, monkeypatch):
    plain = convert(official, tmp_path / "plain", variant=SHALLOW_VARIANT)
    with monkeypatch.context() as patch:
        fail_at(20, patch)
        with pytest.raises(DeviceError, match=CONVERTING):
            convert(official, tmp_path / "packed", "qint8", "qint8", variant=SHALLOW_VARIANT)
    with monkeypatch.context() as patch:
        fail_at(20, patch)
        with pytest.raises(DeviceError, match=CONVERTING):
            requantize(Checkpoint.open(plain), tmp_path / "packed", "qint8", "qint8")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


class Model:
    """A language model that always says 1."""

    layers = ()

    def __call__(self, ids, cache=None, **others):
        return mx.where(mx.arange(4) == 1, 1.0, 0.0) * mx.ones((*ids.shape, 1))


@pytest.mark.parametrize("end", [1, 2])
def test_text_is_generated_to_the_end(end, monkeypatch):
    """The next token is being worked out when the last one is given; nobody would wait for it."""
    waited, synchronize = [], mx.synchronize
    monkeypatch.setattr(mx, "synchronize", lambda *stream: waited.append(stream) or synchronize(*stream))
    tokens = list(generate(Model(), [0], frozenset({end}), temperature=0, max_tokens=3))
    assert tokens == ([] if end == 1 else [1, 1, 1])
    assert waited[-1] == (generation_stream,)
