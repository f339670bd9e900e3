"""Downloads from a hub on the loopback interface, each in a process: huggingface_hub reads its settings at import."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import REFUSED, HubServer

from flux2_mlx.hub import is_repo_id

REPO = "org/model"
SHARD = "text_encoder/model-00002-of-00002.safetensors"
BIG = "transformer/diffusion_pytorch_model.safetensors"
SHARDS = {f"layer.{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
NEEDED = {
    "model_index.json": b'{"_class_name": "Flux2KleinPipeline"}',
    "scheduler/scheduler_config.json": b'{"shift": 3.0}',
    "tokenizer/tokenizer.json": b'{"model": {}}',
    "tokenizer/merges.txt": b"a b",
    "tokenizer/chat_template.jinja": b"{{ messages }}",
    "text_encoder/config.json": b'{"hidden_size": 8}',
    "text_encoder/model.safetensors.index.json": json.dumps({"weight_map": SHARDS}).encode(),
    "text_encoder/model-00001-of-00002.safetensors": b"1" * 3000,
    SHARD: b"2" * 4000,
    "vae/config.json": b'{"latent_channels": 32}',
    "vae/diffusion_pytorch_model.safetensors": b"3" * 5000,
    "transformer/config.json": b'{"num_layers": 5}',
    BIG: b"4" * 60_000,
}
UNNEEDED = {
    "README.md": b"# Model",
    "LICENSE.txt": b"free",
    "flux-2-model.safetensors": b"5" * 60_000,
    "config.json": b"{}",
    "teaser.png": b"6",
    "vae/diffusion_pytorch_model.bin": b"7",
    "transformer/old/model.safetensors": b"8",
}
GATED = {"gated": [REPO], "token": "hf_access"}
# Small chunks, for the small files of a test; the other settings are the product's own.
SCRIPT = """
import json, shutil, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1024
from flux2_mlx.errors import DownloadError
from flux2_mlx.hub import fetch
{setup}
try:
    print(fetch(sys.argv[1], **json.loads(sys.argv[2])))
except DownloadError as error:
    print(error)
    sys.exit(1)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def hub():
    with HubServer({REPO: NEEDED | UNNEEDED}) as server:
        yield server


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    home = tmp_path_factory.mktemp("downloaded")
    with HubServer({REPO: NEEDED | UNNEEDED}) as server:
        fetch(server, home)
    return home


@pytest.fixture
def full_home(downloaded, tmp_path):
    return shutil.copytree(downloaded, tmp_path / "full", symlinks=True)


def start(hub, home, *, repo=REPO, token=None, setup="", environment=(), **options):
    command = [sys.executable, "-c", SCRIPT.replace("{setup}", setup), repo, json.dumps(options)]
    environment = hub.environment(home, token) | dict(environment)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, process.errors = process.communicate(timeout=60)
    return process.returncode, out.removesuffix("\n")


def fetch(hub, home, **options):
    process = start(hub, home, **options)
    code, out = finish(process)
    assert code == 0, out + process.errors
    return Path(out)


def refusal(hub, home, **options):
    process = start(hub, home, **options)
    code, out = finish(process)
    assert code == 1, out + process.errors
    assert "\n" not in out
    return out


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def snapshot(hub, home):
    return home / "hub/models--org--model/snapshots" / hub.repos[REPO].commit


def blobs(home):
    paths = home.glob("hub/models--org--model/blobs/*")
    return [path.read_bytes() for path in paths if path.suffix != ".incomplete"]


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_fetches_only_what_a_conversion_needs(hub, home):
    folder = fetch(hub, home)
    assert files_in(folder) == NEEDED
    assert sorted(hub.fetched) == sorted(NEEDED)
    assert folder == snapshot(hub, home)


def test_second_fetch_transfers_nothing(hub, full_home):
    assert fetch(hub, full_home) == snapshot(hub, full_home)
    assert hub.fetched == []


