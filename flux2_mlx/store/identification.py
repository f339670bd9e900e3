"""What files of weights are, on the disk or on the Hub, that are no whole model."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from .. import hub
from ..convert import (
    LOOSE,
    MODEL_PARTS,
    TOKENIZER_PART,
    Conversion,
    Identity,
    Source,
    conversion,
    foreign,
    formats,
    hints,
    identify,
    identify_whole,
    is_loose,
    is_whole,
    loose_files,
    loose_tensors,
    said_of,
    settings,
    stated,
    tokenizer_in,
)
from ..errors import CheckpointError, DownloadError, InputError
from ..weights import Files
from .folder import models_folder, official_first
from .names import checked_variant
from .parts import Remote, files_of, folder_files, main_place


@dataclass(frozen=True)
class Found:
    """What `name`, as it was given, stands for, and what converting it would do; None: it is on the Hub."""

    name: str
    identity: Identity
    conversion: Conversion | None


def is_weights(place: Path) -> bool:
    """Whether `place` is a file of weights, or a folder of them that is no whole model."""
    if place.is_dir():
        is_flat = not is_whole(place) and any(path.suffix.lower() in LOOSE for path in place.glob("*"))
        return is_flat or is_loose(place)
    return is_loose(place)


def identify_files(place: Path, name: str, variant: str | None = None, models_dir: Path | None = None) -> Found:
    """What the file or folder of weights at `place` is.

    Args:
        place: see `is_weights`.
        name: what a user calls it.
        variant: the model's name where it can't be told, or None.
        models_dir: where converted models are that give what is missing; see `models_folder`.

    Raises:
        CheckpointError: it is damaged, nothing is known of it, or it can't be the `variant`.
    """
    said = checked_variant(variant)
    identity = _identity(place, name, said)
    return Found(name, identity, conversion(place, said, official_first(models_folder(models_dir))))


def identify_folder(place: Path, name: str, variant: str | None = None, models_dir: Path | None = None) -> Found | None:
    """What a whole model in the layout of diffusers is, some of whose weights are in few bits; None: none are.

    Args, Raises: see `identify_files`.
    """
    said = checked_variant(variant)
    identity = identify_whole(Source.open(place, said))
    if identity.is_plain:
        return None
    return Found(name, identity, conversion(place, said, official_first(models_folder(models_dir))))


def identify_repo(repo: str, file: str | None = None, variant: str | None = None) -> Found:
    """What a file of weights of a repo, or a set of them, is, of which nothing but the headers is fetched.

    Args:
        repo: `owner/name`.
        file: its name there, or that of one of its set, or of their folder; None: what there is.
        variant: the model's name where it can't be told, or None.

    Raises:
        DownloadError: see `hub.header`.
        CheckpointError: see `identify_files`.
    """
    said = checked_variant(variant)
    names = [] if file else hub.names_of(repo)
    if told := folder_files(names):
        found = _identify_folder(repo, lambda _: told, said)
    elif file and not PurePosixPath(file).suffix:
        found = _identify_folder(repo, partial(files_of, Remote(repo, file), None), said, f"{repo}:{file}")
    else:
        found = _identify_file(repo, file, said)
    missing = [part for part in found.identity.missing if part != TOKENIZER_PART or not _has_tokenizer(repo, names)]
    return replace(found, identity=replace(found.identity, missing=tuple(missing)))


def _identify_file(repo: str, file: str | None, said: str | None) -> Found:
    name = f"{repo}:{file}" if file else repo
    choose = partial(files_of, Remote(repo, file or ""), None)
    with hub.header(repo, file, choose, formats.outline.pieces) as (folder, names):
        path = folder / main_place(names)
        own = {str(path): name} if len([*filter(hub.is_weight, names)]) == 1 else {}
        with _called({**own, f"{folder}/": f"{repo}:", str(folder): repo}):
            return Found(name, _identity(path, name, said, repo), None)


def _has_tokenizer(repo: str, names: Collection[str]) -> bool:
    try:
        return bool(names and files_of(Remote(repo), TOKENIZER_PART, names))
    except DownloadError:
        return False


def _identify_folder(repo: str, choose: hub.Choose, variant: str | None, name: str = "") -> Found:
    """What a repo is whose parts lie in folders, or one of these of the `name`. Its tokenizer, which may be large, is
    not looked at."""
    with hub.select(repo, choose, formats.outline.pieces) as selection:
        folder = selection.folder
        with _called({f"{folder}/": f"{repo}:", str(folder): repo}):
            if name or not is_whole(folder):
                place = folder / main_place(selection.names)
                return Found(name or repo, _identity(place, name or repo, variant, repo), None)
            source = Source.open(folder, variant, tokenizer=folder / TOKENIZER_PART, repo=repo)
            places: dict[str, Path | str] = dict.fromkeys(MODEL_PARTS, repo)
            return Found(repo, identify_whole(source), Conversion(places, *source.quants(None, None)))


def _identity(place: Path, name: str, variant: str | None, repo: str = "") -> Identity:
    paths = loose_files(place)
    try:
        tensors, metadata = loose_tensors(place, variant)
    except CheckpointError:  # which may be because it is of another model
        if place.suffix.lower() != formats.GGUF and (known := foreign(Files(paths), name)):
            return known
        raise
    said = hints(place, {**metadata, **said_of(place)}, repo)
    found = identify(tensors, name, said, variant, settings(stated(paths[0].parent).values, metadata))
    if tokenizer_in(place / TOKENIZER_PART):
        found = replace(found, missing=tuple(part for part in found.missing if part != TOKENIZER_PART))
    return found


@contextmanager
def _called(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors say these names for paths, the first ones first."""
    try:
        yield
    except (CheckpointError, InputError) as error:
        text = str(error)
        for path, name in names.items():
            text = text.replace(path, name)
        raise type(error)(text) from error
