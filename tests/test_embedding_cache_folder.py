"""The folder of encoded prompts: several processes, killed ones, and disks that are full or read-only."""

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cached_prompts import FORM, IMAGE, KEYS, OTHER, PART, STATES, bits, failing, kept, open_demo, path_of
from helpers.cli_runner import PROMPT

from flux2_mlx import InputError
from flux2_mlx.config import VARIANTS
from flux2_mlx.embedding_cache import EmbeddingCache
from flux2_mlx.store import converted_folders

pytestmark = pytest.mark.usefixtures("models")


def start(script: str, cache: EmbeddingCache, *arguments: str) -> subprocess.Popen:
    """A process that runs `script` with `cache` at hand."""
    head = f"""
import os, random, sys, time
from pathlib import Path
import mlx.core as mx
from flux2_mlx.embedding_cache import EmbeddingCache
from helpers.cached_prompts import FORM, KEYS, STATES, bits, states_of
cache = EmbeddingCache(Path({str(cache.folder)!r}), {cache.max_bytes})
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", head + script, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_several_processes_may_use_one_folder(cache):
    cache.max_bytes = 20_000  # fewer than there are keys, so that entries also vanish
    script = """
random.seed(sys.argv[1])
for _ in range(200):
    key = random.choice(KEYS[:8])
    states = cache.get(key, FORM)
    if states is None:
        cache.put(key, states_of(key))
    elif bits(states) != bits(states_of(key)):
        sys.exit("wrong states")
print(cache._warned)
"""
    processes = [start(script, cache, str(seed)) for seed in range(3)]
    for process in processes:
        assert process.communicate(timeout=120) == ("False\n", None)
        assert process.returncode == 0
    cache.put(KEYS[8], STATES)  # several may have made room for themselves at once; the next one sets that right
    entries = cache.entries()
    assert 3 <= len(entries) == len(list(cache.folder.iterdir()))
    assert sum(entry.size for entry in entries) <= cache.max_bytes


def test_a_killed_writer_leaves_no_entry_and_is_cleaned_up_after(cache):
    script = """
def stall(descriptor):
    print("writing", flush=True)
    time.sleep(60)
os.fsync = stall
cache.put(KEYS[0], STATES)
"""
    process = start(script, cache)
    assert process.stdout.readline() == "writing\n"
    (partial,) = cache.folder.iterdir()
    assert cache.entries() == []
    assert cache.get(KEYS[0], FORM) is None
    cache.put(KEYS[0], STATES)
    assert bits(cache.get(KEYS[0], FORM)) == bits(STATES)
    assert partial.exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cache.put(KEYS[1], STATES)
    assert sorted(cache.folder.iterdir()) == [path_of(cache, key) for key in KEYS[:2]]


def test_files_that_another_process_has_removed_are_passed_over(cache, caplog):
    cache.put(KEYS[0], STATES)
    for name in (f"{KEYS[1]}.safetensors", PART):
        (cache.folder / name).symlink_to("gone")
    cache.put(KEYS[2], STATES)
    assert sorted(kept(cache)) == [KEYS[0], KEYS[2]]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("os.replace", errno.EROFS),
        ("pathlib.Path.mkdir", errno.EACCES),
        ("os.write", errno.ENOSPC),
    ],
)
def test_a_folder_that_can_not_be_written_is_told_once(place, code, monkeypatch, caplog):
    expected = open_demo(prompt_cache=False)(PROMPT, **IMAGE).images[0]
    monkeypatch.setattr(place, failing(code))
    pipe = open_demo()
    assert pipe([PROMPT, OTHER], **IMAGE).images[0] == expected
    (record, _) = caplog.records  # the other is about denoised images
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"can't keep encoded prompts in {pipe.prompt_cache.folder}: {os.strerror(code)}"
    assert list(pipe.prompt_cache.folder.glob("*")) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("mine"),
        lambda path: path.symlink_to("gone"),
        lambda path: path.symlink_to(path),
        os.mkfifo,
    ],
    ids=["a file", "a link to nowhere", "a link to itself", "a FIFO"],
)
def test_something_else_in_the_place_of_the_folder(make, models, caplog):
    models.mkdir()
    make(models / "prompts")
    before = (models / "prompts").lstat()
    pipe = open_demo()
    pipe(PROMPT, **IMAGE)
    assert caplog.text.count("can't keep encoded prompts") == 1
    assert pipe.prompt_cache.entries() == []
    pipe.prompt_cache.clear()
    assert (models / "prompts").lstat().st_ino == before.st_ino


def test_a_folder_whose_entries_can_not_be_looked_at(cache, monkeypatch):
    cache.put(KEYS[0], STATES)
    monkeypatch.setattr(Path, "stat", failing(errno.EACCES))
    assert cache.entries() == []


@pytest.mark.parametrize("text", ["-1", "1e9", "9" * 5000])
def test_the_limit_is_a_number_of_bytes(text, monkeypatch, tmp_path):
    monkeypatch.setenv("FLUX2_MLX_CACHE_BYTES", text)
    with pytest.raises(InputError, match=r"must be a number of bytes, got '.{1,40}'$"):
        EmbeddingCache(tmp_path)


def test_a_read_only_folder_still_gives_what_it_holds(cache, monkeypatch):
    cache.put(KEYS[0], STATES)
    monkeypatch.setattr(os, "utime", failing(errno.EROFS))
    assert bits(cache.get(KEYS[0], FORM)) == bits(STATES)


def test_the_folder_is_no_model(models):
    open_demo().encode_prompt(PROMPT)
    assert (models / "prompts").is_dir()
    assert converted_folders() == {name: [] for name in VARIANTS}