def test_new_commit_with_the_same_files_transfers_only_what_changed(full_home):
    changed = NEEDED | {"transformer/config.json": b'{"num_layers": 8}'}
    with HubServer({REPO: changed}) as later:
        assert files_in(fetch(later, full_home)) == changed
        assert later.fetched == ["transformer/config.json"]


def test_failed_update_leaves_the_older_copy_for_offline_use(hub, full_home):
    with HubServer({REPO: NEEDED | {BIG: b"8" * 60_000}}) as later:
        later.replace(BIG, b"9" * 60_000)
        refusal(later, full_home)
        assert fetch(later, full_home, offline=True) == snapshot(hub, full_home)


def test_goes_on_within_a_file_after_the_connection_was_cut(hub, home):
    hub.cut(BIG, 40_000)
    finish(start(hub, home))  # in old versions of huggingface_hub this call fails, and the next one goes on
    assert files_in(fetch(hub, home)) == NEEDED
    whole, rest = [request.range for request in hub.requests if BIG in request.path and request.method == "GET"][-2:]
    assert whole is None
    assert 39_000 < int(rest.removeprefix("bytes=").removesuffix("-")) <= 40_000


def test_after_an_interrupt_finished_files_are_not_fetched_again(hub, home):
    hub.stall(BIG, 40_000)
    process = start(hub, home)
    assert hub.stalled.wait(30)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "")
    hub.heal()
    hub.requests.clear()
    assert files_in(fetch(hub, home)) == NEEDED
    assert hub.fetched == [BIG]


def test_interrupted_download_does_not_count_as_complete_offline(hub, home):
    hub.replace(BIG, b"5" * 60_000)
    refusal(hub, home)
    assert "not complete in the cache" in refusal(hub, home, offline=True)
    assert "not complete in the cache" in refusal(hub, home, offline=True, revision=hub.repos[REPO].commit)


def test_missing_shard_does_not_count_as_complete_offline(hub, full_home):
    (snapshot(hub, full_home) / SHARD).unlink()
    assert "not complete in the cache" in refusal(hub, full_home, offline=True)


@pytest.mark.parametrize("offline", [{"offline": True}, {"environment": {"HF_HUB_OFFLINE": "1"}}])
def test_offline_uses_the_cache_and_asks_nobody(hub, home, full_home, offline):
    message = refusal(hub, home, **offline)
    assert message.startswith(f"{REPO} is not complete in the cache {home}/hub and offline mode is on")
    assert fetch(hub, full_home, **offline) == snapshot(hub, full_home)
    assert hub.requests == []


def test_no_connection(hub, home, full_home):
    nowhere = {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}
    message = refusal(hub, home, environment=nowhere)
    assert message.startswith(f"cannot reach {nowhere['HF_ENDPOINT']} (")
    assert message.endswith("check the connection, or give a folder")
    assert fetch(hub, full_home, environment=nowhere) == snapshot(hub, full_home)


def test_hub_out_of_order(hub, home, full_home):
    hub.fail(503)
    assert refusal(hub, home) == f"{hub.url} answers HTTP 503 for {REPO}; try again later"
    process = start(hub, full_home)
    assert finish(process) == (0, str(snapshot(hub, full_home)))
    assert "Using the copy in the cache" in process.errors


def test_gated_without_token(home):
    with HubServer({REPO: NEEDED}, **GATED) as hub:
        message = refusal(hub, home)
        page = f"{hub.url}/{REPO}"
        assert message == (
            f"{REPO} is gated: accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
        )


def test_gated_with_token_of_an_account_without_access(home):
    with HubServer({REPO: NEEDED}, **GATED) as hub:
        message = refusal(hub, home, token="hf_other")
        assert message.startswith(f"{REPO} is gated and your token has no access")
        assert f"accept its licence at {hub.url}/{REPO}" in message


