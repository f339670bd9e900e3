"""`models` and `models rm` on a disk with conversions, sources, leftovers and what belongs to others."""

import json
import os
import shutil
import time
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.cli_runner import DEMO, done, refusal, run
from helpers.hub_client import BIG, NEEDED, REPO, fetch_here, storage, using
from helpers.hub_server import HubServer

from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoint import sealed
from flux2_mlx.embedding_cache import EmbeddingCache
from flux2_mlx.store import find_checkpoint

KLEIN = "black-forest-labs/FLUX.2-klein-4B"
KEY = "0" * 64
OTHERS = {"README.md": b"# Model", "single.safetensors": b"5" * 1000}


def checkpoint(folder: Path, **changes: object) -> Path:
    """A copy of the demo whose manifest says something else."""
    folder.mkdir(parents=True)
    for name in ("transformer", "text_encoder", "language_model", "vae", "tokenizer", "scheduler"):
        if (DEMO / name).exists():
            shutil.copytree(DEMO / name, folder / name)
    shutil.copy(DEMO / "tensors.json", folder)
    manifest = json.loads((DEMO / "flux2.json").read_text()) | changes
    (folder / "flux2.json").write_text(json.dumps(sealed(manifest)))
    return folder


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def hub(home):
    with HubServer({REPO: NEEDED, KLEIN: NEEDED}) as server, using(server, home):
        yield server


@pytest.fixture
def disk(hub, home, models, tmp_path):
    """All kinds of things."""
    checkpoint(models / "klein-4b-qint8", variant="klein-4b", source={"name": KLEIN})
    checkpoint(models / "org--model-bf16", variant="klein-4b", source={"name": REPO})
    damaged = checkpoint(models / "klein-9b-qint4", variant="klein-9b", source={"name": "x/y"})
    (damaged / "flux2.json").write_bytes(b"{")
    fetch_here(KLEIN)
    EmbeddingCache(models / "prompts").put(KEY, mx.ones((30, 50)))
    EmbeddingCache(models / "unfinished").put(KEY, mx.ones((30, 50)))
    (models / "prompts/mine.txt").write_text("precious")
    work = models / ".flux2-mlx-convert-abc"
    (work / "new/vae").mkdir(parents=True)
    (work / "new/vae/model.safetensors").write_bytes(b"1" * 5000)
    (work / "flux2-mlx-convert.json").write_text(
        json.dumps({"made_by": "flux2-mlx convert", "target": "klein-9b-bf16"})
    )
    (models / "notes.txt").write_text("precious")
    (models / "pictures").mkdir()
    (models / "pictures/a.png").write_bytes(b"precious")
    elsewhere = checkpoint(tmp_path / "elsewhere", variant="klein-4b")
    (models / "linked").symlink_to(elsewhere)
    return models


def items(*arguments: str) -> list[dict]:
    return json.loads(done("models", "--json", *arguments).stdout)["items"]


def listed() -> set[tuple[str, str, str]]:
    return {(item["kind"], item["name"], item["note"]) for item in items()}


EVERYTHING = {
    ("converted", "klein-4b-qint8", "bf16, text bf16"),
    ("converted", "org--model-bf16", "bf16, text bf16"),
    ("converted", "klein-9b-qint4", "damaged"),
    ("source", KLEIN, "download"),
    ("prompts", "prompts", "1 encoded prompts"),
    ("unfinished", "unfinished", "1 images to be decoded"),
    ("leftover", ".flux2-mlx-convert-abc", "of klein-9b-bf16"),
    ("other", "notes.txt", "not ours"),
    ("other", "pictures", "not ours"),
    ("other", "linked", "a link"),
}


def missing(*arguments: str) -> set[tuple[str, str]]:
    """What `models rm` with these arguments removes from the list."""
    before = listed()
    done("models", "rm", *arguments, "--yes")
    assert listed() <= before
    return {(kind, name) for kind, name, _ in before - listed()}


def test_nothing(models, hub):
    folder = f"converted models are in {models}"
    assert done("models").stdout == f"0 bytes can be removed with `flux2-mlx models rm`; {folder}\n"
    assert items() == []
    assert not models.exists()


def test_all_kinds(disk, home):
    assert listed() == EVERYTHING
    for item in items():
        path = Path(item["path"])
        assert item["removable"] == (item["kind"] != "other")
        if item["kind"] in ("converted", "leftover"):
            sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
            assert item["bytes"] == sum(sizes)
    (source,) = (item for item in items() if item["kind"] == "source")
    assert source["bytes"] == sum(map(len, NEEDED.values()))
    assert source["path"] == str(home / "hub/models--black-forest-labs--FLUX.2-klein-4B")


