"""Repos of the Hub with a folder for each part: without `model_index.json`, without any config, and in few bits."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.checkpoints import SHALLOW_TEXT, SHALLOW_VARIANT, read_tensors, save_small
from helpers.cli_runner import done, refusal
from helpers.hub_client import REPO, storage, unreachable, using
from helpers.hub_server import HubServer
from test_convert_mflux import DEMO, PARTS, saved
from test_store_parts import fp8_cast

from flux2_mlx.checkpoint import MANIFEST, Checkpoint
from flux2_mlx.errors import CheckpointError, DownloadError
from flux2_mlx.store import convert_model, find_checkpoint
from flux2_mlx.store.converted import keeps_bits

START = 65_536
DECOY = "transformer/diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, Path]:
    """Folders as repos have them: in the layout of diffusers in shards, its parts alone, and as mflux saves it."""
    home = tmp_path_factory.mktemp("layouts")
    whole = save_small(home / "whole", text=SHALLOW_TEXT, shards=2)
    for name, gone in (("no index", ("model_index.json",)), ("no lists", ("model_index.json", "*/*.index.json"))):
        shutil.copytree(whole, home / name)
        for pattern in gone:
            for path in (home / name).glob(pattern):
                path.unlink()
    mx.save_safetensors(str(home / "no index" / DECOY), {"x": mx.zeros(100_000)})
    saved(home / "mflux", 8)
    shutil.copytree(saved(home / "bare"), home / "no config")
    for part in PARTS:
        weights = {}
        for path in sorted((home / "no config" / part).glob("*.safetensors")):
            weights |= read_tensors(path)
            path.unlink()
        (home / "no config" / part / "model.safetensors.index.json").unlink()
        mx.save_safetensors(str(home / "no config" / part / f"{part}-00001-of-00001.safetensors"), weights)
    return {path.name: path for path in home.iterdir()}


@pytest.fixture
def home(tmp_path, models) -> Path:
    return tmp_path / "home"


def same_files(one: Path, other: Path) -> bool:
    names = [path.relative_to(one) for path in one.glob("*/*.safetensors")]
    return bool(names) and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("layout", ["no index", "no lists", "mflux", "no config"])
def test_a_repo_becomes_what_its_folder_becomes(layout, layouts, home):
    variant = SHALLOW_VARIANT if layout.startswith("no") and layout != "no config" else None
    convert_model(layouts[layout], Path("local"), variant=variant)
    with HubServer({REPO: layouts[layout]}) as hub, using(hub, home):
        made = find_checkpoint(REPO, variant=variant)
        assert DECOY not in hub.fetched or hub.sent[DECOY] <= START
        assert same_files(made, Path("local"))
        hub.requests.clear()
        assert find_checkpoint(REPO, variant=variant) == made
        assert hub.requests == []
        convert_model(REPO, Path("again"), variant=variant)
    assert same_files(made, Path("again"))
    told = [Checkpoint.open(folder) for folder in (made, Path("local"))]
    assert told[0].source["name"] == REPO
    assert (told[0].quant, told[0].text_quant) == (told[1].quant, told[1].text_quant)
    assert told[0].source.get("quant") == ("qint8" if layout == "mflux" else None)


def test_headers_come_before_weights(layouts, home):
    """A model that is refused costs no more than its headers."""
    with HubServer({REPO: layouts["mflux"]}) as hub, using(hub, home):
        message = refusal("convert", REPO, "made", "--variant", "klein-4b")
        assert message.startswith(f"{REPO} holds the transformer of demo; ")
        assert all(count <= START for name, count in hub.sent.items() if name.endswith(".safetensors"))
        assert not list(home.rglob("*.safetensors"))


def test_parts_of_it_are_named_as_it_is(layouts, home, caplog):
    with HubServer({REPO: layouts["mflux"]}) as hub, using(hub, home):
        convert_model(REPO, Path("made"), parts={"vae": DEMO})
    assert f"{REPO}:transformer holds the transformer in few bits, which becomes qint8" in caplog.messages
    with HubServer({"a/b": layouts["mflux"], REPO: layouts["no config"]}) as hub, using(hub, home):
        done("convert", REPO, "mixed", "--text-encoder", "a/b", "--text-quant", "bf16")
        assert not any(name.startswith("transformer/0") for name in hub.fetched)


def test_what_it_is_is_told(layouts, home):
    with HubServer({REPO: layouts["no config"]}) as hub, using(hub, home):
        text = done("info", REPO).stdout
        assert text.startswith(f"{REPO}: transformer, text encoder and VAE of FLUX.2 demo\n")
        assert "missing" not in text
    local = done("info", layouts["no config"]).stdout
    assert local.startswith(f"{layouts['no config']}: transformer, text encoder and VAE of FLUX.2 demo\n")


def test_its_name_says_which_model_it_is(home, tmp_path):
    """Where neither geometry nor `model_index.json` does."""
    folder = save_small(tmp_path / "mine")
    (folder / "model_index.json").unlink()
    with HubServer({"me/FLUX.2-klein-9b-kv-red": folder}) as hub, using(hub, home):
        made = find_checkpoint("me/FLUX.2-klein-9b-kv-red")
    assert Checkpoint.open(made).variant.name == "klein-9b-kv"


def test_a_gguf_file_among_folders_is_given_by_itself(layouts, home, tmp_path):
    folder = Path(shutil.copytree(layouts["no config"], tmp_path / "mine"))
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    (folder / "transformer/x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"no model_index\.json; give .*/x\.gguf, and its other parts beside it"):
        convert_model(folder, Path("made"))
    with HubServer({REPO: folder}) as hub, using(hub, home):
        assert refusal("convert", REPO, "made").endswith(
            f"; give {REPO}:transformer/x.gguf, and its other parts beside it"
        )


def few_bits(folder: Path, layouts: dict[str, Path], *parts: str) -> Path:
    """A whole model in the layout of diffusers, with these parts in fp8."""
    shutil.copytree(layouts["whole"], folder)
    for part in parts:
        weights = {}
        for path in sorted((folder / part).glob("*.safetensors*")):
            weights |= read_tensors(path) if path.suffix == ".safetensors" else {}
            path.unlink()
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        (folder / part / f"{name}.safetensors").write_bytes(fp8_cast(weights))
    return folder


@pytest.mark.parametrize("parts", [("transformer",), ("text_encoder",), ("transformer", "text_encoder")])
def test_few_bits_are_kept_by_every_door(parts, layouts, home, caplog, tmp_path):
    folder = few_bits(tmp_path / "few", layouts, *parts)
    expected = ("qint8" if "transformer" in parts else "bf16", "qint8")
    with HubServer({REPO: folder}) as hub, using(hub, home):
        for name in (REPO, str(folder)):
            told = json.loads(done("info", name, "--variant", SHALLOW_VARIANT, "--json").stdout)["conversion"]
            assert (told["quant"], told["text_quant"]) == expected
            caplog.clear()
            made = find_checkpoint(name, variant=SHALLOW_VARIANT)
            assert (Checkpoint.open(made).quant, Checkpoint.open(made).text_quant) == expected
            is_told = f"{name}/transformer holds" in caplog.text or f"{name}:transformer holds" in caplog.text
            assert is_told == ("transformer" in parts)
            hub.requests.clear()
            assert find_checkpoint(name, variant=SHALLOW_VARIANT) == made
            assert hub.requests == []
            plain = find_checkpoint(name, variant=SHALLOW_VARIANT, quant="bf16")
            assert Checkpoint.open(plain).quant == "bf16"


def test_an_encoder_in_four_bits_is_found_again(home, tmp_path):
    """Also where nothing else is wanted of the model."""
    with HubServer({REPO: saved(tmp_path / "few", 4)}) as hub, using(hub, home):
        made = find_checkpoint(REPO, text_only=True)
        assert made.name.endswith("-text-only-qint4")
        hub.requests.clear()
        assert find_checkpoint(REPO, text_only=True) == made
        assert hub.requests == []
        whole = find_checkpoint(REPO)
        assert Checkpoint.open(whole).quant == "qint4"


@pytest.mark.parametrize(
    ("noted", "stored", "asked", "expected"),
    [
        ({}, ("bf16", "qint8"), (None, None), False),
        ({"quant": "qint8"}, ("qint8", "qint8"), (None, None), True),
        ({"quant": "qint8"}, ("bf16", "qint8"), (None, None), False),
        ({"quant": "qint8"}, ("qint8", "qint4"), (None, None), True),  # as older versions noted it
        ({"quant": "qint8", "text_quant": "qint8"}, ("qint8", "qint4"), (None, None), False),
        ({"quant": "qint8", "text_quant": "qint4"}, ("qint8", "qint4"), (None, None), True),
        ({"quant": "qint8", "text_quant": "qint4"}, ("qint8", "bf16"), (None, "bf16"), True),
        ({"text_quant": "qint4"}, ("bf16", "qint4"), (None, None), True),
        ({"text_quant": "qint4"}, ("qint8", "qint4"), ("qint8", None), True),
        ({"text_quant": "qint4"}, ("bf16", "qint4"), ("qint8", None), False),
        ({"quant": "int3"}, ("bf16", "qint4"), (None, None), False),
        ({"quant": ["qint8"]}, ("qint8", "qint8"), (None, None), False),
    ],
)
def test_what_a_checkpoint_notes_says_what_it_is_for(noted, stored, asked, expected, tmp_path):
    quantization = dict(zip(("transformer", "text_encoder"), stored, strict=True))
    (tmp_path / MANIFEST).write_text(json.dumps({"source": noted, "quantization": quantization}))
    assert keeps_bits(tmp_path, *asked) is expected


def test_offline_the_cache_will_do(layouts, home):
    with HubServer({REPO: layouts["mflux"]}) as hub, using(hub, home):
        convert_model(REPO, Path("made"))
    with using(hub, home, offline=True):
        assert same_files(find_checkpoint(REPO), Path("made"))
    with using(hub, home, endpoint=unreachable()):
        convert_model(REPO, Path("again"))
        with pytest.raises(DownloadError, match="cannot reach"):
            convert_model("org/other", Path("other"))
    shutil.rmtree(storage(home) / "snapshots")
    with using(hub, home, offline=True), pytest.raises(DownloadError, match="is not complete in the cache"):
        convert_model(REPO, Path("none"))


@pytest.mark.parametrize("layout", ["mflux", "whole", "no lists"])
def test_a_folder_of_a_repo(layout, layouts, home):
    with HubServer({REPO: layouts[layout]}) as hub, using(hub, home):
        name = f"{REPO}:transformer"
        told = done("info", name).stdout
        assert told.startswith(f"{name}: transformer of ")
        assert all(count <= START for name, count in hub.sent.items() if name.endswith(".safetensors"))
        message = f"{REPO} has no file of weights 'nothing'; give one as {REPO}:"
        assert refusal("info", f"{REPO}:nothing").startswith(message)
