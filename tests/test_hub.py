"""What is fetched from a hub on the loopback interface, what is kept, and how a download goes on.

Most downloads are in this process; `start` makes one in a process of its own.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.hub_client import (
    BIG,
    CHUNK,
    NEEDED,
    REPO,
    SHARD,
    UNNEEDED,
    blob,
    fetch,
    files_in,
    partial,
    refusal,
    starts,
    storage,
    unreachable,
)
from helpers.hub_server import HubServer

SCRIPT = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which those who run tests may have let be ignored
import flux2_mlx.hub
from flux2_mlx.store.parts import WHOLE
try:
    print(flux2_mlx.hub.fetch(sys.argv[1], folders=WHOLE, **json.loads(sys.argv[2])))
except flux2_mlx.hub.repo.DownloadError as error:
    print(error)
    sys.exit(1)
except KeyboardInterrupt:
    sys.exit(130)
"""


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
    blob(hub, full_home, BIG).unlink()
    return full_home


def start(hub, home, *, token=None, environment=(), **options):
    command = [sys.executable, "-c", SCRIPT, REPO, json.dumps(options)]
    environment = hub.environment(home, token) | dict(environment)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, process.errors = process.communicate(timeout=60)
    return process.returncode, out.removesuffix("\n")


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def snapshot(hub, home):
    return storage(home) / "snapshots" / hub.repos[REPO].commit


def blobs(home):
    paths = home.glob("hub/models--org--model/blobs/*")
    return [path.read_bytes() for path in paths if path.suffix != ".incomplete"]


def wait_for_part(hub, home):
    path = partial(hub, home, BIG)
    wait_for(lambda: path.exists() and path.stat().st_size > 200_000)


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
    arrived = partial(hub, home, BIG).stat().st_size
    hub.heal()
    hub.requests.clear()
    assert files_in(fetch(hub, home)) == NEEDED
    assert hub.fetched == [BIG]
    assert starts(hub) == [arrived]
    assert not partial(hub, home, BIG).exists()


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
    partial(hub, home_without_big, BIG).write_bytes(left)
    assert files_in(fetch(hub, home_without_big)) == NEEDED
    assert starts(hub) == expected
    assert not partial(hub, home_without_big, BIG).exists()


def test_partial_file_counts_as_fetched_for_the_disk_check(hub, home_without_big, monkeypatch):
    partial(hub, home_without_big, BIG).write_bytes(b"4" * 590_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    assert files_in(fetch(hub, home_without_big)) == NEEDED


def test_interrupted_download_does_not_count_as_complete_offline(hub, home):
    hub.replace(BIG, b"5" * 600_000)
    refusal(hub, home)
    assert "not complete in the cache" in refusal(hub, home, offline=True)


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
    nowhere = unreachable()
    message = refusal(hub, home, endpoint=nowhere)
    assert message.startswith(f"cannot reach {nowhere} (")
    assert message.endswith("check the connection, or give a folder")
    assert fetch(hub, full_home, endpoint=nowhere) == snapshot(hub, full_home)


def test_hub_out_of_order(hub, home, full_home, caplog):
    hub.fail(503)
    assert refusal(hub, home) == f"{hub.url} answers HTTP 503 for {REPO}; try again later"
    assert fetch(hub, full_home) == snapshot(hub, full_home)
    assert "Using the copy in the cache" in caplog.text


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        (BIG, b"5" * 600_000, "arrived damaged (sha256: "),
        (SHARD, b"5" * 4000, "arrived damaged (sha256: "),
        (SHARD, b"2" * 3000, "arrived damaged (bytes: 3000, not 4000)"),
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


def test_progress_counts_all_bytes_from_those_that_are_there(hub, home_without_big):
    total = sum(map(len, NEEDED.values()))
    partial(hub, home_without_big, BIG).write_bytes(b"4" * 300_000)
    reports = []
    fetch(hub, home_without_big, progress=lambda *report: reports.append(report))
    assert reports[0] == (total - 300_000, total)
    assert reports[-1] == (total, total)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