def test_the_table(disk):
    os.utime(disk / "klein-4b-qint8/flux2.json", (0, 86_400))
    rows = done("models").stdout.splitlines()
    (row,) = (row for row in rows if "klein-4b-qint8" in row)
    assert row.split() == ["converted", "klein-4b-qint8", "7.5", "MB", "1970-01-02", "bf16,", "text", "bf16"]
    assert rows[-1].endswith(f" can be removed with `flux2-mlx models rm`; converted models are in {disk}")
    assert len({row.index("  20") for row in rows[:-1] if "  20" in row}) == 1


@pytest.mark.parametrize(
    ("arguments", "removed"),
    [
        (["klein-4b-qint8"], {("converted", "klein-4b-qint8")}),
        (["KLEIN-4B-QINT8"], {("converted", "klein-4b-qint8")}),
        (["org/model"], {("converted", "org--model-bf16")}),
        (["klein-9b-qint4"], {("converted", "klein-9b-qint4")}),
        (["klein-4b", "--only", "source"], {("source", KLEIN)}),
        ([KLEIN, "--only", "converted"], {("converted", "klein-4b-qint8")}),
        (["klein-4b"], {("converted", "klein-4b-qint8"), ("source", KLEIN)}),
        (["--prompts"], {("prompts", "prompts")}),
        (["--leftovers"], {("unfinished", "unfinished"), ("leftover", ".flux2-mlx-convert-abc")}),
        (["klein-9b-qint4", "--prompts"], {("converted", "klein-9b-qint4"), ("prompts", "prompts")}),
    ],
)
def test_what_is_removed(arguments, removed, disk, tmp_path):
    assert missing(*arguments) == removed
    assert (disk / "notes.txt").read_text() == (disk / "prompts/mine.txt").read_text() == "precious"
    assert (disk / "pictures/a.png").is_file()
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} >= {"flux2.json", "transformer", "vae"}


@pytest.mark.parametrize("name", ["nonsense", "notes", "prompts", "demo", "../work", "/", ".", "*", ""])
def test_what_is_no_name(name, disk):
    message = refusal("models", "rm", name, "--yes")
    assert message == f"there is nothing called {name!r}; `flux2-mlx models` lists what there is"
    assert listed() == EVERYTHING


@pytest.mark.parametrize(("name", "what"), [("notes.txt", "not ours"), ("pictures", "not ours"), ("linked", "a link")])
def test_what_is_not_ours_is_refused(name, what, disk):
    assert refusal("models", "rm", name, "--yes") == f"{disk / name} is {what}, so it stays; remove it yourself"
    assert refusal("models", "rm", "klein-4b-qint8", name, "--yes").endswith("remove it yourself")
    assert listed() == EVERYTHING


def test_it_asks(disk):
    shown = run("models", "rm", "klein-4b", stdin="n\n")
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert f"converted klein-4b-qint8: 7.5 MB, {disk / 'klein-4b-qint8'}\n" in shown.stderr
    assert "Remove 8.1 MB? [y/N]: " in shown.stderr
    assert shown.stderr.endswith("Error: nothing was removed; answer y, or pass --yes\n")
    assert run("models", "rm", "klein-4b", "--quiet", stdin="").stderr.endswith("answer y, or pass --yes\n")
    assert listed() == EVERYTHING
    assert done("models", "rm", "klein-4b-qint8", stdin="y\n").stdout == f"{disk / 'klein-4b-qint8'}\n"
    assert not (disk / "klein-4b-qint8").exists()


def test_quiet(disk):
    assert done("models", "rm", "klein-4b-qint8", "--yes", "--quiet").stderr == ""


def test_nothing_named(disk):
    assert run("models", "rm", "--yes").exit_code == 2


def test_foreign_files_and_links_in_a_checkpoint_stay(disk, tmp_path):
    folder = disk / "klein-4b-qint8"
    (folder / "vae/mine.txt").write_text("precious")
    (folder / "lora").mkdir()
    (folder / "lora/a.safetensors").write_bytes(b"precious")
    (tmp_path / "disk").mkdir()
    shutil.move(folder / "transformer", tmp_path / "disk/transformer")
    (folder / "transformer").symlink_to(tmp_path / "disk/transformer")
    weights = next((tmp_path / "disk/transformer").glob("*.safetensors"))
    result = done("models", "rm", "klein-4b-qint8", "--yes")
    assert "files that are not ours stay, such as " in result.stderr
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()) == [
        "lora/a.safetensors",
        "vae/mine.txt",
    ]
    assert weights.is_file()
    assert (folder / "transformer").is_symlink()


