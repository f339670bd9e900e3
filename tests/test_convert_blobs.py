"""A source in the Hub's cache is compared with the hashes that its blobs are named by."""

import hashlib
import os
from pathlib import Path

import pytest
from helpers.checkpoints import WEIGHTS, convert, save_small

from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.errors import CheckpointError


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A model as huggingface_hub keeps it: links to blobs, which SHA-256 or git's SHA-1 names."""
    source, repo = save_small(tmp_path / "model"), tmp_path / "models--org--model"
    (repo / "blobs").mkdir(parents=True)
    for path in [path for path in source.rglob("*") if path.is_file()]:
        data, link = path.read_bytes(), repo / "snapshots" / "main" / path.relative_to(source)
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = repo / "blobs" / (hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else git)
        path.replace(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repo / "snapshots" / "main"


def test_a_whole_source_is_converted(cached, tmp_path):
    counts = []
    Checkpoint.open(convert(cached, tmp_path / "out", progress=lambda *done: counts.append(done)))
    assert counts[-1][0] == counts[-1][1] > sum(path.stat().st_size for path in cached.rglob("*.safetensors"))


@pytest.mark.parametrize("name", [*WEIGHTS.values(), "tokenizer/tokenizer.json", "model_index.json"])
def test_a_blob_of_other_content_and_the_right_size_is_refused(name, cached, tmp_path):
    blob = (cached / name).resolve()
    data = bytearray(blob.read_bytes())
    place = data.rindex(b" ") if name.endswith(".json") else len(data) - 2  # nothing else finds it wrong
    data[place] = data[place] ^ 1 if name.endswith(".safetensors") else ord("\t")
    blob.write_bytes(data)
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointError) as caught:
        convert(cached, tmp_path / "models" / "out")
    found = hashlib.sha256(data) if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % len(data) + data)
    assert str(caught.value) == (
        f"{cached / name} is damaged: its hash is {found.hexdigest()}, the Hub states {blob.name}; delete {blob} and "
        "download the model again"
    )
    assert not list((tmp_path / "models").iterdir())


def test_what_only_looks_like_a_cache_is_not_compared(cached, tmp_path):
    cached.parent.parent.joinpath("blobs").rename(cached.parent.parent / "files")
    for path in cached.rglob("*"):
        if path.is_symlink():
            target = path.parent / str(path.readlink()).replace("blobs", "files")
            path.unlink()
            path.symlink_to(target)
    blob = (cached / WEIGHTS["vae"]).resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    Checkpoint.open(convert(cached, tmp_path / "out"))
