"""Encoded prompts on disk: bits, keys, the limit, damage, several processes, folders that can't be written."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import edit_json
from cli_runner import DEMO, PROMPT
from safetensors.numpy import save_file

from flux2_mlx import CheckpointError, Flux2Pipeline, InputError, embedding_cache
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.config import VARIANTS
from flux2_mlx.embedding_cache import EmbeddingCache, Form, entry_key
from flux2_mlx.phases import Progress
from flux2_mlx.store import converted_folders

OTHER = "a large green ring on a white background"
IMAGE = {"height": 32, "width": 32, "num_inference_steps": 1, "seed": 5}
KEYS = [character * 64 for character in "0123456789abcdef"]
STATES = mx.arange(1500).reshape(30, 50).astype(mx.bfloat16)  # 3000 bytes
FORM = Form(STATES.shape, STATES.dtype)
PART = ".flux2-mlx-1-0123456789abcdef.part"

pytestmark = pytest.mark.usefixtures("models")


def open_demo(**options) -> Flux2Pipeline:
    return Flux2Pipeline.from_pretrained("demo", **options)


def bits(states: mx.array) -> tuple:
    return states.dtype, states.shape, np.array(states.view(mx.uint8)).tobytes()


def states_of(key: str) -> mx.array:
    """What the tests keep under `key`."""
    return STATES + KEYS.index(key)


def encoder_file(folder: Path) -> Path:
    return folder / "text_encoder" / "model.safetensors"


def path_of(cache: EmbeddingCache, key: str) -> Path:
    return cache.folder / f"{key}.safetensors"


def kept(cache: EmbeddingCache) -> list[str]:
    return [entry.path.stem for entry in cache.entries()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hit_has_the_bits_of_a_miss(dtype, loads):
    missed = open_demo(dtype=dtype).encode_prompt([PROMPT, OTHER])
    hit = open_demo(dtype=dtype).encode_prompt([PROMPT, OTHER])
    assert loads == ["text_encoder"]
    assert bits(hit) == bits(missed) == bits(open_demo(dtype=dtype, prompt_cache=False).encode_prompt([PROMPT, OTHER]))
    assert hit.dtype == getattr(mx, dtype)


def test_the_image_of_a_hit_is_that_of_a_miss_and_needs_no_encoder(loads):
    missed, hit = open_demo()([PROMPT, OTHER], **IMAGE), open_demo()([PROMPT, OTHER], **IMAGE)
    assert loads == ["text_encoder", "transformer", "vae", "transformer", "vae"]
    assert [image.tobytes() for image in hit.images] == [image.tobytes() for image in missed.images]
    assert [phase.name for phase in hit.timings] == ["text_encoder", "transformer", "vae"]


def test_only_new_prompts_are_encoded(loads):
    pipe, heard = open_demo(), []
    pipe.encode_prompt(PROMPT)
    pipe.run(pipe.request([PROMPT, OTHER], height=32, width=32, steps=1), on_progress=heard.append)
    assert loads == ["text_encoder", "text_encoder", "transformer", "vae"]
    assert heard[:3] == [Progress("text_encoder", number, 2) for number in range(3)]
    assert len(pipe.prompt_cache.entries()) == 2


def test_a_prompt_that_is_cut_is_told_every_time(caplog):
    pipe = open_demo()
    for _ in range(2):
        caplog.clear()
        pipe.encode_prompt(PROMPT, max_sequence_length=8)
        assert "the model sees the first 8" in caplog.text
    assert len(pipe.prompt_cache.entries()) == 1


@pytest.mark.parametrize(
    ("settings", "length"), [({"text_quant": "qint8"}, 48), ({"dtype": "float16"}, 48), ({}, 47)], ids=str
)
def test_other_settings_need_the_encoder(settings, length, loads):
    open_demo().encode_prompt(PROMPT)
    states = open_demo(**settings).encode_prompt(PROMPT, length)
    assert loads == ["text_encoder"] * 2
    assert bits(states) == bits(open_demo(**settings, prompt_cache=False).encode_prompt(PROMPT, length))


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts | {"fingerprint": "0"},
        lambda facts: facts | {"checkpoint": replace(facts["checkpoint"], variant=VARIANTS["klein-4b"])},
        lambda facts: facts | {"quant": "qint8"},
        lambda facts: facts | {"dtype": mx.bfloat16},
        lambda facts: facts | {"ids": facts["ids"] + 1},
        lambda facts: facts | {"mask": ~facts["mask"]},
        lambda facts: facts | {"ids": facts["ids"][:, :-1], "mask": facts["mask"][:, :-1]},
    ],
    ids=["weights", "variant", "quant", "dtype", "ids", "mask", "length"],
)
def test_the_key_depends_on(change):
    checkpoint = Checkpoint.open(DEMO)
    ids, mask = checkpoint.tokenizer([PROMPT], 48)
    facts = {
        "checkpoint": checkpoint,
        "fingerprint": "1",
        "quant": "bf16",
        "dtype": mx.float32,
        "ids": ids,
        "mask": mask,
    }
    assert entry_key(**facts) == entry_key(**facts)
    assert entry_key(**change(facts)) != entry_key(**facts)


@pytest.mark.parametrize("name", ["__version__", "FORMAT_VERSION"])
def test_another_version_has_other_keys(name, monkeypatch, loads):
    open_demo().encode_prompt(PROMPT)
    monkeypatch.setattr(embedding_cache, name, "another")
    open_demo().encode_prompt(PROMPT)
    assert loads == ["text_encoder"] * 2


def copy_of_demo(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "mine")


def invert(path: Path, position: int) -> None:
    """Change one byte of a file, which keeps the times it was changed at as far as that can be asked for."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 64]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("place", [1, 3001])
