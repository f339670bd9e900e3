"""What names mean: one table, the same for every command and for Python."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from flux2_mlx.convert import Source
from helpers.cli_runner import DEMO, done, run
from PIL import Image

from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.cli.terminal import line
from flux2_mlx.config import VARIANTS
from flux2_mlx.errors import CheckpointError, DownloadError, InputError
from flux2_mlx.store import find_checkpoint, resolve
from flux2_mlx.store.names import Model, checked_variant, find_variant
from flux2_mlx.upsampling import Writer

COMMIT, OLDER = "a" * 40, "b" * 40
TABLE = {name: ("variant", variant.repo) for name, variant in VARIANTS.items()} | {"demo": ("built-in", str(DEMO))}
KLEIN, BASE, KV, DEV = (TABLE[name] for name in ("klein-4b", "klein-base-4b", "klein-9b-kv", "dev"))
TUNE, TINY = ("repo", "me/tune"), ("repo", "org/flux.2-tiny")
CACHED = f"cache/models--me--tune/snapshots/{COMMIT}"
OFFICIAL = f"cache/models--black-forest-labs--FLUX.2-klein-9B/snapshots/{COMMIT}"
CLOSE = "did you mean klein-4b, klein-9b or klein-9b-kv?"
HUB = "https://huggingface.co/"

# What each name leads to: a kind with the repo, folder or file that is opened; or a part of the refusal.
NAMES: dict[str, tuple[str, str] | str] = {
    # of the table
    **TABLE,
    "KLEIN-4B": KLEIN,
    "klein4b": KLEIN,
    "klein_4b": KLEIN,
    " klein-4b ": KLEIN,
    "FLUX.2-klein-4B": KLEIN,
    "flux2-klein-4b": KLEIN,
    "Flux.2 [klein] 4B": KLEIN,
    "FLUX.2-klein-base-4B": BASE,
    "flux.2-klein-9b-KV": KV,
    "FLUX.2-dev": DEV,
    "Demo": TABLE["demo"],
    "black-forest-labs/FLUX.2-klein-4B": KLEIN,
    "black-forest-labs/flux.2-klein-4b": KLEIN,
    "models--black-forest-labs--FLUX.2-klein-4B": KLEIN,
    # addresses
    f"{HUB}black-forest-labs/FLUX.2-klein-4B": KLEIN,
    f"{HUB}me/tune": TUNE,
    f"{HUB}me/tune/": TUNE,
    f"{HUB}me/tune/tree/main": TUNE,
    f"{HUB}me/tune.git": TUNE,
    f"{HUB}org/folder?library=diffusers#files": ("repo", "org/folder"),
    "huggingface.co/me/tune": TUNE,
    "hf.co/me/tune": TUNE,
    "hf://Me/Tune": ("repo", "Me/Tune"),
    f"{HUB}me/tune/tree/v2": "is a part of me/tune or another revision; give me/tune",
    f"{HUB}me/tune/blob/v2/x.safetensors": "is a part of me/tune or another revision; give me/tune",
    f"{HUB}datasets/me/tune": "is not the page of a model; give it as owner/name",
    f"{HUB}me": "is not the page of a model; give it as owner/name",
    "https://user:secret@example.org/me/tune": "https://example.org/me/tune is no address of Hugging Face; download",
    "https://[/me/tune": "is no address",
    # repos
    "me/tune": TUNE,
    "models--me--tune": TUNE,
    "org/flux.2-tiny": TINY,
    "me/FLUX.2-klein-4B": ("repo", "me/FLUX.2-klein-4B"),
    # paths
    "./klein-4b": ("source", "klein-4b"),
    "klein-4b/": ("source", "klein-4b"),
    "./demo": ("source", "demo"),
    "../work/mine": ("checkpoint", "../work/mine"),
    "./dev": "there is no model or folder './dev'; did you mean dev?",
    "/nowhere/klein-4b": "there is no model or folder '/nowhere/klein-4b'; did you mean klein-4b, ",
    "mine": ("checkpoint", "mine"),
    "klein-base-9b": ("source", "klein-base-9b"),  # a model folder here
    "org/folder": ("source", "org/folder"),
    "pictures": ("source", "pictures"),
    "flux.safetensors": ("source", "flux.safetensors"),
    "cache/models--me--tune": ("source", CACHED),
    "cache/models--me--tune/snapshots": ("source", CACHED),
    f"cache/models--me--tune/snapshots/{OLDER}": ("source", f"cache/models--me--tune/snapshots/{OLDER}"),
    "cache/models--black-forest-labs--FLUX.2-klein-9B": ("source", OFFICIAL),
    "cache/models--org--half": "cache/models--org--half holds no complete copy of org/half; give org/half to have",
    # in the models folder
    "klein-4b-qint4-text-bf16": ("checkpoint", "../models/klein-4b-qint4-text-bf16"),
    "me--tune-qint4-text-bf16": ("checkpoint", "../models/me--tune-qint4-text-bf16"),
    # nothing
    "klein": f"there is no model or folder 'klein'; {CLOSE}",
    "klien-4b": "there is no model or folder 'klien-4b'; did you mean klein-4b, ",
    "klein-5b": f"there is no model or folder 'klein-5b'; {CLOSE}",
    "klein-4b-base": "there is no model or folder 'klein-4b-base'; did you mean klein-4b, klein-base-4b or ",
    "me--tune-qint4": "there is no model or folder 'me--tune-qint4'; did you mean me--tune-qint4-text-bf16?",
    "stable-diffusion": "there is no model or folder 'stable-diffusion'; choose one of demo, klein-4b, ",
    "a/b/c": "there is no file or folder a/b/c",
    "klein-4b.safetensors": "there is no file klein-4b.safetensors",
    "": "'' is no model's name; choose one of demo, klein-4b, ",
}


class Reached(Exception):  # noqa: N818 (no error)
    """What was about to be opened: `repo`, `source` or `checkpoint`, and which."""


def opening(model: Model) -> tuple[str, str]:
    """What opening `model` opens."""
    if model.is_checkpoint:
        return "checkpoint", str(model.path)
    return ("source", str(model.path)) if model.path else ("repo", model.repo)


def door(kind: str) -> Callable:
    def reached(path, *_, **__):
        raise Reached(kind, str(path))

    return reached


@pytest.fixture
def place(models, monkeypatch):
    """A current folder with models of all kinds, and doors that only say what would be opened."""
    for folder in ("klein-base-9b", "org/folder", CACHED, f"cache/models--me--tune/snapshots/{OLDER}", OFFICIAL):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    for folder in (Path("mine"), models / "klein-4b-qint4-text-bf16", models / "me--tune-qint4-text-bf16"):
        folder.mkdir(parents=True)
        (folder / "flux2.json").write_text(json.dumps({"variant": "klein-4b", "source": {"name": "me/tune"}}))
    for folder in ("demo", "pictures", "klein-4b", "cache/models--org--half/snapshots"):
        Path(folder).mkdir(parents=True)
    Path("cache/models--me--tune/refs").mkdir()
    Path("cache/models--me--tune/refs/main").write_text(COMMIT)
    Path("flux.safetensors").write_bytes(b"")
    Image.new("RGB", (128, 128)).save("photo.png")

    def conversions(model: Model, *_, **__) -> None:  # of what is looked up rather than opened
        raise Reached(*opening(model))

    monkeypatch.setattr("flux2_mlx.hub.fetch", door("repo"))
    monkeypatch.setattr(Source, "open", door("source"))
    for room in ("sources", "gathering"):
        monkeypatch.setattr(f"flux2_mlx.store.{room}.assembled", door("source"))
    monkeypatch.setattr("flux2_mlx.store.identification.identify_files", door("source"))
    monkeypatch.setattr(Checkpoint, "open", door("checkpoint"))
    for room in ("flux2_mlx.store", "flux2_mlx.store.converted"):
        monkeypatch.setattr(f"{room}.conversions", conversions)
    # Which models see images is another question.
    monkeypatch.setattr("flux2_mlx.cli.writing.is_blind", lambda model: False)


def command(*arguments: str) -> Callable[[str], str]:
    """What the command line answers, with a model's name in place of MODEL."""

    def call(name: str) -> str:
        result = run(*[name if word == "MODEL" else word for word in arguments])
        assert result.exit_code == 1, result.output
        return result.stderr.splitlines()[-1].removeprefix("Error: ")

    return call


