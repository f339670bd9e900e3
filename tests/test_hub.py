"""Downloads from a hub on the loopback interface.

Most are in this process, with the settings of huggingface_hub patched; `start` makes one in a process of its own.
"""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_server import REFUSED, HubServer
from huggingface_hub import constants, file_download

import flux2_mlx.hub
from flux2_mlx.errors import DownloadError
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
    BIG: b"4" * 600_000,
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
DEFAULT_ENDPOINT = constants.ENDPOINT
GATED = {"gated": [REPO], "token": "hf_access"}
# What counts as big, and the size of chunks, are made for the small files of a test.
BIG_FROM, CHUNK = 10_000, 1024
SCRIPT = f"""
import json, sys
import flux2_mlx.hub
from huggingface_hub import constants
flux2_mlx.hub._SMALL, constants.DOWNLOAD_CHUNK_SIZE = {BIG_FROM}, {CHUNK}
try:
    print(flux2_mlx.hub.fetch(sys.argv[1], **json.loads(sys.argv[2])))
except flux2_mlx.hub.DownloadError as error:
    print(error)
    sys.exit(1)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(scope="module", autouse=True)
def session():
    """A client of this module's own: it keeps the proxies that it finds in the environment."""
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


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


@pytest.fixture
def home_without_big(hub, full_home):
    (snapshot(hub, full_home) / BIG).unlink()
    partial(hub, full_home).with_suffix("").unlink()
    return full_home


def start(hub, home, *, token=None, environment=(), **options):
    command = [sys.executable, "-c", SCRIPT, REPO, json.dumps(options)]
    environment = hub.environment(home, token) | dict(environment)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, process.errors = process.communicate(timeout=60)
    return process.returncode, out.removesuffix("\n")


def fetch(hub, home, *, repo=REPO, token=None, endpoint=None, **options):
    environment = hub.environment(home, token)
    endpoint = endpoint or environment["HF_ENDPOINT"]
    with pytest.MonkeyPatch.context() as patch:
        for key in os.environ.keys() - environment.keys():
            patch.delenv(key)
        if token:
            patch.setenv("HF_TOKEN", token)
        patch.setattr(constants, "ENDPOINT", endpoint)
        path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(DEFAULT_ENDPOINT)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + path)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
        patch.setattr(flux2_mlx.hub, "_SMALL", BIG_FROM)
        patch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))  # it waits between retries
        return flux2_mlx.hub.fetch(repo, **options)


def refusal(hub, home, **options):
    with pytest.raises(DownloadError) as caught:
        fetch(hub, home, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def snapshot(hub, home):
    return home / "hub/models--org--model/snapshots" / hub.repos[REPO].commit


def blobs(home):
    paths = home.glob("hub/models--org--model/blobs/*")
    return [path.read_bytes() for path in paths if path.suffix != ".incomplete"]


def partial(hub, home):
    """Where the part of the big file is that has arrived so far."""
    return home / "hub/models--org--model/blobs" / f"{hub.repos[REPO].etag(BIG)}.incomplete"


def wait_for_part(hub, home):
    path = partial(hub, home)
    wait_for(lambda: path.exists() and path.stat().st_size > 200_000)


def starts(hub):
    """Where each transfer of the big file began."""
    transfers = [request for request in hub.requests if request.host == "cdn" and BIG in request.path]
    return [int((request.range or "bytes=0-")[6:-1]) for request in transfers if request.method == "GET"]


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_fetches_only_what_a_conversion_needs(hub, home):
    code, out = finish(start(hub, home))  # here as the user runs it: with settings from the environment
    folder = Path(out)
    assert code == 0
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
    with HubServer({REPO: NEEDED | {BIG: b"8" * 600_000}}) as later:
        later.replace(BIG, b"9" * 600_000)
        refusal(later, full_home)
        assert fetch(later, full_home, offline=True) == snapshot(hub, full_home)


def test_goes_on_within_a_file_after_the_connection_was_cut(hub, home_without_big):
    hub.cut(BIG, 400_000)
    with contextlib.suppress(DownloadError):  # huggingface_hub 1 leaves the next attempt to the next call
        fetch(hub, home_without_big)
    assert files_in(fetch(hub, home_without_big)) == NEEDED
    first, second = starts(hub)
    assert first == 0
    assert 400_000 - CHUNK < second <= 400_000


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_goes_on_within_a_file_after_an_interrupt(hub, home, number, code):
    hub.stall(BIG, 400_000)
    process = start(hub, home)
    wait_for_part(hub, home)
    process.send_signal(number)
    assert finish(process) == (code, "")
    arrived = partial(hub, home).stat().st_size
    hub.heal()
    hub.requests.clear()
    assert files_in(fetch(hub, home)) == NEEDED
    assert hub.fetched == [BIG]
    assert starts(hub) == [arrived]
    assert not partial(hub, home).exists()


def test_second_process_waits_for_the_first(hub, home_without_big):
    hub.stall(BIG, 400_000)
    process = start(hub, home_without_big)
    wait_for_part(hub, home_without_big)
    hub.heal()
    hub.requests.clear()
    with ThreadPoolExecutor() as pool:
        second = pool.submit(fetch, hub, home_without_big)
        try:
            wait_for(lambda: hub.requests)
            time.sleep(0.5)
            assert starts(hub) == []
        finally:
            process.kill()
            finish(process)
        assert files_in(second.result(60)) == NEEDED
    assert starts(hub) != [0]


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        pytest.param(b"4" * 300_000, [300_000], id="right"),
        pytest.param(b"4" * 600_000, [], id="complete"),
        pytest.param(b"5" * 300_000, [300_000, 0], id="damaged"),
        pytest.param(b"5" * 600_000, [0], id="complete and damaged"),
        pytest.param(b"4" * 700_000, [0], id="too long"),
    ],
)
def test_partial_file_of_an_earlier_call(hub, home_without_big, left, expected):
    partial(hub, home_without_big).write_bytes(left)
    assert files_in(fetch(hub, home_without_big)) == NEEDED
    assert starts(hub) == expected
    assert not partial(hub, home_without_big).exists()


