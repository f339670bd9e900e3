"""Models put together from files of the Hub: what is fetched, what is told first, and what is found again."""

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.cli_runner import done, refusal
from helpers.hub_client import using
from helpers.hub_server import HubServer

from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.config import VARIANTS
from flux2_mlx.errors import DownloadError, InputError
from flux2_mlx.store import FILE, demo_folder, find_checkpoint, resolve
from flux2_mlx.store.parts import Remote, files_of, located

DEMO = demo_folder()
OFFICIAL, TUNE, ENCODER = "org/official", "me/tune", "qwen/encoder"
TUNED = "files/red-fox.safetensors"
PREFIX = "model.diffusion_model."
START = 65_536


def part(name: str) -> dict[str, mx.array]:
    return mx.load(str(DEMO / name / "model.safetensors"))


def weights(path: Path, tensors: dict[str, mx.array], prefix: str = "") -> bytes:
    mx.save_safetensors(str(path), {prefix + name: array for name, array in tensors.items()}, {"format": "pt"})
    return path.read_bytes()


def fp8_cast(tensors: dict[str, mx.array]) -> bytes:
    """A file of the matrices among `tensors` in fp8, without scales, and of the rest."""
    header, data = {}, b""
    for name, array in tensors.items():
        code, stored = ("F8_E4M3", mx.to_fp8(array)) if array.ndim == 2 else ("BF16", array.view(mx.uint16))
        values = np.array(stored).tobytes()
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """A fine-tune in a file, an encoder in a repo of its own, and the official model, all of the built-in one."""
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    tokenizer = {name: (DEMO / "tokenizer" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    vae = {name: x.transpose(0, 3, 1, 2) if x.ndim == 4 else x for name, x in part("vae").items()}
    encoder = {f"model.{name}": array for name, array in part("text_encoder").items()}
    official = {
        "model_index.json": b"{}",
        "transformer/diffusion_pytorch_model.safetensors": b"never fetched",
        "text_encoder/model.safetensors": weights(path, encoder),
        "vae/diffusion_pytorch_model.safetensors": weights(path, vae),
        "vae/config.json": b"{}",
        **{f"tokenizer/{name}": data for name, data in tokenizer.items()},
    }
    half = len(encoder) // 2
    shards = [dict([*encoder.items()][:half]), dict([*encoder.items()][half:])]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    bare = [{name.removeprefix("model."): array for name, array in shard.items()} for shard in shards]
    index = {"weight_map": {name: file for file, shard in zip(names, bare, strict=True) for name in shard}}
    return {
        OFFICIAL: official,
        TUNE: {TUNED: weights(path, part("transformer"), PREFIX), "README.md": b"#"},
        ENCODER: {
            **{file: weights(path, shard) for file, shard in zip(names, bare, strict=True)},
            "model.safetensors.index.json": json.dumps(index).encode(),
            "config.json": b"{}",
            "generation_config.json": b"{}",
            **tokenizer,
        },
    }


@pytest.fixture
def home(tmp_path, monkeypatch, models):
    """The built-in model has an official repo here."""
    row = VARIANTS["demo"]
    monkeypatch.setitem(row.__dict__, "repo", OFFICIAL)
    yield tmp_path / "home"
    monkeypatch.undo()


@pytest.fixture
def hub(repos, home):
    with HubServer(repos) as server, using(server, home):
        yield server


def same_weights(folder: Path) -> bool:
    mine, theirs = Checkpoint.open(folder), Checkpoint.open(DEMO)
    for name in theirs.components:
        ours, wanted = (mx.load(str(x.components[name].files[0])) for x in (mine, theirs))
        if ours.keys() != wanted.keys() or not all(mx.array_equal(ours[key], wanted[key]).item() for key in ours):
            return False
    return mine.components.keys() == theirs.components.keys()


def test_a_file_of_the_hub_is_completed_from_the_official_repo(hub, tmp_path):
    made = done("convert", f"{TUNE}:{TUNED}", "made", "--text-quant", "bf16")
    assert same_weights(Path("made"))
    assert "transformer/diffusion_pytorch_model.safetensors" not in hub.fetched
    lines = made.stderr.splitlines()
    first = lines.index(f"{TUNE}:{TUNED} is not converted yet:")
    told = "\n".join(lines[first:])
    assert f"from       {hub.url}/{TUNE}\n" in told
    assert f"files      {TUNED}\n" in told
    assert "files      text_encoder/model.safetensors\n" in told
    assert "files      vae/config.json, vae/diffusion_pytorch_model.safetensors\n" in told
    assert "files      tokenizer/tokenizer.json, tokenizer/tokenizer_config.json\n" in told


def test_an_encoder_in_its_own_repo(hub):
    parts = ("--text-encoder", ENCODER, "--vae", OFFICIAL, "--tokenizer", f"https://huggingface.co/{ENCODER}")
    done("convert", f"{TUNE}:{TUNED}", "made", *parts, "--text-quant", "bf16", "--quiet")
    assert same_weights(Path("made"))
    assert sorted(set(hub.fetched)) == sorted(
        [
            TUNED,
            *("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
            *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
        ]
    )


def test_a_local_file_is_completed_from_the_hub_and_found_again(hub, repos, models):
    Path("mine.safetensors").write_bytes(repos[TUNE][TUNED])
    made = find_checkpoint("mine.safetensors", text_quant="bf16")
    assert same_weights(made)
    assert not any("transformer" in name for name in hub.fetched)
    hub.requests.clear()
    assert find_checkpoint("mine.safetensors", text_quant="bf16") == made
    assert hub.requests == []


def test_a_file_of_the_hub_is_converted_once(hub, models):
    checked = []
    made = find_checkpoint(f"{TUNE}:{TUNED}", text_quant="bf16", check=lambda outline: checked.append(outline.quant))
    assert (made.parent, made.name.startswith("me--tune--red-fox-"), checked) == (models, True, ["bf16"])
    hub.requests.clear()
    for name in (f"{TUNE}:{TUNED}", f"https://huggingface.co/{TUNE}/blob/main/{TUNED}"):
        assert find_checkpoint(name) == made
        assert find_checkpoint(name, only_converted=True) == made
    assert hub.requests == []
    with pytest.raises(InputError, match="is not converted yet"):
        find_checkpoint(f"{TUNE}:{TUNED}", quant="qint8", only_converted=True)


def test_a_repo_of_one_file_is_that_file(hub):
    done("convert", TUNE, "made", "--text-quant", "bf16", "--quiet")
    assert same_weights(Path("made"))


def test_a_repo_of_one_file_in_few_bits_keeps_them(repos, home, models, caplog):
    few = {"few.safetensors": fp8_cast(part("transformer"))}
    with HubServer(repos | {"me/few": few}) as server, using(server, home):
        made = find_checkpoint("me/few")
        assert Checkpoint.open(made).quant == "qint8"
        assert caplog.messages[-1].endswith("holds the transformer in few bits, which becomes qint8")
        assert find_checkpoint("me/few") == made
        assert find_checkpoint("me/few", quant="qint4") != made
        assert find_checkpoint("me/few", quant="qint8") == made
    assert find_checkpoint("me/few", only_converted=True) == made


def test_a_whole_model_takes_other_parts(hub, home):
    done("convert", OFFICIAL, "made", "--transformer", f"{TUNE}:{TUNED}", "--variant", "demo", "--text-quant", "bf16")
    assert same_weights(Path("made"))
    assert Checkpoint.open(Path("made")).source["name"] == f"{OFFICIAL} with another transformer"
    assert "transformer/diffusion_pytorch_model.safetensors" not in hub.fetched


def test_what_a_set_of_shards_is(repos, home):
    shards = [name for name in repos[ENCODER] if name.endswith(".safetensors")]
    unindexed = {f"a/{name}": repos[ENCODER][name] for name in shards}
    part = {shards[1]: repos[ENCODER][shards[1]]}
    with HubServer({**repos, "me/unindexed": unindexed, "me/part": part}) as server, using(server, home):
        for name in (ENCODER, f"{ENCODER}:{shards[1]}", "me/unindexed", f"me/unindexed:a/{shards[0]}"):
            assert done("info", name).stdout.startswith(f"{name}: text encoder of FLUX.2")
        assert refusal("info", "me/part").startswith(f"me/part is incomplete: there is no {shards[0]}; ")
    assert not [*home.rglob("*.safetensors")]


def test_a_repo_of_files_with_other_parts(repos, home):
    parts = ("--text-encoder", ENCODER, "--vae", OFFICIAL, "--tokenizer", ENCODER)
    several = {"a.safetensors": repos[TUNE][TUNED], "b b.safetensors": b""}
    with HubServer({**repos, "me/several": several}) as server, using(server, home):
        done("convert", TUNE, "made", *parts, "--text-quant", "bf16", "--quiet")
        assert refusal("convert", "me/several", "none", *parts) == (
            "me/several holds several files of weights: a.safetensors, b b.safetensors; give one as me/several:FILE"
        )
    assert same_weights(Path("made"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--vae", ENCODER),
            f"{ENCODER}:model-00001-of-00002.safetensors holds the text encoder of a model, not its VAE",
        ),
        (
            ("--text-encoder", f"{TUNE}:nothing.safetensors"),
            f"{TUNE} has no file of weights 'nothing.safetensors'; give one as {TUNE}:",
        ),
        (("--text-encoder", f"{TUNE}:a.pt"), f"{TUNE}:a.pt is a pickle, which could run code"),
        (
            ("--tokenizer", TUNE),
            f"{TUNE} has no tokenizer; give a repo with tokenizer.json or vocab.json or tekken.json",
        ),
        (("--vae", "no/thing"), "unknown repo id 'no/thing'"),
        (("--vae", "https://example.org/a/b"), "https://example.org/a/b is no address of Hugging Face"),
    ],
)
def test_a_wrong_part_costs_nothing(arguments, message, hub):
    assert refusal("convert", f"{TUNE}:{TUNED}", "made", *arguments).startswith(message)
    assert all(count <= START for name, count in hub.sent.items() if name.endswith(".safetensors"))


def test_a_download_goes_on_where_it_broke_off(hub, home):
    data = hub.repos[TUNE].files[TUNED]

    def cut(handler):
        if handler.headers["Range"] is None:  # no header
            hub.heal()
            hub.cut(TUNED, len(data) // 2)
        handler.send_file(TUNED, data, {})

    hub.script(TUNED, cut)
    done("convert", f"{TUNE}:{TUNED}", "made", "--text-quant", "bf16", "--quiet")
    assert hub.sent[TUNED] == START + len(data)
    assert same_weights(Path("made"))


def test_what_was_fetched_does_not_stay(hub, home):
    done("convert", f"{TUNE}:{TUNED}", "made", "--text-quant", "bf16", "--quiet", "--no-keep-source")
    assert not list((home / "hub").rglob("*.safetensors"))
    assert same_weights(Path("made"))


def test_gated_parts_are_told(repos, home):
    with HubServer(repos, gated={OFFICIAL}) as hub, using(hub, home):
        message = refusal("convert", f"{TUNE}:{TUNED}", "made")
        assert (
            f"they can't be had from there: {OFFICIAL} is gated: accept its licence at {hub.url}/{OFFICIAL}" in message
        )
    with HubServer(repos, gated={OFFICIAL}) as hub, using(hub, home, token="hf_access"):
        told = done("convert", f"{TUNE}:{TUNED}", "made").stderr
        assert "; gated, and this account has access\n" in told


def test_offline_the_cache_will_do(hub, home):
    done("convert", f"{TUNE}:{TUNED}", "made", "--text-quant", "bf16", "--quiet")
    with using(hub, home, offline=True):
        done("convert", f"{TUNE}:{TUNED}", "again", "--text-quant", "bf16", "--quiet")
        message = refusal("convert", f"{TUNE}:{TUNED}", "more", "--text-encoder", ENCODER)
    assert message.startswith(f"{ENCODER} is not in the cache")
    assert same_weights(Path("again"))


def test_info_says_what_would_be_fetched(hub, repos):
    Path("mine.safetensors").write_bytes(repos[TUNE][TUNED])
    last = done("info", "mine.safetensors").stdout.splitlines()[-1]
    fetched = f"text encoder, VAE, tokenizer from {OFFICIAL} (Apache-2.0 licence)"
    assert last == f"convert    {fetched}; stored as bf16, the text encoder as qint8"
    assert hub.requests == []


def test_a_tokenizer_beside_an_encoder_is_not_missing(hub):
    assert json.loads(done("info", ENCODER, "--json").stdout)["missing"] == ["transformer", "vae"]


def test_names_of_files(models):
    for name in ("me/tune:a/x.gguf", "https://huggingface.co/me/tune/resolve/main/a/x.gguf?download=true"):
        model = resolve(name)
        assert (model.kind, model.repo, model.file, model.origin) == (FILE, "me/tune", "a/x.gguf", "me/tune:a/x.gguf")
    Path("me").mkdir()
    Path("me/tune:x.gguf").touch()
    assert resolve("me/tune:x.gguf").kind == "source"
    assert located("me/tune:x.gguf") == Path("me/tune:x.gguf")
    assert located("me/tune:y.gguf") == Remote("me/tune", "y.gguf")
    assert located("./me/tune") == Path("me/tune")
    assert located(Path("you/tune")) == Path("you/tune")


DEV = {f"transformer/diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)} | {
    *("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json", "model_index.json"),
    *("flux2-dev.safetensors", "ae.safetensors", "tokenizer/tokenizer.json", "tokenizer/chat_template.jinja"),
    *("vae/model.fp16.safetensors", "vae/model.safetensors", "x/vocab.json", "x/merges.txt", "x/tokenizer_config.json"),
    *("g/a-00001-of-00002.gguf", "g/a-00002-of-00002.gguf", "g/b.gguf", "t/tekken.json", "t/tokenizer_config.json"),
}


@pytest.mark.parametrize(
    ("path", "kind", "expected"),
    [
        ("", "transformer", {name for name in DEV if name.startswith(("transformer/", "model_index"))}),
        ("", "vae", {"vae/model.safetensors"}),
        ("", "tokenizer", {"tokenizer/tokenizer.json", "tokenizer/chat_template.jinja"}),
        ("x", "tokenizer", {"x/vocab.json", "x/merges.txt", "x/tokenizer_config.json"}),
        ("x/vocab.json", "tokenizer", {"x/vocab.json", "x/merges.txt", "x/tokenizer_config.json"}),
        ("t", "tokenizer", {"t/tekken.json"}),
        ("g/a-00002-of-00002.gguf", "transformer", {"g/a-00001-of-00002.gguf", "g/a-00002-of-00002.gguf"}),
        ("flux2-dev.safetensors", None, {"flux2-dev.safetensors"}),
        ("", None, {name for name in DEV if name.startswith(("transformer/", "vae/", "tokenizer/", "model_index"))}),
        ("t", "vae", "me/dev has no file of weights 't'; give one as me/dev:ae.safetensors"),
        (
            "g",
            "transformer",
            "me/dev:g holds several files of weights: g/a-00001-of-00002.gguf, g/a-00002",
        ),
        ("x", "vae", "me/dev has no file of weights 'x'; give one as me/dev:ae.safetensors"),
    ],
)
def test_which_files_are_meant(path, kind, expected):
    if isinstance(expected, set):
        assert set(files_of(Remote("me/dev", path), kind, DEV)) == expected
        return
    with pytest.raises(DownloadError) as caught:
        files_of(Remote("me/dev", path), kind, DEV)
    assert expected in str(caught.value)
