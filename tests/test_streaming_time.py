"""How long streaming takes, on a machine that is played: a disk that reads, and a GPU that computes meanwhile."""

from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.checkpoints import SHALLOW_TEXT, SHALLOW_VARIANT, TRANSFORMER, convert, save_small
from mlx.utils import tree_flatten

from flux2_mlx import loading, streaming
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.streaming import Reading, load_streamed
from flux2_mlx.weights import READER


class Machine:
    """A disk that reads one tensor after the other, and a GPU. Time passes where one of them works or is waited for.

    What is cast on the reader's stream is there when it is read; a cast on any other keeps the GPU until it is.
    """

    def __init__(self, patch: pytest.MonkeyPatch, seconds_a_byte: float):
        self.now = self.reading = self.computing = 0.0
        self._rate, self._disk, self._gpu = seconds_a_byte, 0.0, 0.0
        self._ready, self._held = {}, []
        self._begin, self._evaluate, self._cast = mx.async_eval, mx.eval, mx.array.astype
        patch.setattr(streaming.time, "perf_counter", lambda: self.now)
        patch.setattr(mx, "async_eval", self.begin)
        patch.setattr(mx, "eval", self.evaluate)
        patch.setattr(mx.array, "astype", lambda x, dtype, stream=None: self.cast(x, dtype, stream))

    def cast(self, x: mx.array, dtype: mx.Dtype, stream: object) -> mx.array:
        y = self._cast(x, dtype, stream=stream)
        if dtype != x.dtype and stream is not READER:
            self._held.append(y)
        return y

    def begin(self, array: mx.array) -> None:
        self._begin(array)
        took = array.nbytes * self._rate
        self._disk = max(self._disk, self.now) + took
        self.reading += took
        self._ready[id(array)] = self._disk
        if any(array is held for held in self._held):
            self._gpu = max(self._gpu, self._disk)

    def evaluate(self, parameters) -> None:
        self._evaluate(parameters)
        ready = [self._ready.pop(id(x)) for _, x in tree_flatten(parameters) if id(x) in self._ready]
        self.now = max([self.now, *ready])
        self._held.clear()

    def compute(self, seconds: float) -> None:
        self._gpu = max(self._gpu, self.now) + seconds
        self.now, self.computing = self._gpu, self.computing + seconds


@pytest.fixture(scope="module", params=["bf16", "qint8"])
def many(request, tmp_path_factory):
    """A transformer with as many blocks as klein-4b has."""
    folder, config = tmp_path_factory.mktemp("many"), replace(TRANSFORMER, num_layers=5, num_single_layers=20)
    source = save_small(folder / "official", transformer=config, text=SHALLOW_TEXT)
    converted = convert(source, folder / "ours", request.param, request.param, variant=SHALLOW_VARIANT)
    return Checkpoint.open(converted).components["transformer"]


@pytest.mark.parametrize("work", [0.2, 0.7, 1.0, 1.5, 5.0])  # seconds of a block for a second that its reading takes
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("cast_by", ["reader", "gpu"])
def test_streaming_takes_as_long_as_reading_or_computing(many, work, dtype, cast_by, monkeypatch):
    """Only the first block of the first pass can't be read while something is computed."""
    network = load_streamed(many, dtype, 0, Reading())
    if cast_by == "gpu":
        monkeypatch.setattr(loading, "cast", lambda x, dtype: x if dtype is None else x.astype(dtype))
    with monkeypatch.context() as patch:
        machine = Machine(patch, 1e-6)
        for _ in range(2):
            for blocks in (network.double_blocks, network.single_blocks):
                for block in blocks:
                    nbytes = sum(x.nbytes for _, x in tree_flatten(block.parameters()))
                    machine.compute(work * nbytes * 1e-6)
    ratio = machine.now / max(machine.reading, machine.computing)
    print(f"{ratio:.3f}")
    if cast_by == "reader":
        assert ratio <= 1.15
    elif work == 1:
        assert ratio > 1.5
