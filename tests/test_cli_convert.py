"""`convert` and `download`, from folders and from a hub on the loopback interface."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import VARIANT, WEIGHTS, edit_json
from helpers.cli_runner import DEMO, done, pixels, refusal, run, tree
from helpers.hub_client import using
from helpers.hub_server import HubServer

from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.config import VARIANTS
from flux2_mlx.errors import DownloadError
from flux2_mlx.images import read_settings
from flux2_mlx.store import converted_folders, find_checkpoint

REPO = "org/model"
SMALL = ("-W", "64", "-H", "64", "-s", "2", "--seed", "7")
MODELS = {"klein-4b": "black-forest-labs/FLUX.2-klein-4B", "klein-9b": "black-forest-labs/FLUX.2-klein-9B"}
NAMES = {**MODELS, "dev": "black-forest-labs/FLUX.2-dev", "black-forest-labs/flux.2-KLEIN-4b": MODELS["klein-4b"]}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("FLUX2_MLX_HOME", str(tmp_path / "models"))
    return tmp_path


def quants(path):
    checkpoint = Checkpoint.open(path)
    return checkpoint.variant.name, checkpoint.quant, checkpoint.text_quant


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ("bf16", "qint8")),
        (["-q", "qint8"], ("qint8", "qint8")),
        (["-q", "qint4"], ("qint4", "qint4")),
        (["-q", "qint4", "--text-quant", "bf16"], ("qint4", "bf16")),
    ],
)
def test_convert_makes_a_checkpoint_and_prints_its_folder(official, options, expected):
    result = done("convert", official, "mine", "--variant", VARIANT, *options)
    assert result.stdout == "mine\n"
    assert "converting: 100%" in result.stderr
    assert quants(Path("mine")) == (VARIANT, *expected)
    assert [path.name for path in Path().iterdir()] == ["mine"]


def test_a_converted_folder_makes_images(official):
    done("convert", official, "mine", "--variant", VARIANT, "-q", "qint4")
    values = json.loads(done("t2i", "a red fox", "-m", "mine", *SMALL, "--json").stdout)
    assert values["images"] == [{"path": "mine-7.png", "seed": 7}]
    assert [values[name] for name in ("model", "quant", "text_quant", "guidance")] == ["mine", "qint4", "qint4", 1.0]
    assert pixels("mine-7.png").std() > 1


def test_quiet_conversion(official):
    result = done("convert", official, "mine", "--variant", VARIANT, "--quiet")
    assert (result.stdout, result.stderr) == ("mine\n", "")


def test_t2i_converts_an_official_folder_once_and_replays_what_it_made(official, folder):
    first = done("t2i", "a red fox", "-m", official, "--variant", VARIANT, *SMALL, "-o", "a.png")
    second = done("t2i", "--replay", "a.png", "-o", "b.png")
    assert "converting" in first.stderr
    assert "converting" not in second.stderr
    assert len(list((folder / "models").glob("klein-4b-*"))) == 1
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert read_settings("b.png")["variant"] == VARIANT


def test_a_replay_with_another_model_forgets_which_model_the_first_was(official):
    done("t2i", "a red fox", "-m", official, "--variant", "klein-base-4b", *SMALL, "-o", "a.png")
    message = refusal("t2i", "--replay", "a.png", "-m", official, "-o", "b.png")
    assert "name it with --variant" in message


def test_force_replaces_a_checkpoint_and_nothing_else(official):
    done("convert", official, "mine", "--variant", VARIANT)
    arguments = ("convert", official, "mine", "--variant", VARIANT, "-q", "qint4")
    assert refusal(*arguments) == "mine exists; choose another folder or pass --force to replace it"
    done(*arguments, "--force")
    assert quants(Path("mine")) == (VARIANT, "qint4", "qint4")
    Path("yours").mkdir()
    Path("yours/a.txt").write_text("precious")
    message = refusal("convert", official, "yours", "--variant", VARIANT, "--force")
    assert message == "yours is not an MLX checkpoint, so --force does not replace it; remove it yourself"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "there is no model or folder 'missing'"),
        ("/missing/folder/x", "there is no file or folder /missing/folder/x"),
        ("./nothing.safetensors", "there is no file ./nothing.safetensors"),
        ("nothing.GGUF", "there is no file nothing.GGUF"),
        ("pipe.safetensors", "pipe.safetensors is no file or folder of a model but a named pipe; give one of these"),
        ("/dev/zero", "/dev/zero is no file or folder of a model but a device; give one of these"),
        ("demo", "demo is built in and needs no conversion"),
        (str(DEMO), f"{DEMO} is an MLX checkpoint already"),
        ("file.bin", "file.bin is a pickle, which could run code; give a .safetensors or .gguf file"),
        ("empty", "empty is no model folder in the diffusers layout: it has no model_index.json"),
    ],
)
def test_a_source_that_can_not_be_converted(source, message):
    Path("file.bin").write_bytes(b"\x80\x04.")
    Path("empty").mkdir()
    os.mkfifo("pipe.safetensors")
    assert refusal("convert", source, "mine").startswith(message)


def test_a_target_has_a_name():
    assert "TARGET is empty; give the folder to make" in run("convert", "demo", "").stderr


def test_where_a_link_leads_that_was_to_nothing_is_told(official, folder):
    Path("mine").symlink_to("../elsewhere")
    result = done("convert", official, "mine", "--variant", VARIANT)
    told = f"mine is a link to {folder}/elsewhere, where nothing is yet; the model goes there\n"
    assert result.stderr.startswith(told)
    assert told not in done("convert", official, "mine", "--variant", VARIANT, "--force").stderr


@pytest.mark.parametrize("target", ["missing/mine", "file.txt/mine"])
def test_a_target_without_a_folder_is_told_before_the_download(target, monkeypatch):
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: pytest.fail("asked for a download"))
    Path("file.txt").write_text("")
    parent = target.partition("/")[0]
    assert refusal("convert", "klein-4b", target) == f"can't write {target}: there is no folder {parent}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["convert", "klein-4b", "mine", "--variant", "klein-5b"],
            "unknown model 'klein-5b'; did you mean klein-4b, klein-9b or klein-9b-kv?",
        ),
        (["convert", "klein-4b", "mine"], "can't write mine: Permission denied"),
        (["download", "klein-4b", "--models-dir", "mine"], "can't write mine/klein-4b-bf16: Permission denied"),
    ],
)
def test_what_is_wrong_is_told_before_the_download(arguments, message, monkeypatch):
    def fail(path, *_):  # the permission bits stop nobody who runs the tests as root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("flux2_mlx.staging._create_locked", fail)
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: pytest.fail("asked for a download"))
    assert refusal(*arguments, "--quiet").startswith(message)


def test_a_source_of_another_geometry_must_be_named(official):
    assert "name it with --variant" in refusal("convert", official, "mine")
    assert refusal("convert", official, "mine", "--variant", "klein-5b").startswith("unknown model 'klein-5b'; ")


@pytest.mark.parametrize("component", WEIGHTS)
def test_a_damaged_source_leaves_nothing_behind(source, component):
    path = source / WEIGHTS[component]
    os.truncate(path, path.stat().st_size - 1)
    message = refusal("convert", source, "mine", "--variant", VARIANT)
    assert message.startswith(f"{path} has {path.stat().st_size} bytes where its header says ")


def test_a_source_without_a_tokenizer_leaves_nothing_behind(source):
    (source / "tokenizer" / "tokenizer.json").unlink()
    message = refusal("convert", source, "mine", "--variant", VARIANT, "--quiet")
    assert message.startswith(f"{source} is incomplete: there is no tokenizer/tokenizer.json; add that of the model ")


def test_a_model_of_another_kind(source):
    edit_json(source / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "holds 'StableDiffusionPipeline', not FLUX.2" in refusal("convert", source, "mine")


@pytest.mark.parametrize("name", [name for name, repo in NAMES.items() if repo == MODELS["klein-4b"]])
def test_a_name_of_the_table_stands_for_its_repo(name, official, monkeypatch):
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda repo, **_: official if repo == NAMES[name] else None)
    done("convert", name, "mine", "--variant", VARIANT)
    assert Checkpoint.open(Path("mine")).source["name"] == NAMES[name]


def test_a_folder_of_the_same_name_comes_first(official, monkeypatch):
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: pytest.fail("asked for a download"))
    shutil.copytree(official, "klein-9b")
    done("convert", "klein-9b", "mine", "--variant", VARIANT)
    assert quants(Path("mine"))[0] == VARIANT


@pytest.mark.parametrize("command", [["convert", "klein-9b", "mine"], ["download", "klein-9b"]])
def test_a_model_folder_of_the_same_name_comes_first_and_no_other_folder(command, official, monkeypatch):
    def fetch(repo, **options):
        raise DownloadError(f"asked for {repo}")

    monkeypatch.setattr("flux2_mlx.hub.fetch", fetch)
    Path("klein-9b").mkdir()
    assert refusal(*command, "--quiet") == f"asked for {MODELS['klein-9b']}"
    shutil.copytree(official, "klein-9b", dirs_exist_ok=True)
    assert done(*command, "--variant", VARIANT).stdout


@pytest.mark.parametrize("variant", ["nonsense", "dev"])
@pytest.mark.parametrize("model", ["demo", "mine", "klein-4b"])
def test_a_variant_that_the_model_is_not(model, variant, folder, monkeypatch):
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: pytest.fail("asked for a download"))
    shutil.copytree(DEMO, "mine")
    expected = {
        "demo": f"{DEMO} holds demo, not dev; leave the variant out, or choose another model",
        "mine": "mine holds demo, not dev; leave the variant out, or choose another model",
        "klein-4b": "klein-4b is not dev; leave the variant out, or choose another model",
    }[model]
    if variant == "nonsense":
        expected = "unknown model 'nonsense'; choose one of demo, "
    for command in (["t2i", "a red fox", "-m"], ["download"]):
        assert refusal(*command, model, "--variant", variant).startswith(expected)


def test_download_of_the_built_in_model_prints_its_folder():
    assert done("download", "demo").stdout == f"{DEMO}\n"


@pytest.mark.parametrize("options", [["-q", "qint4"], ["--text-quant", "qint8"]])
def test_download_does_not_pass_off_another_quantization(options):
    message = refusal("download", "demo", *options)
    assert message.startswith(f"{DEMO} is an MLX checkpoint already, stored as bf16 with the text encoder as bf16; ")
    assert done("download", "demo", "-q", "bf16", "--variant", "demo").stdout == f"{DEMO}\n"


def test_download_fetches_converts_and_then_has_it(official, folder):
    with HubServer({REPO: official}) as hub, using(hub, folder / "hub"):
        arguments = ("download", REPO, "--variant", VARIANT, "-q", "qint8")
        first = done(*arguments)
        assert "converting: 100%" in first.stderr
        path = Path(first.stdout.removesuffix("\n"))
        assert path == folder / "models" / "org--model-qint8"
        assert quants(path) == (VARIANT, "qint8", "qint8")
        assert set(WEIGHTS.values()) <= set(hub.fetched)
        hub.requests.clear()
        second = done(*arguments)
        assert (second.stdout, second.stderr) == (first.stdout, "")
        assert done("t2i", "a red fox", "-m", REPO, "-q", "qint8", *SMALL).stdout == "model-7.png\n"
        assert hub.requests == []
    assert pixels("model-7.png").shape == (64, 64, 3)


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_a_gated_model_says_how_to_get_access(official, folder, token):
    repo = MODELS["klein-9b"]
    with HubServer({repo: official}, gated=[repo]) as hub, using(hub, folder / "hub", token=token):
        message = refusal("download", "klein-9b")
        page = f"{hub.url}/{repo}"
    assert message.startswith(f"{repo} is gated")
    assert f"accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN" in message
    assert ("your token has no access" in message) == (token is not None)
    assert tree() == {}
    assert not (folder / "models").exists()


def test_a_converted_model_is_on_the_list_of_info(official, folder, monkeypatch):
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: official)
    done("download", VARIANT, "-q", "qint4")
    (path,) = (folder / "models").iterdir()
    assert done("info", VARIANT).stdout.splitlines()[-1] == f"{path}: not verified"
    (row,) = [line for line in done("info").stdout.splitlines() if line.startswith(f"{VARIANT} ")]
    assert row.endswith("  1 converted")
    assert json.loads(done("info", VARIANT, "--json").stdout)["folders"] == [str(path)]
    assert json.loads(done("info", "klein-9b", "--json").stdout)["folders"] == []


def test_a_fine_tune_is_not_shown_as_the_model_that_it_was_made_from(official, folder, monkeypatch):
    said = ("--variant", VARIANT)
    done("download", official, *said, "-q", "qint4")
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: official)
    done("download", "me/tune", *said)
    shutil.copytree(official, "klein-4b")
    done("convert", "./klein-4b", "mine", *said)
    (path,) = (folder / "models").glob("klein-4b-*")
    assert json.loads(done("info", MODELS["klein-4b"], "--json").stdout)["folders"] == []
    assert "not converted" in next(line for line in done("info").stdout.splitlines() if line.startswith("klein-4b "))
    tune = folder / "models/me--tune-bf16"
    for model, origin, folders in (
        (official, None, [str(path), str(tune)]),  # the weights of both are alike
        (path, str(official), [str(path)]),
        ("me/tune", "me/tune", [str(tune)]),
        ("mine", "./klein-4b", ["mine"]),
    ):
        row = json.loads(done("info", model, *said, "--json").stdout)
        assert [row[name] for name in ("model", "variant", "official", "licence", "source", "folders")] == [
            str(model), VARIANT, False, None, origin, folders,
        ]  # fmt: skip
        text = done("info", model, *said).stdout
        assert text.startswith(f"{model}: a klein-4b of another source, 4 steps, guidance 1.0\n")
        assert "black-forest-labs" not in text
        assert ("converted from ./klein-4b\n" in text) == (model == "mine")


def test_info_of_a_source_is_about_its_own_sizes_and_fetches_nothing(official, folder, monkeypatch):
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: pytest.fail("asked for a download"))
    values = json.loads(done("info", official, "--variant", VARIANT, "--json").stdout)
    assert sum(values["bytes"]["bf16"].values()) < 10_000_000
    with HubServer({"me/tune": official}) as hub, using(hub, folder / "home"):
        found = done("info", "me/tune", "--variant", VARIANT).stdout
        assert not any("tokenizer" in name for name in hub.fetched)
    assert not [*(folder / "home").rglob("*.safetensors")]
    assert found.startswith(f"me/tune: transformer, text encoder and VAE of FLUX.2 {VARIANT}\n")
    assert found.endswith("convert    stored as bf16, the text encoder as qint8\n")


def test_what_can_not_make_images_is_not_on_the_list(official, folder, caplog, monkeypatch):
    monkeypatch.setattr("flux2_mlx.hub.fetch", lambda *_, **__: official)
    whole, _ = (find_checkpoint(VARIANT, text_only=text_only) for text_only in (False, True))
    cut = Path(shutil.copytree(whole, folder / "models" / "cut"))
    os.truncate(cut / "flux2.json", 20)
    assert converted_folders() == {name: [whole] if name == VARIANT else [] for name in VARIANTS}
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("flux2_mlx")]
    assert warning.startswith(f"{cut}/flux2.json is not JSON: ")
    assert warning.endswith(f"; remove {cut}, or convert the model again")
