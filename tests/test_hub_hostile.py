"""What a hub that is broken or hostile, a slow one, or a tampered cache can do: nothing outside the repo's folder."""

import json
import os
import threading
import time

import pytest
from helpers.hub_client import (
    BIG,
    NEEDED,
    REPO,
    SHARD,
    blob,
    fetch,
    files_in,
    listing,
    partial,
    pointer,
    refusal,
    storage,
)

import flux2_mlx.hub
import flux2_mlx.hub.downloads

CONFIG = "vae/config.json"  # no LFS file
FLOOD = 40_000_000  # bytes of a body without end; more than the buffers of two sockets hold
FEW = 20_000_000
DEEP = b"[" * 100_000
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9"


def head(handler, *lines):
    handler.wfile.write("\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]).encode())


def flood(sent, *lines, status="200 OK"):
    def act(handler):
        handler.wfile.write("\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode())
        for _ in range(FLOOD // 100_000):
            handler.wfile.write(b"4" * 100_000)
            sent.append(100_000)

    return act


@pytest.mark.parametrize("lines", [[f"Content-Length: {FLOOD}"], []])
@pytest.mark.parametrize("name", [BIG, CONFIG, "tokenizer/tokenizer.json"])
def test_a_body_longer_than_listed_is_not_read_to_its_end(hub, home, name, lines):
    sent = []
    hub.script(name, flood(sent, *lines))
    assert f"{name} arrived damaged (bytes: more than {len(NEEDED[name])}, not" in refusal(hub, home)
    assert sum(sent) < FEW
    assert sum(map(len, files_in(home).values())) < 1_000_000


def test_an_endless_listing_is_not_read_to_its_end(hub, home):
    sent = []
    hub.script("", flood(sent))
    assert "lists org/model as no hub does (more than 4000000 bytes)" in refusal(hub, home)
    assert sum(sent) < FEW


def test_the_library_below_asks_the_hub_for_nothing(hub, home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr("huggingface_hub.constants.AGENT_HARNESSES_PATH", str(home / "agents"), raising=False)
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None, raising=False)
    fetch(hub, home, token="hf_access")
    ours = (f"/api/models/{REPO}", f"/{REPO}/resolve/")
    asked = {request.path for request in hub.requests if request.host == "hub"}
    assert {path for path in asked if not path.startswith(ours)} == set()


def test_a_token_that_is_not_to_be_sent_unasked(hub, home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    fetch(hub, home, token="hf_access")
    assert {request.token for request in hub.requests} == {None}


@pytest.mark.parametrize("name", [BIG, CONFIG])
def test_another_range_than_was_asked_for(hub, home, name):
    def act(handler):
        handler.answer(206, {"Content-Range": "bytes 5-9/10", "Content-Length": 5}, b"44444")

    hub.script(name, act)
    problem = "the server sent bytes from 5 on, not from 0"
    assert f"{name} arrived damaged ({problem})" in refusal(hub, home)
    if name == BIG:  # whose header is read first where somebody looks at the model
        message = refusal(hub, home, check=lambda folder, wanted: wanted)
        assert message == f"{hub.url} sends {REPO} as no hub does ({problem}); check HF_ENDPOINT, then start again"


def test_the_body_of_a_redirect_is_not_read(hub, home):
    sent = []
    hub.script(CONFIG, flood(sent, f"Location: {hub.cdn}/nowhere", status="302 Found"))
    assert "HTTP 404" in refusal(hub, home)
    assert sum(sent) < FEW


def test_redirects_in_a_circle(hub, home):
    hub.script(CONFIG, lambda handler: handler.answer(302, {"Location": handler.path, "Content-Length": 0}, b""))
    assert "broke off (more than 10 redirects)" in refusal(hub, home)


@pytest.mark.parametrize("name", [CONFIG, SHARD, "tokenizer/tokenizer.json", "model_index.json"])
def test_wrong_content_of_the_right_size_in_the_cache_is_fetched_anew(hub, filled_home, name):
    blob(hub, filled_home, name).write_bytes(b"?" * len(NEEDED[name]))
    assert files_in(fetch(hub, filled_home)) == NEEDED
    assert hub.fetched == [name]


@pytest.mark.parametrize("name", [CONFIG, "tokenizer/merges.txt"])
def test_wrong_content_of_the_right_size_does_not_arrive(hub, home, name):
    hub.replace(name, b"?" * len(NEEDED[name]))
    assert f"{name} arrived damaged (sha1: " in refusal(hub, home)
    assert not blob(hub, home, name).exists()
    hub.heal()
    assert files_in(fetch(hub, home)) == NEEDED


def trickle(body, released):
    """Send a byte each hundredth of a second."""

    def act(handler):
        for byte in body:
            if released.wait(0.01):
                return
            handler.wfile.write(bytes([byte]))

    return act


@pytest.fixture
def released():
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9", b"HTTP/1.1 100 C\r\n"]
)
def test_a_listing_that_trickles_is_given_up(hub, home, released, start, monkeypatch):
    monkeypatch.setattr(flux2_mlx.hub.downloads, "_TICK", 0.002, raising=False)
    rest = json.dumps(listing(hub)).encode()
    body = f"HTTP/1.1 200 OK\r\nContent-Length: {len(rest)}\r\n\r\n".encode() + rest
    hub.script("", trickle(start + (b";a" * 5000 if start == CHUNKED else body), released))
    assert refusal(hub, home).startswith(f"cannot reach {hub.url} (fewer than 60000 bytes came in")


def test_a_file_that_trickles_is_given_up_and_goes_on_later(hub, filled_home, released, monkeypatch):
    blob(hub, filled_home, BIG).unlink()

    def act(handler):
        monkeypatch.setattr(flux2_mlx.hub.downloads, "_TICK", 0.002, raising=False)
        head(handler, "Content-Length: 600000")
        handler.wfile.write(b"4" * 1000)
        trickle(b"4" * 3000, released)(handler)

    hub.script(BIG, act)
    assert "broke off (fewer than 60000 bytes came in" in refusal(hub, filled_home)
    arrived = partial(hub, filled_home, BIG).stat().st_size
    hub.heal()
    monkeypatch.undo()
    hub.requests.clear()
    assert files_in(fetch(hub, filled_home)) == NEEDED
    (request,) = (request for request in hub.requests if request.host == "cdn")
    assert request.range == (f"bytes={arrived}-" if arrived else None)


def test_a_hub_that_does_not_answer_is_waited_for_as_long_as_set(hub, home, released, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 30)
    hub.script("", lambda handler: released.wait(20))
    assert refusal(hub, home).startswith(f"cannot reach {hub.url} (")


def partial_of_big(hub, home):
    """The cache without the big file, of which a half has arrived."""
    blob(hub, home, BIG).unlink()
    path = partial(hub, home, BIG)
    path.write_bytes(NEEDED[BIG][:300_000])
    return path


def test_a_page_in_place_of_a_file_costs_nothing_that_had_arrived(hub, filled_home):
    path = partial_of_big(hub, filled_home)
    hub.script(BIG, lambda handler: handler.answer(200, {"Content-Length": 6}, b"log in"))
    assert "broke off (6 bytes came, fewer than an earlier call got)" in refusal(hub, filled_home)
    assert path.read_bytes() == NEEDED[BIG][:300_000]


@pytest.mark.parametrize("length", [["Content-Length: 600000"], []])
def test_a_file_from_a_server_without_ranges_is_completed(hub, filled_home, length):
    path = partial_of_big(hub, filled_home)

    def act(handler):
        head(handler, *length)
        handler.wfile.write(NEEDED[BIG])

    hub.script(BIG, act)
    assert files_in(fetch(hub, filled_home)) == NEEDED
    assert not path.exists()


def test_many_files_are_listed_in_no_time(hub, home):
    info = listing(hub)
    info["siblings"] += [{"rfilename": f"vae/{i}.json", "size": 1, "blobId": "b" * 40} for i in range(40_000)]
    info["siblings"].append(info["siblings"][-1])
    hub.publish(info)
    start = time.process_time()
    assert "vae/39999.json twice" in refusal(hub, home)
    assert time.process_time() - start < 10


def changed(entry_name=CONFIG, /, **values):
    def change(info):
        (entry,) = (entry for entry in info["siblings"] if entry["rfilename"] == entry_name)
        entry.update(values)
        return info

    return change


ODD = {
    "null": lambda info: None,
    "list": lambda info: [info],
    "text": lambda info: "model",
    "page": lambda info: b"<html>log in</html>",
    "nothing": lambda info: b"",
    "deep": lambda info: DEEP,
    "not utf-8": lambda info: b'{"sha": "\xff"}',
    "no commit": lambda info: {**info, "sha": None},
    "commit as a path": lambda info: {**info, "sha": "../../../canary"},
    "short commit": lambda info: {**info, "sha": "abc"},
    "no files": lambda info: {**info, "siblings": None},
    "files by name": lambda info: {**info, "siblings": {"model_index.json": 1}},
    "files as text": lambda info: {**info, "siblings": ["model_index.json"]},
    "null file": lambda info: {**info, "siblings": [*info["siblings"], None]},
    "name is a number": lambda info: {**info, "siblings": [*info["siblings"], {"rfilename": 5}]},
    "twice": lambda info: {**info, "siblings": info["siblings"] * 2},
    "twice on many disks": lambda info: changed("vae/diffusion_pytorch_model.safetensors", rfilename="vae/CONFIG.json")(
        info
    ),
    "size as text": changed(size="23"),
    "no size": changed(size=None),
    "negative size": changed(size=-1),
    "fraction": changed(size=23.5),
    "truth": changed(size=True),
    "huge size": changed(BIG, size=10**30),
    "number beyond floats": changed(BIG, size=10**400),
    "infinite": changed(BIG, size=float("inf")),
    "two sizes": changed(BIG, lfs={"sha256": "0" * 64, "size": 7}),
    "no hash": changed(blobId=None),
    "hash as a path": changed(blobId="../../../../canary/file"),
    "absolute hash": changed(blobId="/etc/passwd"),
    "hash in capitals": changed(blobId="A" * 40),
    "hash of another kind": changed(blobId="a" * 64),
    "LFS hash as a path": changed(BIG, lfs={"sha256": "../../../../canary/file", "size": 600_000}),
    "LFS hash as a number": changed(BIG, lfs={"sha256": 5, "size": 600_000}),
    "empty LFS": changed(BIG, lfs={}),
    "true LFS": changed(BIG, lfs=True),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_listing_is_refused_before_anything_is_done(hub, home, canary, kind):
    hub.publish(ODD[kind](listing(hub)))
    kept = files_in(canary)
    message = refusal(hub, home)
    assert message.startswith(f"{hub.url} lists {REPO} as no hub does (")
    assert len(message) < 400
    assert files_in(canary) == kept
    assert not home.exists()
    assert hub.fetched == []


@pytest.mark.parametrize(
    "name",
    [
        "../../../../canary/x.json",
        "/tmp/x.json",
        "vae/../../../../../canary/x.json",
        "vae/..json",
        "vae/a\nb.json",
        "vae/\x1b[2J.json",
        "vae/" + "a" * 300 + ".json",
        "vae/.json",
    ],
)
def test_files_with_names_that_no_model_has_are_left_alone(hub, home, canary, name):
    info = listing(hub)
    info["siblings"].append({**info["siblings"][0], "rfilename": name})
    hub.publish(info)
    kept = files_in(canary)
    assert files_in(fetch(hub, home)) == NEEDED
    assert files_in(canary) == kept


def test_an_odd_listing_leaves_the_copy_in_the_cache_in_use(hub, filled_home, caplog):
    hub.publish(b"<html>log in</html>")
    assert fetch(hub, filled_home) == storage(filled_home) / "snapshots" / hub.repos[REPO].commit
    (record,) = caplog.records
    assert "Using the copy in the cache" in record.message


@pytest.mark.parametrize("place", ["blobs", "snapshots", "refs", "snapshots/{commit}", "snapshots/{commit}/vae"])
def test_a_folder_that_leads_out_of_the_cache_is_refused(hub, home, canary, place):
    folder = storage(home) / place.format(commit=hub.repos[REPO].commit)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(canary)
    kept = files_in(canary)
    assert f"{canary.parent}/home/hub/models--org--model" in refusal(hub, home)
    assert files_in(canary) == kept


def test_links_out_of_the_cache_are_replaced_not_followed(hub, filled_home, canary):
    kept = files_in(canary)
    repo = hub.repos[REPO]
    places = [pointer(hub, filled_home, CONFIG), blob(hub, filled_home, SHARD), storage(filled_home) / "refs/main"]
    places.append(partial(hub, filled_home, BIG))
    blob(hub, filled_home, BIG).unlink()
    for place in places[:3]:
        place.unlink()
        place.symlink_to(canary / "file")
    places[3].symlink_to(canary / "file")
    assert "flux2-mlx.incomplete" in refusal(hub, filled_home)
    places[3].unlink()
    assert files_in(fetch(hub, filled_home)) == NEEDED
    assert (storage(filled_home) / "refs/main").read_text() == repo.commit
    assert files_in(canary) == kept


def test_what_is_no_file_in_the_place_of_one(hub, filled_home):
    blob(hub, filled_home, CONFIG).unlink()
    os.mkfifo(partial(hub, filled_home, CONFIG))
    assert "not a regular file" in refusal(hub, filled_home)


def test_an_index_that_does_not_read_counts_as_incomplete_offline(hub, filled_home):
    for content in (b"{}", b"null", b'{"weight_map": 5}', b'{"weight_map": {"a": null}}', b"\xff", DEEP):
        index = blob(hub, filled_home, "text_encoder/model.safetensors.index.json")
        index.write_bytes(content)
        assert "not complete in the cache" in refusal(hub, filled_home, offline=True)
    (storage(filled_home) / "refs/main").write_bytes(b"\xff")
    assert "not complete in the cache" in refusal(hub, filled_home, offline=True)


def test_partial_files_of_files_that_are_listed_no_more_are_removed(hub, filled_home):
    blobs = storage(filled_home) / "blobs"
    ours, theirs = blobs / f"{'a' * 64}.flux2-mlx.incomplete", blobs / f"{'a' * 64}.incomplete"
    listed = blobs / f"{hub.repos[REPO].etag(BIG)}.flux2-mlx.incomplete"
    for path in (ours, theirs, listed):
        path.write_bytes(b"part")
    fetch(hub, filled_home)
    assert [path.exists() for path in (ours, theirs, listed)] == [False, True, True]