def test_a_damaged_copy_shares_no_entries_with_the_healthy_model(place, tmp_path, loads):
    folder = copy_of_demo(tmp_path)  # with the same claims in its manifest
    invert(encoder_file(folder), encoder_file(folder).stat().st_size - place)
    damaged = Flux2Pipeline.from_pretrained(folder).encode_prompt(PROMPT)
    healthy = open_demo().encode_prompt(PROMPT)
    assert bits(healthy) == bits(open_demo(prompt_cache=False).encode_prompt(PROMPT)) != bits(damaged)
    assert bits(Flux2Pipeline.from_pretrained(folder).encode_prompt(PROMPT)) == bits(damaged)
    assert loads == ["text_encoder"] * 3


def replace_file(path: Path) -> None:
    """Put another file of the same size and time in the place of this one."""
    copy = shutil.copy2(path, path.with_name("copy"))
    invert(copy, path.stat().st_size - 1)
    os.replace(copy, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: invert(encoder_file(folder), encoder_file(folder).stat().st_size - 1),
        lambda folder: replace_file(encoder_file(folder)),
        lambda folder: edit_json(folder / "text_encoder" / "config.json", rms_norm_eps=1e-3),
        lambda folder: edit_json(folder / "text_encoder" / "config.json", rope_theta=10.0),
    ],
    ids=["a byte", "another file", "eps", "rope"],
)
def test_an_encoder_that_changes_has_other_entries(change, tmp_path, loads):
    folder = copy_of_demo(tmp_path)
    before = Flux2Pipeline.from_pretrained(folder).encode_prompt(PROMPT)
    change(folder)
    after = Flux2Pipeline.from_pretrained(folder).encode_prompt(PROMPT)
    assert bits(after) == bits(Flux2Pipeline.from_pretrained(folder, prompt_cache=False).encode_prompt(PROMPT))
    assert bits(after) != bits(before)
    assert loads == ["text_encoder"] * 3


def test_what_a_manifest_claims_is_nothing_to_the_entries(tmp_path, loads):
    folder = copy_of_demo(tmp_path)
    for source in ({"name": "mine"}, {"name": "demo", "fingerprint": "0"}):
        edit_json(folder / "flux2.json", source=source)
        Flux2Pipeline.from_pretrained(folder).encode_prompt(PROMPT)
    assert loads == ["text_encoder"]


def test_an_encoder_that_has_gone_is_told(tmp_path):
    pipe = Flux2Pipeline.from_pretrained(copy_of_demo(tmp_path))
    encoder_file(tmp_path / "mine").unlink()
    with pytest.raises(CheckpointError, match=r"can't read .*model\.safetensors: No such file"):
        pipe.encode_prompt(PROMPT)


def test_the_least_recently_used_make_room(cache):
    cache.max_bytes = 11_000  # three entries
    for used, key in enumerate(KEYS[:3], 1):
        cache.put(key, states_of(key))
        os.utime(path_of(cache, key), (used, used))
    assert kept(cache) == KEYS[:3]
    cache.get(KEYS[0], FORM)
    cache.put(KEYS[3], states_of(KEYS[3]))
    assert sorted(kept(cache)) == [KEYS[0], KEYS[2], KEYS[3]]
    assert sum(entry.size for entry in cache.entries()) <= cache.max_bytes


def test_what_is_too_large_is_not_kept_and_costs_no_other_entry(cache):
    cache.max_bytes = 5_000
    cache.put(KEYS[0], STATES)
    cache.put(KEYS[1], mx.concatenate([STATES, STATES]))
    assert kept(cache) == KEYS[:1]