def function(call: Callable[[str], object]) -> Callable[[str], str]:
    def answer(name: str) -> str:
        with pytest.raises(InputError) as caught:
            call(name)
        return line(str(caught.value))

    return answer


SMALL = ("-W", "64", "-H", "64", "--memory-limit", "500GB", "-m", "MODEL")
ENTRANCES = {
    "t2i": command("t2i", "a fox", *SMALL),
    "i2i": command("i2i", "a fox", "-i", "photo.png", *SMALL),
    "outpaint": command("outpaint", "photo.png", "a fox", "--left", "64", *SMALL[4:]),
    "info": command("info", "--", "MODEL"),
    "convert": command("convert", "--", "MODEL", "new"),
    "download": command("download", "--", "MODEL"),
    "upsample": command("upsample", "a fox", "-m", "MODEL"),
    "describe": command("describe", "photo.png", "-m", "MODEL"),
    "models verify": command("models", "verify", "--", "MODEL"),
    "Flux2Pipeline": function(Flux2Pipeline.from_pretrained),
    "Writer": function(Writer.from_pretrained),
    "find_checkpoint": function(lambda name: Checkpoint.open(find_checkpoint(name))),
}


def outcome(call: Callable[[str], str], name: str) -> tuple[str, str] | str:
    """What a call with `name` was about to open, or the refusal."""
    try:
        return call(name)
    except Reached as reached:
        kind, target = reached.args
        return kind, target if kind == "repo" else os.path.abspath(target)