def test_partial_file_counts_as_fetched_for_the_disk_check(hub, home_without_big, monkeypatch):
    partial(hub, home_without_big).write_bytes(b"4" * 590_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    assert files_in(fetch(hub, home_without_big)) == NEEDED


def test_interrupted_download_does_not_count_as_complete_offline(hub, home):
    hub.replace(BIG, b"5" * 600_000)
    refusal(hub, home)
    assert "not complete in the cache" in refusal(hub, home, offline=True)
    assert "not complete in the cache" in refusal(hub, home, offline=True, revision=hub.repos[REPO].commit)


def test_missing_shard_does_not_count_as_complete_offline(hub, full_home):
    (snapshot(hub, full_home) / SHARD).unlink()
    assert "not complete in the cache" in refusal(hub, full_home, offline=True)


def test_offline_uses_the_cache_and_asks_nobody(hub, home, full_home):
    message = refusal(hub, home, offline=True)
    assert message.startswith(f"{REPO} is not complete in the cache {home}/hub and offline mode is on")
    assert fetch(hub, full_home, offline=True) == snapshot(hub, full_home)
    process = start(hub, full_home, environment={"HF_HUB_OFFLINE": "1"})
    assert finish(process) == (0, str(snapshot(hub, full_home)))
    assert hub.requests == []


def test_no_connection(hub, home, full_home):
    nowhere = f"http://127.0.0.1:{closed_port()}"
    message = refusal(hub, home, endpoint=nowhere)
    assert message.startswith(f"cannot reach {nowhere} (")
    assert message.endswith("check the connection, or give a folder")
    assert fetch(hub, full_home, endpoint=nowhere) == snapshot(hub, full_home)


def test_hub_out_of_order(hub, home, full_home, caplog):
    hub.fail(503)
    assert refusal(hub, home) == f"{hub.url} answers HTTP 503 for {REPO}; try again later"
    assert fetch(hub, full_home) == snapshot(hub, full_home)
    assert "Using the copy in the cache" in caplog.text


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
        assert starts(hub) == [0]


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
        (BIG, b"5" * 600_000, "arrived damaged (sha256: "),
        (SHARD, b"5" * 4000, "arrived damaged (sha256: "),
        (SHARD, b"2" * 3000, "should be of size 4000 but has size 3000"),
        ("vae/config.json", b"{}", "vae/config.json arrived damaged (bytes: 2, not 23)"),
    ],
)
def test_damaged_file_is_deleted_and_fetched_anew(hub, home, name, data, problem):
    hub.replace(name, data)
    assert problem in refusal(hub, home)
    assert hub.fetched.count(name) == 1
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


def test_full_disk_is_noticed_before_the_download(hub, home, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=612_000))
    message = refusal(hub, home)
    assert message.startswith(f"{REPO} needs 0.0 GB, the disk of {home}/hub has 0.0 GB free; make room")
    assert hub.fetched == []


def test_disk_that_fills_up_during_the_download(hub, home, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    assert refusal(hub, home).startswith(f"no space left in {home}/hub; make room")


def test_quiet_shows_no_progress_bars(hub, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # as if stderr were a terminal: otherwise huggingface_hub shows nothing
    fetch(hub, home)
    shown = capsys.readouterr().err
    assert Path(BIG).name in shown
    assert "config.json" not in shown
    fetch(hub, tmp_path / "other", quiet=True)
    assert capsys.readouterr().err == ""


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
