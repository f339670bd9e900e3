"""What the hub or the disk refuses, and what is no repo at all."""

import errno
import shutil
from types import SimpleNamespace

import pytest
from hub_client import NEEDED, REPO, UNNEEDED, fetch, files_in, refusal, starts
from hub_server import REFUSED, HubServer

import flux2_mlx.downloads
from flux2_mlx.hub import is_repo_id

GATED = {"gated": [REPO], "token": "hf_access"}


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


def test_other_layout(home):
    with HubServer({REPO: UNNEEDED}) as hub:
        assert refusal(hub, home).startswith(f"{REPO} has no model_index.json")
        assert hub.fetched == []


def test_full_disk_is_noticed_before_the_download(hub, home, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=612_000))
    message = refusal(hub, home)
    assert message.startswith(f"{REPO} needs 0.0 GB, the disk of {home}/hub has 0.0 GB free; make room")
    assert hub.fetched == []


def test_disk_that_fills_up_during_the_download(hub, home, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(flux2_mlx.downloads.os, "fsync", full)
    assert refusal(hub, home).startswith(f"no space left in {home}/hub; make room")


def test_repo_ids():
    assert is_repo_id("black-forest-labs/FLUX.2-klein-4B")
    for text in (
        "klein-4b",
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
