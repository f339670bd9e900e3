"""Encoded prompts on disk, as the command line keeps, shows and clears them."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.cli_runner import PROMPT, done, refusal

from flux2_mlx import Flux2Pipeline
from flux2_mlx.embedding_cache import Form
from flux2_mlx.errors import InputError

IMAGE = ("-m", "demo", "-W", "32", "-H", "32", "-s", "1", "--seed", "5")
KEYS = ["0" * 64, "1" * 64]
STATES = mx.ones((30, 50), mx.bfloat16)
FORM = Form(STATES.shape, STATES.dtype)

pytestmark = pytest.mark.usefixtures("models")


def report(*arguments: object) -> dict:
    return json.loads(done("cache", "--json", *arguments).stdout)


def test_t2i_keeps_prompts_in_the_models_folder_and_makes_the_same_file_from_them(models, tmp_path, loads):
    for name in ("a.png", "b.png"):
        done("t2i", PROMPT, *IMAGE, "-o", name)
    assert loads.count("text_encoder") == 1
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert [path.name for path in models.iterdir()] == ["prompts"]
    done("t2i", PROMPT, *IMAGE, "-o", "c.png", "--models-dir", tmp_path / "others")
    assert loads.count("text_encoder") == 2
    moved = report("--models-dir", tmp_path / "others")
    assert (moved["folder"], moved["entries"]) == (str(tmp_path / "others/prompts"), 1)


def test_t2i_without_the_cache_neither_reads_nor_writes_it(models, loads):
    done("t2i", PROMPT, *IMAGE, "-o", "a.png", "--no-cache")
    assert not models.exists()
    Flux2Pipeline.from_pretrained("demo").encode_prompt(PROMPT)
    done("t2i", PROMPT, *IMAGE, "-o", "b.png", "--no-cache")
    assert loads.count("text_encoder") == 3


def test_cache_shows_what_is_kept(cache):
    empty = {"folder": str(cache.folder), "entries": 0, "bytes": 0, "limit": 10**9}
    assert report() == empty
    assert not cache.folder.exists()
    for key in KEYS:
        cache.put(key, STATES)
    size = sum(path.stat().st_size for path in cache.folder.iterdir())
    assert report() == empty | {"entries": 2, "bytes": size}
    assert done("cache").stdout == f"2 encoded prompts, 0.0 of 1000.0 MB, in {cache.folder}\n"


def test_clear_removes_what_is_ours_and_nothing_else(cache):
    cache.put(KEYS[0], STATES)
    (cache.folder / ".flux2-mlx-1-0123456789abcdef.part").touch()
    for name in ("mine.safetensors", "prompts.txt"):
        (cache.folder / name).touch()
    assert report("--clear")["entries"] == 0
    assert sorted(path.name for path in cache.folder.iterdir()) == ["mine.safetensors", "prompts.txt"]


def test_what_can_not_be_removed_is_told(cache):
    path = cache.folder / f"{KEYS[0]}.safetensors"
    path.mkdir(parents=True)
    assert refusal("cache", "--clear").startswith(f"can't remove {path}: ")
    assert cache.get(KEYS[0], FORM) is None


def test_the_limit_may_be_set_in_the_environment(monkeypatch, cache):
    monkeypatch.setenv("FLUX2_MLX_CACHE_BYTES", "5000")
    assert report()["limit"] == 5000
    Flux2Pipeline.from_pretrained("demo").encode_prompt(PROMPT)  # of 48 × 192 floats
    assert cache.entries() == []
    monkeypatch.setenv("FLUX2_MLX_CACHE_BYTES", "1GB")
    with pytest.raises(InputError, match="FLUX2_MLX_CACHE_BYTES must be a number of bytes, got '1GB'"):
        Flux2Pipeline.from_pretrained("demo")
