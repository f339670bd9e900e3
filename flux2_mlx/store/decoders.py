"""Decoders by their names: those of the Hub that are known here, and files of others."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .. import hub
from ..convert import formats, read_decoder
from ..decoders import Decoder
from ..errors import CheckpointError, DownloadError, InputError
from ..files import sha256_if_there
from ..hub import Download, Selection
from .adapter_sources import cached_files, cached_origin
from .first_use import Progress, labelled
from .folder import models_folder
from .parts import Remote, located

# Where each is, and its licence.
DECODERS = {
    "small": (Remote("black-forest-labs/FLUX.2-small-decoder", "diffusion_pytorch_model.safetensors"), "Apache-2.0"),
    "taef2": (Remote("madebyollin/taef2", "taef2.safetensors"), "MIT"),
}


class FoundDecoder:
    """A decoder of which no more than its header has been read or fetched. Build it with `look_up_decoder`.

    Attributes:
        decoder: what it is. Where it lies on the Hub only, its weights can't be read before `fetch`.
    """

    def __init__(self, decoder: Decoder, selection: Selection | None = None, licence: str | None = None):
        self.decoder = decoder
        self._selection = selection
        self._licence = licence

    def fetch(self, announce: Callable[[Download], object] | None = None, progress: Progress | None = None) -> None:
        """Bring it here; see `find_decoder`.

        Raises:
            DownloadError: it can't be fetched. CheckpointError: it is damaged.
        """
        selection, self._selection = self._selection, None
        if selection is None:
            return
        if selection.download is not None and selection.download.missing and announce is not None:
            announce(replace(selection.download, licence=self._licence or selection.download.licence))
        selection.fetch(labelled(progress, "download"))
        own = self.decoder
        self.decoder = replace(_read(selection, own.name), origin=own.origin)


@contextmanager
def look_up_decoder(source: str | os.PathLike[str]) -> Iterator[FoundDecoder]:
    """The decoder of a name, of which only the header is fetched; inside, the rest can be.

    Args:
        source: see `find_decoder`, whose errors are raised.
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise InputError(f"decoder must be {', '.join(DECODERS)} or a file, got {source!r:.80}")
    told = os.fspath(source)
    known, licence = DECODERS.get(told, (None, None)) if isinstance(source, str) else (None, None)
    where = known or located(source)
    if not isinstance(where, Remote):
        found = read_decoder(where, where.name)
        yield FoundDecoder(replace(found, origin=cached_origin(Path(os.path.abspath(found.path)))))
        return
    with hub.select(where.repo, lambda names: [_file(where, names)], formats.outline.pieces) as selection:
        (name,) = selection.names
        origin = told if known else f"{where.repo}:{name}"
        yield FoundDecoder(replace(_read(selection, told), origin=origin), selection, licence)


def find_decoder(
    source: str | os.PathLike[str],
    *,
    announce: Callable[[Download], object] | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """The decoder of a name, which is fetched if it is not in the Hub's cache.

    Args:
        source: `small`, `taef2`, a file or folder, `owner/name:file`, or the address of such a file.
        announce: called with what is about to be fetched.
        progress: called with bytes done, bytes in all, and `download`.

    Raises:
        InputError: it is no name, or no such address. DownloadError: it is not there, or can't be fetched.
        CheckpointError: it is damaged, or of another model.
    """
    with look_up_decoder(source) as found:
        found.fetch(announce, progress)
        return found.decoder


def decoder_with(
    sha256: str, name: str, folders: Collection[Path], models_dir: str | os.PathLike[str] | None = None
) -> Path | None:
    """The file of this hash: of this name in one of `folders` or the models folder, or any in the Hub's cache; None:
    there is none."""
    own = (folder / name for folder in (*folders, models_folder(models_dir)))
    if found := next((file for file in own if sha256_if_there(file) == sha256), None):
        return found
    return next((file for file, blob in cached_files() if blob.name == sha256 and file.is_file()), None)


def _read(selection: Selection, told: str) -> Decoder:
    """The decoder in the one file of a repo that is asked for, by its header."""
    (name,) = selection.names
    try:
        return read_decoder(selection.folder / name, told)
    except CheckpointError as error:
        raise CheckpointError(selection.called(str(error))) from error


def _file(where: Remote, names: Collection[str]) -> str:
    """The file of a repo that is asked for, or its only one."""
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if where.path in weights:
        return where.path
    if where.path or len(weights) != 1:
        told = ", ".join(f"{where.repo}:{name}" for name in weights[:4]) or "another repo"
        raise DownloadError(f"{where} is no decoder's file; give {told}")
    return weights[0]
