"""Adapters of the Hub: what is fetched, what is told before that, and how images are made again."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.adapter_headers import ai_toolkit
from helpers.adapters import D, lora, save
from helpers.cli_runner import DEMO, PROMPT, done, pixels, refusal
from helpers.headers import write
from helpers.hub_client import REPO, using
from helpers.hub_server import HubServer

from flux2_mlx import Flux2Pipeline
from flux2_mlx.checkpoint import Checkpoint, Component
from flux2_mlx.errors import CheckpointError, DownloadError, InputError
from flux2_mlx.images import read_settings
from flux2_mlx.store import adapters_with, find_adapter, open_adapter
from flux2_mlx.store.adapter_sources import adapter_files
from flux2_mlx.store.parts import Remote
from flux2_mlx.weights import TensorInfo

STYLE, MANY, OTHER = "me/style", "me/many", "me/other"
FILE = "red-fox.safetensors"
START = 65_536
SIZE = ("-W", "16", "-H", "16", "-s", "1", "--seed", "7")
SMALL = ("-m", "demo", *SIZE)
LAYER = "diffusion_model.single_blocks.0.linear2"


def demo_shape() -> tuple[int, int]:
    infos = Checkpoint.open(DEMO).components["transformer"].quantized("bf16").infos
    outputs, inputs = infos["single_blocks.0.linear2.weight"].shape
    return outputs, inputs


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """An adapter in a repo, several in one, and one of another model."""
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    outputs, inputs = demo_shape()
    style = save(path, lora(LAYER, outputs, inputs)).read_bytes()
    large = save(path, lora(LAYER, outputs, inputs, rank=200)).read_bytes()
    other = save(path, lora(LAYER, 2 * outputs, 2 * inputs, rank=40)).read_bytes()
    return {
        STYLE: {FILE: style, "README.md": b"#", "sample.png": b"1"},
        MANY: {"a.safetensors": style, "b.safetensors": large, "sub/c.safetensors": style, "a.json": b"{}"},
        OTHER: {"x.safetensors": other},
    }


@pytest.fixture
def hub(repos, models, home):
    with HubServer(repos) as server, using(server, home):
        server.cards[STYLE] = {"license": "apache-2.0"}
        yield server


def test_a_command_line_fetches_one_file_once(hub, home):
    result = done("t2i", PROMPT, *SMALL, "-o", "one.png", "--lora", f"{STYLE}:0.5")
    size = len(hub.repos[STYLE].files[FILE])
    assert f"{STYLE}:{FILE} is fetched: {size / 1000:.1f} kB; licence apache-2.0\n" in result.stderr
    assert set(hub.fetched) == {FILE}
    assert hub.sent[FILE] <= START + size
    (told,) = read_settings(Path("one.png"))["adapters"]
    assert (told["source"], told["origin"], told["scale"]) == (FILE, f"{STYLE}:{FILE}", 0.5)
    hub.sent.clear()
    result = done("t2i", PROMPT, *SMALL, "-o", "two.png", "--lora", f"hf.co/{STYLE}/blob/main/{FILE}:0.5")
    assert "is fetched" not in result.stderr
    assert np.array_equal(pixels("two.png"), pixels("one.png"))
    assert not hub.sent


def test_offline_the_cache_will_do(hub, home):
    path = open_adapter(STYLE).path
    with using(hub, home, offline=True):
        assert open_adapter(f"{STYLE}:{FILE}").path == path
        with pytest.raises(DownloadError, match="offline mode is on"):
            open_adapter(f"{MANY}:a.safetensors")


def test_python_names_files_as_diffusers_does(hub, capsys):
    pipe = Flux2Pipeline.from_pretrained("demo", prompt_cache=False)
    pipe.load_lora_weights(MANY, weight_name="b.safetensors", adapter_name="b")
    said = capsys.readouterr().err
    assert f"{MANY} (licence: see its page) is fetched from {hub.url}/{MANY}" in said
    assert set(hub.fetched) == {"b.safetensors"}
    pipe.load_lora_weights(MANY, weight_name="c.safetensors", subfolder="sub", adapter_name="c", progress=False)
    pipe.load_lora_weights(f"{MANY}:sub", adapter_name="d", progress=False)
    assert capsys.readouterr().err == ""
    assert [one.adapter.origin for one in pipe.networks.adapters] == [
        f"{MANY}:{name}" for name in ("b.safetensors", "sub/c.safetensors", "sub/c.safetensors")
    ]
    with pytest.raises(InputError, match="subfolder must be text"):
        pipe.load_lora_weights(MANY, subfolder=3)


def test_one_of_another_model_costs_nothing(hub, home):
    said = refusal("t2i", PROMPT, *SMALL, "-o", "a.png", "--lora", OTHER)
    assert said.startswith(f"{OTHER}:x.safetensors is a LoRA of another model than demo: ")
    assert len(hub.repos[OTHER].files["x.safetensors"]) > START
    assert hub.sent["x.safetensors"] <= START
    assert not list(home.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (MANY, f"{MANY} has 2 adapters; give one as {MANY}:a.safetensors, {MANY}:b.safetensors"),
        (
            f"{MANY}:d.safetensors",
            f"{MANY}:d.safetensors has no .safetensors file there; give one as {MANY}:a.safetens",
        ),
        (f"{MANY}:a.bin", f"{MANY}:a.bin is a pickle, which could run code"),
        ("no/thing", "there is no file or folder no/thing here, and as a repo: unknown repo id 'no/thing'"),
        ("https://example.org/a/b", "https://example.org/a/b is no address of Hugging Face"),
    ],
)
def test_what_is_no_adapter_is_told(hub, source, said):
    with pytest.raises((DownloadError, InputError)) as caught, find_adapter(source):
        pass
    assert said in str(caught.value)
    assert not hub.sent


@pytest.mark.parametrize(
    ("path", "names", "chosen"),
    [
        ("", ["x.safetensors", "pytorch_lora_weights.safetensors"], ["pytorch_lora_weights.safetensors"]),
        (
            "",
            ["adapter_model.safetensors", "adapter_config.json"],
            ["adapter_config.json", "adapter_model.safetensors"],
        ),
        ("", ["deep/x.safetensors", "deep/x.json", "y.json"], ["deep/x.json", "deep/x.safetensors"]),
        ("a", ["a/x.safetensors", "x.safetensors"], ["a/x.safetensors"]),
        ("a/x.safetensors", ["a/x.safetensors", "a/y.safetensors"], ["a/x.safetensors"]),
    ],
)
def test_which_file_is_meant(path, names, chosen):
    assert adapter_files(Remote("me/a", path), names) == chosen


def test_nothing_is_fetched_to_be_folded_into_another_model(hub, home):
    said = refusal("convert", "demo", "made", "--lora", OTHER)
    assert said.startswith(f"{OTHER}:x.safetensors is a LoRA of another model than demo: ")
    assert hub.sent["x.safetensors"] <= START
    assert not list(home.rglob("*.safetensors"))
    done("convert", "demo", "made", "--lora", f"{STYLE}:0.5", "--quiet")
    (told,) = Checkpoint.open(Path("made")).source["adapters"]
    assert (told["source"], told["scale"]) == (STYLE, 0.5)
    assert hub.sent[FILE] <= START + len(hub.repos[STYLE].files[FILE])


def test_which_of_several_files_is_taken_is_said(repos, models, home, caplog):
    style = repos[STYLE][FILE]
    with HubServer({STYLE: {FILE: style, "old/x.safetensors": style}}) as hub, using(hub, home):
        done("t2i", PROMPT, *SMALL, "-o", "a.png", "--lora", STYLE)
        assert f"{STYLE}: {STYLE}:{FILE} is taken, one of 2 files" in caplog.messages
        caplog.clear()
        done("t2i", PROMPT, *SMALL, "-o", "b.png", "--lora", f"{STYLE}:{FILE}")
        assert not caplog.messages


def test_a_gated_one_is_told(repos, models, home):
    with HubServer(repos, gated={STYLE}) as hub, using(hub, home):
        assert f"{STYLE} is gated: accept its licence at {hub.url}/{STYLE}" in refusal("t2i", PROMPT, "--lora", STYLE)
    with HubServer(repos, gated={STYLE}) as hub, using(hub, home, token="hf_access"):
        result = done("t2i", PROMPT, *SMALL, "-o", "a.png", "--lora", STYLE)
        assert f"licence: see {hub.url}/{STYLE}; gated, and this account has access\n" in result.stderr


def test_a_download_goes_on_where_it_broke_off(hub, repos):
    name, data = "b.safetensors", repos[MANY]["b.safetensors"]

    def cut(handler):
        if handler.headers["Range"] is None:  # no header
            hub.heal()
            hub.cut(name, len(data) // 2)
        handler.send_file(name, data, {})

    hub.script(name, cut)
    assert open_adapter(MANY, name).path.read_bytes() == data
    assert hub.sent[name] == START + len(data)


def test_a_model_card_says_what_it_was_trained_on(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, ai_toolkit("klein-4b"))
    with HubServer({STYLE: {"x.safetensors": path.read_bytes()[:300_000]}}) as server, using(server, tmp_path / "h"):
        entry = server.repos[STYLE].sibling("x.safetensors")
        size = path.stat().st_size
        listed = {
            "sha": server.repos[STYLE].commit,
            "cardData": {"base_model": "black-forest-labs/FLUX.2-klein-base-4B"},
        }
        server.publish(listed | {"siblings": [entry | {"size": size, "lfs": entry["lfs"] | {"size": size}}]})
        with find_adapter(STYLE) as found:
            assert found.file.trained_on == "klein-base-4b"


def test_nothing_is_fetched_for_an_adapter_of_another_model(models, repos, official, home, monkeypatch):
    monkeypatch.setattr("flux2_mlx.store.acquisition.write_checkpoint", lambda *_, **__: pytest.fail("converted"))
    with HubServer(repos | {REPO: official}) as server, using(server, home):
        said = refusal("t2i", PROMPT, "-m", REPO, "--variant", "klein-4b", "--lora", STYLE)
        assert server.sent[FILE] <= START
    assert said.startswith(f"{STYLE}:{FILE} is a LoRA for demo, which can't be used with klein-4b; give")
    assert not list(home.rglob("*.safetensors"))


def test_nothing_is_fetched_for_an_adapter_that_is_none(models, official, home):
    Path("a.safetensors").write_bytes(b"no header")
    with HubServer({REPO: official}) as server, using(server, home):
        assert refusal("t2i", PROMPT, "-m", REPO, "--variant", "klein-4b", "--lora", "a.safetensors").startswith(
            "a.saf"
        )
        assert not server.requests


def test_nothing_is_fetched_for_an_adapter_whose_values_are_damaged(models, official, home):
    save(Path("a.safetensors"), {name: x * np.nan for name, x in lora(LAYER, D, 4 * D).items()})
    with HubServer({REPO: official}) as server, using(server, home):
        said = refusal("t2i", PROMPT, "-m", REPO, "--variant", "klein-4b", "--lora", "a.safetensors", *SIZE)
        assert not any("diffusion_pytorch_model" in name for name in server.fetched if server.sent[name] > START)
    assert said.endswith("has values that are not finite; fetch the adapter again")


def test_nothing_is_read_that_does_not_fit_with_its_adapters(hub, monkeypatch):
    monkeypatch.setattr(Component, "load", lambda *_: pytest.fail("loaded"))
    outputs, inputs = demo_shape()
    rank = 8 * 2**20 // 4 // (outputs + inputs)
    shapes = {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}
    sizes = {f"{LAYER}.{name}.weight": shape for name, shape in shapes.items()}
    write(Path("a.safetensors"), {name: TensorInfo("F32", shape) for name, shape in sizes.items()})
    said = refusal("t2i", PROMPT, *SMALL, "--lora", "a.safetensors", "--memory-limit", "10MB")
    assert re.fullmatch("the .* needs .* MiB, the limit is 9.54 MiB; without adapters it would fit", said)


def test_a_replay_finds_adapters_by_their_hash(hub, home, models, caplog):
    done("t2i", PROMPT, *SMALL, "-o", "one.png", "--lora", f"{STYLE}:0.5")
    (told,) = read_settings(Path("one.png"))["adapters"]
    cached = next(adapters_with(told["sha256"], FILE, [Path()]))
    assert cached == home / f"hub/models--me--style/snapshots/{hub.repos[STYLE].commit}/{FILE}"
    hub.requests.clear()
    done("t2i", "--replay", "one.png", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("one.png"))
    assert hub.requests == []
    assert read_settings(Path("again.png"))["adapters"] == [told]
    kept = models / "loras/foxes/renamed.safetensors"
    kept.parent.mkdir(parents=True)
    cached.resolve().rename(kept)
    done("t2i", "--replay", "one.png", "-o", "third.png")
    assert np.array_equal(pixels("third.png"), pixels("one.png"))
    caplog.clear()
    done("t2i", "--replay", "one.png", "-o", "third.png", "--lora", f"{kept}:0.5", "--skip-existing")
    done("t2i", "--replay", "one.png", "-o", "one.png", "--lora", f"{kept}:0.5", "--skip-existing")
    assert not caplog.records
    kept.rename(kept.with_name("gone"))
    said = refusal("t2i", "--replay", "one.png", "-o", "fourth.png")
    assert f"the adapter {FILE} of SHA-256 {told['sha256']}" in said
    assert said.endswith(f"fetch {STYLE}:{FILE}, or name it with --lora")
    Path("style").mkdir()
    kept.with_name("gone").rename(f"style/{FILE}")
    assert next(adapters_with(told["sha256"], "style", [Path()])) == Path("style", FILE)


def test_a_note_on_an_adapter_is_said_once(hub, caplog):
    outputs, inputs = demo_shape()
    save(Path("a.safetensors"), lora(LAYER, outputs, inputs) | {"unknown.weight": np.zeros(1, np.float32)})
    with caplog.at_level(logging.WARNING):
        done("t2i", PROMPT, *SMALL, "--lora", "a.safetensors", "-o", "a.png")
        assert [record.getMessage() for record in caplog.records] == [
            "a.safetensors: it has unknown.weight, which belongs to no layer that can be adapted"
        ]
        caplog.clear()
        done("t2i", PROMPT, *SMALL, "--lora", "a.safetensors:0.5", "--lora", "a.safetensors:0.5", "-o", "b.png")
        assert len(caplog.records) == 1
    told = read_settings(Path("b.png"))["adapters"]
    assert [one["name"] for one in told] == ["default_0", "default_1"]


def test_subfolders_here(hub, repos):
    Path("made/sub").mkdir(parents=True)
    Path("made/sub/x.safetensors").write_bytes(repos[STYLE][FILE])
    with find_adapter("made", "x.safetensors", "sub") as found:
        assert (found.origin, found.download) == (None, None)
    with pytest.raises(CheckpointError, match="made holds no folder"), find_adapter("made", None, "../made"):
        pass
