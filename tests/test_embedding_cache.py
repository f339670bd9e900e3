"""Encoded prompts on disk: bits, keys, the limit, damage, several processes, folders that can't be written."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.cached_prompts import (
    FORM,
    IMAGE,
    KEYS,
    OTHER,
    PART,
    STATES,
    bits,
    failing,
    kept,
    open_demo,
    path_of,
    states_of,
)
from helpers.checkpoints import edit_json
from helpers.cli_runner import DEMO, PROMPT
from safetensors.numpy import save_file

from flux2_mlx import CheckpointError, Flux2Pipeline, embedding_cache
from flux2_mlx.cached_encoder import entry_key
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.config import VARIANTS
from flux2_mlx.embedding_cache import Form
from flux2_mlx.request import Progress

pytestmark = pytest.mark.usefixtures("models")


def encoder_file(folder: Path) -> Path:
    return folder / "text_encoder" / "model.safetensors"


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
    pipe, heard = open_demo(keep=False), []
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


@pytest.mark.parametrize("place", ["flux2_mlx.__version__", "flux2_mlx.cached_encoder.FORMAT_VERSION"])
def test_another_version_has_other_keys(place, monkeypatch, loads):
    open_demo().encode_prompt(PROMPT)
    monkeypatch.setattr(place, "another", raising=False)
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
    pipe = open_demo(keep=False)
    missed = pipe.encode_prompt(PROMPT)
    (entry,) = pipe.prompt_cache.entries()
    os.truncate(entry.path, entry.size // 2)
    assert bits(pipe.encode_prompt(PROMPT)) == bits(missed) == bits(pipe.encode_prompt(PROMPT))
    assert loads == ["text_encoder"] * 2


def test_states_that_are_a_view_of_others_are_kept_in_order(cache):
    cache.put(KEYS[0], STATES.T)
    assert bits(cache.get(KEYS[0], Form((50, 30), mx.bfloat16))) == bits(STATES.T)
