"""Weights are read and cast beside the computation: no operation on the computing stream waits for a file."""

import io
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from flux2_mlx.convert import requantize
from helpers.checkpoints import SHALLOW_TEXT, SHALLOW_VARIANT, convert, save_small
from mlx.utils import tree_flatten

from flux2_mlx.checkpoint import Checkpoint, Component
from flux2_mlx.streaming import Reading, load_streamed
from flux2_mlx.weights import READER, Files, read_header

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


class Watch:
    """What MLX is told to evaluate: how many tensors of files it `read`, the `faults` (operations that it was to do in
    one go with reading what they need), and the arrays that were on their way when last heard of."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.read, self.faults, self.underway = 0, set(), set()
        self._evaluate, self._begin = mx.eval, mx.async_eval
        patch.setattr(mx, "eval", self.evaluate)
        patch.setattr(mx, "async_eval", self.begin)

    def evaluate(self, *arrays) -> None:
        self._look(arrays)
        self.underway -= {id(array) for _, array in tree_flatten(list(arrays))}
        self._evaluate(*arrays)

    def begin(self, *arrays) -> None:
        self._look(arrays)
        self.underway |= {id(array) for _, array in tree_flatten(list(arrays))}
        self._begin(*arrays)

    def _look(self, arrays) -> None:
        graph = io.StringIO()
        mx.export_to_dot(graph, *(array for _, array in tree_flatten(list(arrays))))
        operations = re.findall(r'label ="(\w+)"', graph.getvalue())
        if "Load" in operations:
            self.read += operations.count("Load")
            self.faults |= set(operations) - {"Load", "AsType"}  # where it is cast `busy` shows


@contextmanager
def watched(*components: Component) -> Iterator[Watch]:
    """In the body all tensors of `components` must be read, each by itself."""
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        yield watch
    assert watch.faults == set()
    assert watch.read == sum(len(read_header(file)) for component in components for file in component.files)


@contextmanager
def busy() -> Iterator[None]:
    """The computing stream is busy longer than the body takes, which must not need it; if it is not, with more work."""
    numbers = mx.random.uniform(shape=(1_000_000,), key=mx.random.key(0))
    mx.eval(numbers)
    work = [mx.sort(numbers + number) for number in range(4)]
    start = time.perf_counter()
    mx.async_eval(*work)
    yield
    body = time.perf_counter() - start
    mx.eval(work)
    assert body < (time.perf_counter() - start) / 2


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "official"
    return save_small(folder, text=SHALLOW_TEXT)


@pytest.fixture(scope="module")
def plain(official) -> Checkpoint:
    return Checkpoint.open(convert(official, official.with_name("plain"), variant=SHALLOW_VARIANT))


@pytest.fixture(scope="module")
def packed(official) -> Checkpoint:
    folder = convert(official, official.with_name("packed"), "qint8", "qint8", variant=SHALLOW_VARIANT)
    return Checkpoint.open(folder)


def test_operations_on_unread_arrays_are_found(plain):
    file = plain.components["vae"].files[0]
    tensors = Files([file])
    arrays = list(tensors.read(tensors.infos))
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        mx.async_eval(arrays[0].astype(mx.float32, stream=READER))
        mx.eval(arrays[1])
        assert (watch.read, watch.faults) == (2, set())
        mx.eval({"two": [mx.isfinite(x) for x in arrays[2:4]]})
        assert watch.read == 4
        assert watch.faults
    with pytest.raises(AssertionError), busy():
        mx.eval([x.astype(mx.float16) for x in arrays[4:8]])


@pytest.mark.parametrize("quant", [None, "qint8", "qint4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loading(plain, dtype, quant):
    for name, component in plain.components.items():
        with watched(component):
            component.load(dtype, quant if name != "vae" else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "packed"])
def test_streaming(form, dtype, request):
    component = request.getfixturevalue(form).components["transformer"]
    with watched(component) as watch:
        network = load_streamed(component, dtype, 1, Reading())
        for blocks in (network.double_blocks, network.single_blocks):
            for block in blocks:
                assert not watch.underway & {id(array) for _, array in tree_flatten(block.parameters())}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "packed"])
def test_loading_and_streaming_leave_the_computing_stream_alone(form, dtype, request):
    component = request.getfixturevalue(form).components["transformer"]
    with busy():
        component.load(dtype)
        network = load_streamed(component, dtype, 1, Reading())
        for blocks in (network.double_blocks, network.single_blocks):
            list(blocks)


def test_conversion(official, tmp_path, monkeypatch):
    taken, read = [], Files.read

    def counted(files: Files, names: Iterable[str]) -> Iterator[mx.array]:
        return read(files, (taken.append(name) or name for name in names))

    monkeypatch.setattr(Files, "read", counted)
    watch = Watch(monkeypatch)
    convert(official, tmp_path / "converted", "qint4", "qint4", variant=SHALLOW_VARIANT)
    assert watch.faults == set()
    assert watch.read == len(taken) > 100


def test_requantizing(plain, tmp_path):
    changed = [component for name, component in plain.components.items() if name != "vae"]  # whose bytes are copied
    with watched(*changed):
        requantize(plain, tmp_path / "fewer", "qint8", "qint8")
