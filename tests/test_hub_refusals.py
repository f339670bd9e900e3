"""What the hub or the disk refuses, and what is no repo at all."""

import errno
import shutil
from types import SimpleNamespace

import pytest
from helpers.hub_client import BIG, NEEDED, REPO, UNNEEDED, fetch, files_in, refusal, starts
from helpers.hub_server import REFUSED, HubServer

import flux2_mlx.hub.downloads
from flux2_mlx.errors import InputError
from flux2_mlx.hub import is_repo_id
from flux2_mlx.store.parts import WRITING

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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["b.gguf", "a.gguf"], ": it holds files of weights; give one of them by its name behind a colon (:a.gguf)"),
        (["pytorch_lora_weights.safetensors"], ": it holds an adapter (LoRA), which goes on top of a model "
         "(pytorch_lora_weights.safetensors); give the model that it was made for"),
        (["flux-2.safetensors"], ": it holds files of weights; give one of them by its name behind a colon "
         "(:flux-2.safetensors)"),
        (["transformer/config.json", "vae/a.safetensors"], "; give the repo of the model that it was made from"),
        (["model.ckpt"], ": it holds pickles, which could run code (model.ckpt); give a repo with .safetensors files"),
        (["README.md"], " and holds no weights; give another repo id"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_named(names, message, home):
    with HubServer({REPO: dict.fromkeys(names, b"x" * 2000)}) as hub:
        expected = f"{REPO} has no model_index.json, so it is no model in the diffusers layout{message}"
        assert refusal(hub, home) == expected
        assert hub.fetched == []


def test_pickles_only(home):
    files = {(name if name != BIG else "transformer/diffusion_pytorch_model.bin"): x for name, x in NEEDED.items()}
    with HubServer({REPO: files}) as hub:
        message = "holds pickles, which could run code; give a repo with .safetensors files"
        assert refusal(hub, home) == f"{REPO}/transformer {message}"
        assert hub.fetched == []
        # To write text the transformer is not needed.
        fetch(hub, home, folders=WRITING)
        weights = {name for name in hub.fetched if name.endswith(".safetensors")}
        assert weights == {
            name for name in NEEDED if name.startswith("text_encoder/") and name.endswith(".safetensors")
        }


def test_a_pointer_that_was_uploaded(home):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 600000\n"
    with HubServer({REPO: NEEDED | {BIG: pointer}}) as hub:
        message = refusal(hub, home, check=lambda folder, download: download)
        assert message == f"{REPO} has a Git LFS pointer in place of {BIG}; its owner must upload the file"


def test_an_outline_is_called_by_the_repo_s_name(hub, home):
    def check(folder, download):
        raise InputError(f"{folder}/x is no good")

    with pytest.raises(InputError, match=f"^{REPO}/x is no good$"):
        fetch(hub, home, check=check)


def test_full_disk_is_noticed_before_the_download(hub, home, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=612_000))
    message = refusal(hub, home)
    assert message.startswith(f"{REPO} needs 0.0 GB, the disk of {home}/hub has 0.0 GB free; make room")
    assert hub.fetched == []


def test_disk_that_fills_up_during_the_download(hub, home, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(flux2_mlx.hub.downloads.os, "fsync", full)
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