def test_token_is_sent_to_the_hub_only(home):
    with HubServer({REPO: NEEDED}, **GATED) as hub:
        assert files_in(fetch(hub, home, token="hf_access")) == NEEDED
        sent = {(request.host, request.token) for request in hub.requests}
        assert sent == {("hub", "hf_access"), ("cdn", None)}


def test_refused_token(hub, home):
    message = refusal(hub, home, token=REFUSED)
    assert message.startswith(f"no access to {hub.url}/{REPO} (HTTP 401: Invalid credentials")
    assert "hf auth login" in message


@pytest.mark.parametrize("token", [None, "hf_access"])
def test_unknown_repo(hub, home, token):
    message = refusal(hub, home, repo="org/modle", token=token)
    assert message.startswith(f"unknown repo id 'org/modle' at {hub.url}; check the spelling")


def test_unknown_revision(hub, home):
    assert refusal(hub, home, revision="v2").startswith(f"{REPO} has no revision 'v2'")


def test_other_layout(home):
    with HubServer({REPO: UNNEEDED}) as hub:
        assert refusal(hub, home).startswith(f"{REPO} has no model_index.json")
        assert hub.fetched == []


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        (BIG, b"5" * 60_000, "arrived damaged (sha256: "),
        (BIG, b"4" * 59_000, "should be of size 60000 but has size 59000"),
        ("vae/config.json", b"{}", "vae/config.json arrived damaged (bytes: 2, not 23)"),
    ],
)
def test_damaged_file_is_deleted_and_fetched_anew(hub, home, name, data, problem):
    hub.replace(name, data)
    assert problem in refusal(hub, home)
    assert data not in blobs(home)
    assert not list(home.glob(f"hub/models--org--model/snapshots/*/{name}"))
    hub.heal()
    hub.requests.clear()
    assert files_in(fetch(hub, home)) == NEEDED
    assert hub.fetched[0] == name


def test_file_cut_short_in_the_cache_is_fetched_anew(hub, full_home):
    with (snapshot(hub, full_home) / BIG).open("r+b") as stream:
        stream.truncate(100)
    assert files_in(fetch(hub, full_home)) == NEEDED
    assert hub.fetched == [BIG]


def test_full_disk_is_noticed_before_the_download(hub, home):
    setup = "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9, 72_000)"
    message = refusal(hub, home, setup=setup)
    assert message.startswith(f"{REPO} needs 0.0 GB, the disk of {home}/hub has 0.0 GB free; make room")
    assert hub.fetched == []


def test_disk_that_fills_up_during_the_download(hub, home):
    setup = """
import errno, huggingface_hub.file_download as download
def full(url, stream, **options):
    raise OSError(errno.ENOSPC, "No space left on device")
download.http_get = full
"""
    assert refusal(hub, home, setup=setup).startswith(f"no space left in {home}/hub; make room")


def test_quiet_shows_no_progress_bars(hub, home, tmp_path):
    setup = "import flux2_mlx.hub; flux2_mlx.hub._SMALL = 10_000"
    terminal = {"TQDM_POSITION": "-1"}  # as if stderr were one: otherwise huggingface_hub shows nothing
    loud = start(hub, home, setup=setup, environment=terminal)
    assert finish(loud)[0] == 0
    assert Path(BIG).name in loud.errors
    assert "config.json" not in loud.errors
    quiet = start(hub, tmp_path / "other", setup=setup, environment=terminal, quiet=True)
    assert finish(quiet)[0] == 0
    assert quiet.errors == ""


def test_repo_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/folder").mkdir(parents=True)
    assert is_repo_id("black-forest-labs/FLUX.2-klein-4B")
    for text in (
        "klein-4b",
        "org/folder",
        "/org/model",
        "./model",
        "a/b/c",
        "org/",
        "org/a b",
        "org/m.safetensors",
        "",
    ):
        assert not is_repo_id(text), text


def test_not_a_repo_id(hub, home):
    assert refusal(hub, home, repo="klein-4c") == "'klein-4c' is no Hugging Face repo id; give it as owner/name"
    assert hub.requests == []
