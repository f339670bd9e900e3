"""Downloads in this process from a `HubServer`, with the settings of huggingface_hub patched."""

import json
import os
import socket
from contextlib import contextmanager

import huggingface_hub
import pytest
from huggingface_hub import constants

import flux2_mlx.hub
import flux2_mlx.hub.downloads
from flux2_mlx.errors import DownloadError
from flux2_mlx.hub.cache import PARTIAL
from flux2_mlx.store.parts import WHOLE

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
CHUNK = 65_536  # as much as the HTTP client reads at once


@contextmanager
def using(hub, home, *, token=None, endpoint=None, offline=False):
    """Within it this process is that of a user whose HF_HOME is `home`."""
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
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        patch.setattr(flux2_mlx.hub.downloads, "_WAITS", (0, 0, 0, 0))
        huggingface_hub.close_session()  # its client keeps the proxies that it finds in the environment
        try:
            yield
        finally:
            huggingface_hub.close_session()


def fetch_here(repo, folders=WHOLE, **options):
    """What `hub.fetch` gives for this process's own user."""
    return flux2_mlx.hub.fetch(repo, folders=folders, **options)


def unreachable() -> str:
    """The address of a hub that is not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def fetch(hub, home, *, repo=REPO, token=None, endpoint=None, offline=False, **options):
    """What `hub.fetch` gives for that user."""
    with using(hub, home, token=token, endpoint=endpoint, offline=offline):
        return fetch_here(repo, **options)


def refusal(hub, home, **options):
    """The one line of a `fetch` that must fail."""
    with pytest.raises(DownloadError) as caught:
        fetch(hub, home, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_in(folder):
    """Every file below `folder` by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def starts(hub):
    """Where each transfer of the big file began."""
    transfers = [request for request in hub.requests if request.host == "cdn" and BIG in request.path]
    return [int((request.range or "bytes=0-")[6:-1]) for request in transfers if request.method == "GET"]


def storage(home):
    """The repo's folder in the cache."""
    return home / "hub/models--org--model"


def blob(hub, home, name):
    return storage(home) / "blobs" / hub.repos[REPO].etag(name)


def partial(hub, home, name):
    """Where the part of a file is that has arrived so far."""
    return blob(hub, home, name).with_name(f"{hub.repos[REPO].etag(name)}{PARTIAL}")


def pointer(hub, home, name):
    return storage(home) / "snapshots" / hub.repos[REPO].commit / name


def listing(hub):
    """What the hub lists, to be changed."""
    repo = hub.repos[REPO]
    return {"id": REPO, "sha": repo.commit, "siblings": [repo.sibling(name) for name in repo.files]}