def test_the_table_is_long():
    assert len(NAMES) >= 60


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_the_same_everywhere(name, place, monkeypatch):
    expected = NAMES[name]
    if isinstance(expected, tuple):
        kind, target = expected
        model = resolve(name)
        assert (model.kind, model.name) == (kind, name)
        assert opening(model)[1] == target or os.path.samefile(opening(model)[1], target)
        assert resolve(model) is model
        expected = outcome(lambda _: door(opening(model)[0])(opening(model)[1]), name)
    else:
        with pytest.raises(InputError) as caught:
            resolve(name)
        assert str(caught.value).startswith(expected) or expected in str(caught.value)
        expected = line(str(caught.value))
    for entrance, call in ENTRANCES.items():
        found = outcome(call, name)
        if entrance == "convert" and expected[0] == "checkpoint" and isinstance(found, str):
            assert re.search(r" is (built in and needs no conversion|an MLX checkpoint already)$", found), found
        else:
            assert found == expected, entrance


def test_a_path_object_is_a_path(place):
    Path("klein-4b/model_index.json").write_text("{}")
    assert resolve(Path("klein-4b")) == Model("source", "klein-4b", path=Path("klein-4b"))
    with pytest.raises(InputError, match="there is no model or folder 'dev'; did you mean dev"):
        Flux2Pipeline.from_pretrained(Path("dev"))


def test_a_folder_in_the_hub_s_cache_knows_its_repo_and_revision(place):
    tune = resolve("cache/models--me--tune")
    assert (tune.repo, tune.revision, tune.variant) == ("me/tune", COMMIT, None)
    official = resolve(OFFICIAL)
    assert (official.repo, official.revision, official.variant) == (TABLE["klein-9b"][1], COMMIT, VARIANTS["klein-9b"])
    shutil.rmtree("cache/models--me--tune/refs")
    with pytest.raises(InputError, match="holds no complete copy of me/tune"):  # which of the two is not known
        resolve("cache/models--me--tune")


def test_a_folder_that_hides_a_model_of_the_table_is_told(place, caplog):
    assert resolve("klein-base-9b").path == Path("klein-base-9b")
    hint = "for the model of the table write black-forest-labs/FLUX.2-klein-base-9B"
    assert [record.getMessage() for record in caplog.records] == [
        f"klein-base-9b is the folder of that name here; {hint}"
    ]
    caplog.clear()
    resolve("./klein-base-9b")
    resolve("klein-4b")
    assert not caplog.records


@pytest.mark.parametrize("name", [None, 3, b"demo", ["demo"]])
def test_what_is_no_name(name):
    with pytest.raises(InputError, match="a model is named by a text or a path, not by "):
        Flux2Pipeline.from_pretrained(name)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "/" + "x" * 5000, "\ud800", "~", "..", "//"])
def test_an_odd_name_is_refused_or_a_path(name, models):
    if name in ("~", "..", "//"):
        assert resolve(name).kind == "source"
    else:
        with pytest.raises(InputError, match=r"^.{80,90} is no model's name; choose one of|'a.x00b' is|'.ud800' is"):
            resolve(name)


def test_a_mirror_s_addresses_are_repos_too(monkeypatch):
    with pytest.raises(InputError, match="is no address of Hugging Face"):
        resolve("https://mirror.example/me/tune")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert resolve("https://mirror.example/me/tune").repo == "me/tune"


def test_a_repo_that_is_not_found_is_compared_with_those_of_the_table(models, monkeypatch):
    def fetch(repo, **_):
        raise DownloadError(f"unknown repo id {repo!r}")

    monkeypatch.setattr("flux2_mlx.hub.fetch", fetch)
    with pytest.raises(DownloadError, match=r"unknown .*; did you mean black-forest-labs/FLUX\.2-klein-4B\?$"):
        find_checkpoint("black-forrest-labs/FLUX.2-klein-4B")
    with pytest.raises(DownloadError, match=r"unknown repo id 'me/tune'$"):
        find_checkpoint("me/tune")


def test_variants_are_named_in_any_spelling():
    assert checked_variant("FLUX.2-klein-4B") == "klein-4b"
    assert all(find_variant(name.upper()) is variant for name, variant in VARIANTS.items())
    assert find_variant("black-forest-labs/demo") is None
    with pytest.raises(InputError, match=r"unknown model 'klein-5b'; did you mean klein-4b, klein-9b or"):
        checked_variant("klein-5b")


def test_a_run_looks_its_model_up_once(models, monkeypatch):
    found = []

    def find(source, **options):
        found.append(source)
        return find_checkpoint(source, **options)

    for module in ("store", "preparation", "upsampling"):
        monkeypatch.setattr(f"flux2_mlx.{module}.find_checkpoint", find)
    done("t2i", "a red circle", "-m", "demo", "-W", "32", "-H", "32", "-s", "1", "--no-cache", "-o", "a.png")
    assert found == [resolve("demo")]


def test_a_source_that_is_no_model(tmp_path):
    with pytest.raises(InputError, match="there is no model or folder 'klein'; did you mean klein-4b, klein-9b or "):
        Flux2Pipeline.from_pretrained("klein")
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        Flux2Pipeline.from_pretrained(tmp_path)
