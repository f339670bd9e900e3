"""Images that are denoised and wait for the autoencoder, kept on disk: a run that is killed can be gone on with."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from .cached_encoder import fingerprint
from .device import MLX_VERSION, dtype_name
from .embedding_cache import EmbeddingCache, Form
from .networks import Networks
from .references import Edit
from .request import Request

_LIMIT = 4_000_000_000  # bytes: 2,000 images of 1024², each of 64² tokens of 128 float32


class Unfinished:
    """A folder of images that are denoised: the tokens of each in a file, which is removed when it is decoded."""

    def __init__(self, folder: Path):
        self._files = EmbeddingCache(folder, _LIMIT, "denoised images")

    def of(self, networks: Networks, request: Request, edit: Edit) -> "Waiting":
        """Those that a run with these settings makes, or has made before it was killed."""
        return Waiting(self._files, networks, request, edit)


class Waiting:
    """The images of one run that are denoised and wait for their decoding. Build it with `Unfinished.of`.

    Each is known by all that its tokens depend on, so that only a run that would make the very same goes on with it.
    """

    def __init__(self, files: EmbeddingCache, networks: Networks, request: Request, edit: Edit):
        self._files = files
        self._networks = networks
        self._request = request
        self._edit = edit
        self._places: set[int] = set()

    def kept(self) -> dict[int, mx.array]:
        """The tokens `[L, C]` that an earlier run has left, by the place of their image in the run."""
        if not self._files.entries():
            return {}
        request = self._request
        components = self._networks.checkpoint.components
        size = components["vae"].config.token_size
        length = request.height * request.width // size**2
        channels = components["transformer"].config.in_channels
        form = Form((length, channels), mx.float32)
        found = {place: self._files.get(key, form) for place, key in enumerate(self._keys)}
        kept = {place: tokens for place, tokens in found.items() if tokens is not None}
        self._places |= kept.keys()
        return kept

    def keep(self, tokens: dict[int, mx.array]) -> None:
        """Keep the `tokens` of images until they are decoded."""
        self._places |= tokens.keys()
        for place in tokens:
            self._files.put(self._keys[place], tokens[place])

    def drop(self, place: int) -> None:
        """Remove the tokens of an image that is decoded, if they are here."""
        if place in self._places:
            self._files.remove(self._keys[place])

    @cached_property
    def _keys(self) -> list[str]:
        """SHA-256 of all that the tokens of each image depend on."""
        return list(_keys(self._networks, self._request, self._edit))


def _keys(networks: Networks, request: Request, edit: Edit) -> Iterator[str]:
    from . import __version__  # which takes a while to be read

    settings = asdict(request) | dict.fromkeys(("prompts", "negative_prompts", "seeds"))
    shared = [__version__, MLX_VERSION, str(mx.default_device()), _model(networks), settings, _pictures(edit)]
    for place, seed in enumerate(request.seeds):
        number = place // request.images_per_prompt
        own = [request.prompts[number], request.negative_prompts[number:][:1], seed]
        yield hashlib.sha256(json.dumps([*shared, *own]).encode()).hexdigest()


def _model(networks: Networks) -> list[Any]:
    """What tells this model from all others: the very files that it is read from, and what is made of them."""
    checkpoint = networks.checkpoint
    names = [checkpoint.variant.name, networks.quant, networks.text_quant, dtype_name(networks.dtype)]
    tokenizer = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.tokenizer_files}
    return [*names, tokenizer, [fingerprint(part) for part in checkpoint.components.values()]]


def _pictures(edit: Edit) -> str:
    digest = hashlib.sha256()
    for image in edit.references:
        digest.update(f"{image.size}".encode() + image.tobytes())
    if edit.canvas is not None:
        mask = edit.canvas.tokens
        digest.update(b"canvas" if mask is None else mask.tobytes())
    return digest.hexdigest()