def flip_last_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: path.write_bytes(bytes(3000)),
        lambda path: path.write_bytes(path.read_bytes() + b"0"),
        flip_last_bit,
        lambda path: save_file({"states": np.ones((2, 2))}, path),
        lambda path: save_file({"other": np.ones((2, 2), np.float32)}, path, {"sha256": ""}),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"states"', b'"stated"')),
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, 2**40),  # takes no room on the disk, but would in memory
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        lambda path: (path.unlink(), path.symlink_to(path)),
    ],
    ids=[
        "truncated",
        "garbage",
        "too long",
        "a flipped bit",
        "no digest",
        "another file",
        "another name",
        "empty",
        "huge",
        "a FIFO",
        "a device",
        "a link to itself",
    ],
)
def test_a_damaged_entry_is_a_miss_and_replaced(damage: Callable[[Path], None], cache):
    cache.put(KEYS[0], STATES)
    damage(path_of(cache, KEYS[0]))
    assert cache.get(KEYS[0], FORM) is None
    assert not path_of(cache, KEYS[0]).exists()
    cache.put(KEYS[0], STATES)
    assert bits(cache.get(KEYS[0], FORM)) == bits(STATES)


@pytest.mark.parametrize(
    ("key", "states"),
    [
        (KEYS[1], STATES),
        (KEYS[0], STATES.astype(mx.float16)),
        (KEYS[0], STATES.view(mx.float32)),
        (KEYS[0], STATES.T),
        (KEYS[0], STATES[None]),
        (KEYS[0], STATES[:-1]),
        (KEYS[0], mx.where(STATES == 7, mx.nan, STATES).astype(mx.bfloat16)),
        (KEYS[0], mx.where(STATES == 7, -mx.inf, STATES).astype(mx.bfloat16)),
    ],
    ids=["another key", "float16", "float32", "shape", "rank", "length", "no number", "infinite"],
)
def test_an_entry_of_something_else_is_a_miss_and_replaced(key, states, cache):
    cache.folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_cache, "_is_finite", lambda states: True)
        cache.put(key, states)
    path_of(cache, key).rename(path_of(cache, KEYS[0]))
    assert cache.get(KEYS[0], FORM) is None
    assert cache.entries() == []


@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
def test_states_that_are_not_finite_are_not_kept(value, cache):
    cache.put(KEYS[0], mx.where(STATES == 7, value, STATES).astype(mx.bfloat16))
    assert cache.entries() == []


def test_what_can_not_be_removed_does_not_stand_in_the_way_of_others(cache, caplog):
    cache.max_bytes = 7_000
    path_of(cache, KEYS[0]).mkdir(parents=True)
    for key in (KEYS[1], KEYS[2]):
        cache.put(key, states_of(key))
    (cache.folder / PART).symlink_to(PART)
    assert bits(cache.get(KEYS[2], FORM)) == bits(states_of(KEYS[2]))
    assert caplog.text == ""


def test_an_entry_that_can_not_be_read_is_a_miss_and_stays(cache, monkeypatch):
    cache.put(KEYS[0], STATES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(errno.EACCES))
        assert cache.get(KEYS[0], FORM) is None
    assert bits(cache.get(KEYS[0], FORM)) == bits(STATES)


def test_entries_are_as_readable_as_other_files(cache):
    before = os.umask(0o027)
    try:
        cache.put(KEYS[0], STATES)
    finally:
        os.umask(before)
    assert path_of(cache, KEYS[0]).stat().st_mode & 0o777 == 0o640


def test_a_run_with_a_damaged_entry_encodes_again(loads):
    pipe = open_demo()
    missed = pipe.encode_prompt(PROMPT)
    (entry,) = pipe.prompt_cache.entries()
    os.truncate(entry.path, entry.size // 2)
    assert bits(pipe.encode_prompt(PROMPT)) == bits(missed) == bits(pipe.encode_prompt(PROMPT))
    assert loads == ["text_encoder"] * 2


def test_states_that_are_a_view_of_others_are_kept_in_order(cache):
    cache.put(KEYS[0], STATES.T)
    assert bits(cache.get(KEYS[0], Form((50, 30), mx.bfloat16))) == bits(STATES.T)


def start(script: str, cache: EmbeddingCache, *arguments: str) -> subprocess.Popen:
    """A process that runs `script` with `cache` at hand."""
    head = f"""
import os, random, sys, time
from pathlib import Path
import mlx.core as mx
from flux2_mlx.embedding_cache import EmbeddingCache
from test_embedding_cache import FORM, KEYS, STATES, bits, states_of
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


def failing(code: int) -> Callable:
    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    return fail


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