def test_what_is_half_removed_is_still_known(disk, monkeypatch):
    real, left = Path.unlink, [3]

    def unlink(path, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(30, "Read-only file system", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert refusal_after_asking("klein-4b-qint8").endswith(": Read-only file system")
    monkeypatch.undo()


def refusal_after_asking(name: str) -> str:
    result = run("models", "rm", name, "--yes", "--quiet")
    assert result.exit_code == 1
    assert "klein-4b-qint8" in {item["name"] for item in items()}
    return result.stderr.strip()


def test_what_others_have_fetched_of_a_repo_stays(home, models):
    with HubServer({KLEIN: NEEDED | OTHERS}) as hub, using(hub, home):
        folder = fetch_here(KLEIN)
        for name, data in OTHERS.items():
            blob = folder.parent.parent / "blobs" / hub.repos[KLEIN].etag(name)
            blob.write_bytes(data)
            (folder / name).symlink_to(os.path.relpath(blob, folder))
        (models / "x").mkdir(parents=True)
    with using(hub, home):
        result = done("models", "rm", "klein-4b", "--yes")
        assert "2 files that are not ours stay, such as " in result.stderr
        assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == OTHERS
        assert len(list((folder.parent.parent / "blobs").iterdir())) == 2
        assert "source" not in {item["kind"] for item in items()}


def test_a_source_is_removed_with_all_that_the_hub_s_library_notes(disk, home):
    done("models", "rm", KLEIN, "--only", "source", "--yes")
    assert [path for path in home.rglob("*") if not path.is_dir()] == []
    assert not (home / "hub/models--black-forest-labs--FLUX.2-klein-4B").exists()


def test_a_download_that_was_cut_short(hub, home, models):
    part = storage(home) / "blobs" / (hub.repos[REPO].etag(BIG) + ".flux2-mlx.incomplete")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"4" * 300_000)
    assert listed() == {("source", REPO, "incomplete")}
    assert items()[0]["bytes"] == 300_000
    assert missing(REPO) == {("source", REPO)}
    assert not storage(home).exists()


def test_what_is_no_flux_2_in_the_cache_is_not_listed(hub, home, models):
    other = home / "hub/models--some--llm/snapshots/a"
    other.mkdir(parents=True)
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (home / "hub/datasets--a--b").mkdir()
    assert listed() == set()
    (other / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    assert listed() == {("source", "some/llm", "download")}


def test_a_linked_source_is_not_followed(hub, home, models, tmp_path):
    fetch_here(KLEIN)
    real = shutil.move(home / "hub/models--black-forest-labs--FLUX.2-klein-4B", tmp_path / "real")
    link = home / "hub/models--black-forest-labs--FLUX.2-klein-4B"
    link.symlink_to(real)
    assert listed() == {("source", KLEIN, "a link")}
    assert refusal("models", "rm", "klein-4b", "--yes") == f"{link} is a link, so it stays; remove it yourself"


def test_the_time_of_the_last_use(models, hub):
    folder = checkpoint(models / "org--model-bf16", variant="demo", source={"name": REPO})
    os.utime(folder / "flux2.json", (86_400, 86_400))
    assert items()[0]["last_used"].startswith("1970")
    before = int(time.time())
    Flux2Pipeline.from_pretrained(REPO)
    assert find_checkpoint(REPO) == folder
    (item,) = items()
    assert item["last_used"] >= time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(before))
    assert done("models", "verify", "org--model-bf16", "--quiet").exit_code in (0, 1)
    assert missing("org--model-bf16") == {("converted", "org--model-bf16")}
    assert not folder.exists()


def test_the_folder_may_be_said_before_or_after(disk, tmp_path):
    other = checkpoint(tmp_path / "others/klein-4b-bf16", source={"name": "klein-4b"})
    assert "klein-4b-bf16" in {item["name"] for item in items("--models-dir", str(other.parent))}
    done("models", "--models-dir", str(other.parent), "rm", "klein-4b", "--only", "converted", "--yes")
    assert not other.exists()
    assert listed() == EVERYTHING


def test_a_conversion_that_goes_on_is_left_alone(disk):
    import fcntl

    with (disk / ".flux2-mlx-convert-abc/flux2-mlx-convert.json").open() as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        assert ("other", ".flux2-mlx-convert-abc", "being written") in listed()
        assert missing("--leftovers") == {("unfinished", "unfinished")}
    assert (disk / ".flux2-mlx-convert-abc/new/vae/model.safetensors").is_file()


def test_cache_is_an_alias_that_the_help_does_not_list(disk):
    assert json.loads(done("cache", "--json").stdout)["entries"] == 1
    commands = run("--help").stdout
    assert "models" in commands
    assert "\n  cache " not in commands
