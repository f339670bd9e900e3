"""Decoders by their names: those of the Hub that are known here, and files of others."""

import os
from collections.abc import Callable, Collection
from dataclasses import replace

from .. import hub
from ..convert import formats, read_decoder
from ..decoders import Decoder
from ..errors import CheckpointError, DownloadError, InputError
from ..hub import Download
from .first_use import Progress, labelled
from .parts import Remote, located

# Where each is, and its licence.
DECODERS = {
    "small": (Remote("black-forest-labs/FLUX.2-small-decoder", "diffusion_pytorch_model.safetensors"), "Apache-2.0"),
    "taef2": (Remote("madebyollin/taef2", "taef2.safetensors"), "MIT"),
}


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
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise InputError(f"decoder must be {', '.join(DECODERS)} or a file, got {source!r:.80}")
    told = os.fspath(source)
    known, licence = DECODERS.get(told, (None, None)) if isinstance(source, str) else (None, None)
    where = known or located(source)
    if not isinstance(where, Remote):
        return read_decoder(where, where.name)
    with hub.select(where.repo, lambda names: [_file(where, names)], formats.outline.pieces) as selection:
        (name,) = selection.names
        try:
            read_decoder(selection.folder / name, told)  # no more than its header is needed to see that it is none
            if selection.download is not None and selection.download.missing and announce is not None:
                announce(replace(selection.download, licence=licence or selection.download.licence))
            selection.fetch(labelled(progress, "download"))
            return replace(
                read_decoder(selection.folder / name, told), origin=told if known else f"{where.repo}:{name}"
            )
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
