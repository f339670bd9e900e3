"""What the name of a model means."""

import errno
import logging
import os
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..checkpoint import MANIFEST, is_checkpoint
from ..config import VARIANTS, Variant
from ..errors import InputError
from ..files import Claim, check_kind
from ..json_files import read_json
from ..layout import INDEX, PICKLES, WEIGHTS
from .folder import demo_folder, expanded, models_folder, stored_checkpoints

DEMO = "demo"
BUILT_IN, VARIANT, REPO, CHECKPOINT, SOURCE, FILE = "built-in", "variant", "repo", "checkpoint", "source", "file"
NAMES = ", ".join(VARIANTS)
_OWNER = "black-forest-labs"
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_ADDRESS = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*://.*|(?:{'|'.join(map(re.escape, _HOSTS))})/.*", re.DOTALL)
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)")
_SEPARATORS = re.compile(r"[\s._\[\]-]+")
_LIKE_A_REPO = 0.9  # what a repo id has in common with one of the table that it is a slip of
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """What a name means; see `resolve`.

    Attributes:
        kind: `built-in`; `variant`, another model of the table; `repo` of the Hub; `file` of such a repo; `checkpoint`,
            an MLX checkpoint folder; `source`, any other folder or file.
        name: as it was given.
        variant: the row of the table, where the name alone says it.
        repo: `owner/name` on the Hub, where it comes from there.
        path: the folder or file, where there is one.
        revision: the commit, of a folder in the Hub's cache.
        file: which one of the repo.
    """

    kind: str
    name: str
    variant: Variant | None = None
    repo: str | None = None
    path: Path | None = None
    revision: str | None = None
    file: str = ""

    @property
    def is_checkpoint(self) -> bool:
        """Whether it needs no conversion."""
        return self.kind in (BUILT_IN, CHECKPOINT)

    @property
    def origin(self) -> str:
        """What a checkpoint names as its source if it was converted from this: a repo id, the file of a repo, or a
        path that never looks like a name."""
        if self.file:
            return f"{self.repo}:{self.file}"
        return self.repo or os.path.join(os.curdir, self.place)

    @property
    def place(self) -> Path:
        """`path`; InputError for a model that is on the Hub only."""
        if self.path is None:
            raise InputError(f"{self.name} is a model of the Hub, and no folder or file here")
        return self.path


def resolve(name: str | os.PathLike[str] | Model, models_dir: str | os.PathLike[str] | None = None) -> Model:
    """What the `name` of a model means. Whoever takes one asks here, so that it means the same everywhere.

    The first of these that it is:

    1. an address such as `https://huggingface.co/owner/name`: that repo of the Hub, or the file of it;
    2. written as a path, with `/`, `./`, `../` or `~` in front, with `/` at the end, or a `Path`: that path;
    3. a model folder in the current folder: that folder;
    4. a model of the table, in any case and with any separators, with or without `FLUX.2-` or its owner in front;
    5. a checkpoint in the models folder, such as `klein-4b-qint8`;
    6. anything else that exists: that path;
    7. `owner/name`, or `models--owner--name` as in the Hub's cache: that repo; `owner/name:file`: that file of it.

    A folder of a repo in the Hub's cache stands for its latest snapshot. Nothing is fetched or read through.

    Args:
        name: the text or path; what was resolved before stays as it is.
        models_dir: see `models_folder`.

    Raises:
        InputError: it is nothing of these; names that come close are in the message.
    """
    if isinstance(name, Model):
        return name
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"a model is named by a text or a path, not by {type(name).__name__}")
    text = os.fspath(name)
    if isinstance(text, bytes) or not text.strip() or not _can_be_looked_up(text):
        raise InputError(f"{text[:80]!r} is no model's name; choose one of {NAMES}")
    if is_address(text):
        return _of_repo(text, *addressed_file(text))
    path = expanded(text)
    if not isinstance(name, str) or text.startswith(("/", "./", "../", "~")) or text.endswith("/"):
        return _at(path, text)
    variant = find_variant(text)
    if _is_model(path):
        if variant:
            way_out = f"; for the model of the table write {variant.repo}" if variant.repo else ""
            _log.warning("%s is the folder of that name here%s", text, way_out)
        return _at(path, text)
    if variant:
        return _of_variant(text, variant)
    stored = models_folder(models_dir) / text
    if os.path.basename(text) == text and text not in (os.curdir, os.pardir) and is_checkpoint(stored):
        return Model(CHECKPOINT, text, path=stored)
    repo, _, file = (cached_repo(text) or text.strip()).partition(":")
    if os.path.exists(path) or not _is_repo_id(repo):
        return _at(path, text, stored_checkpoints(models_folder(models_dir)))
    return Model(FILE if file else REPO, text, repo=repo, file=file)


def _can_be_looked_up(text: str) -> bool:
    """Whether a file could have this name, whether or not there is one."""
    try:
        os.lstat(text)
    except ValueError:  # a NUL, or half a character
        return False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def _of_variant(text: str, variant: Variant) -> Model:
    if variant.repo is None:
        return Model(BUILT_IN, text, variant, path=demo_folder())
    return Model(VARIANT, text, variant, variant.repo)


def _of_repo(text: str, repo: str, file: str) -> Model:
    if file:
        return Model(FILE, text, repo=repo, file=file)
    variant = find_variant(repo)
    return _of_variant(text, variant) if variant else Model(REPO, text, repo=repo)


def _at(path: Path, text: str, others: Iterable[Path] = ()) -> Model:
    """What is at `path`; `others` are checkpoints whose names might have been meant."""
    if is_checkpoint(path):
        return Model(CHECKPOINT, text, path=path)
    if not os.path.exists(path):
        raise InputError(_nothing_at(path, text, others))
    check_kind(path)
    repo, snapshot = _snapshot(path)
    if repo is None:
        return Model(SOURCE, text, path=path)
    if snapshot is None:
        raise InputError(f"{path} holds no complete copy of {repo}; give {repo} to have it fetched")
    return Model(SOURCE, text, find_variant(repo), repo, snapshot, snapshot.name)


def _nothing_at(path: Path, text: str, others: Iterable[Path]) -> str:
    """What to say where `text`, which means `path`, is nothing that there is."""
    if path.suffix.lower() in (*WEIGHTS, *PICKLES):
        return f"there is no file {text}"
    if close := did_you_mean(path.name, (other.name for other in others)):
        return f"there is no model or folder {text!r}; {close}"
    if os.sep in text:
        return f"there is no file or folder {text}"
    return f"there is no model or folder {text!r}; choose one of {NAMES}, a Hugging Face repo id or a model folder"


def _is_model(path: Path) -> bool:
    """Whether a model is to be found at `path` rather than something else of that name."""
    return is_checkpoint(path) or (path / INDEX).is_file() or _snapshot(path)[0] is not None


def _snapshot(path: Path) -> tuple[str | None, Path | None]:
    """The repo that a folder of the Hub's cache is about, and its latest snapshot or the one that `path` is.

    None: it is no such folder, or there is no snapshot.
    """
    here = storage = Path(os.path.abspath(path))
    if here.name == "snapshots":
        storage = here.parent
    elif here.parent.name == "snapshots":
        storage = here.parent.parent
    repo = cached_repo(storage.name)
    if repo is None or not (storage / "snapshots").is_dir():
        return None, None
    if storage == here.parent.parent:
        return repo, path
    try:
        latest = storage / "snapshots" / (storage / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        latest = None
    commits = sorted(x for x in (storage / "snapshots").iterdir() if (x / INDEX).exists())
    return repo, latest if latest in commits else commits[0] if len(commits) == 1 else None


def find_variant(text: str) -> Variant | None:
    """The model of the table that `text` names; None: there is none.

    Case and separators don't matter, nor does a leading `FLUX.2`: `klein-4b`, `FLUX.2-klein-4B`, `flux2_klein_4b` and
    `black-forest-labs/FLUX.2-klein-4B` are one.
    """
    owner, slash, name = (cached_repo(text) or text.strip()).lower().rpartition("/")
    if slash and owner != _OWNER:
        return None
    return next((v for v in VARIANTS.values() if _key(v.name) == _key(name) and (v.repo or not owner)), None)


def checked_variant(said: str | None, model: Model | None = None) -> str | None:
    """The name of the row of the table that a user says a model is, or that `model` is; None: its files must tell.

    Raises:
        InputError: what is `said` names no row, or another one than `model` is of.
    """
    own = model.variant if model else None
    if said is None:
        return own.name if own else None
    if (variant := find_variant(said)) is None:
        raise InputError(f"unknown model {said!r}; {did_you_mean(said) or f'choose one of {NAMES}'}")
    if model and own and variant != own and not model.is_checkpoint:
        raise InputError(f"{model.name} is not {variant.name}; leave the variant out, or choose another model")
    return variant.name


def did_you_mean(text: str, others: Iterable[str] = ()) -> str | None:
    """The question which name was meant, of those of the table and of `others` that come close; None: none does."""
    names = {_key(name): name for name in (*others, *VARIANTS)}
    close = get_close_matches(_key(text), names)
    found = [name for key, name in names.items() if key in close]
    if not found:
        return None
    *most, last = found
    return f"did you mean {' or '.join(filter(None, [', '.join(most), last]))}?"


def similar_repo(repo: str) -> str | None:
    """The repo of the table that `repo` is a slip of; None: it is not like any."""
    repos = {variant.repo.lower(): variant.repo for variant in VARIANTS.values() if variant.repo}
    return next((repos[x] for x in get_close_matches(repo.lower(), repos, 1, _LIKE_A_REPO) if x != repo.lower()), None)


def cached_repo(text: str) -> str | None:
    """The repo whose folder in the Hub's cache is called `text` (`models--owner--name`); None: it is no such name."""
    match = _CACHED.fullmatch(text)
    return f"{match[1]}/{match[2]}" if match else None


def is_address(text: str) -> bool:
    """Whether `text` is an address of the web rather than a name or a path."""
    return _ADDRESS.fullmatch(text) is not None


def addressed_file(text: str) -> tuple[str, str]:
    """The repo id in an address of Hugging Face, or of the server that `HF_ENDPOINT` names, and the file of it, which
    is empty for the repo itself.

    Raises:
        InputError: it is another server's, no model's, or that of a part of a repo.
    """
    try:
        address = urlsplit(text if "://" in text else f"https://{text}")
        host, path = address.hostname or "", [part for part in address.path.split("/") if part]
    except ValueError as error:
        raise InputError(f"{text!r} is no address: {error}") from error
    shown = f"{address.scheme}://{host}{address.path}"  # without a password
    if address.scheme == "hf":
        path = [address.netloc, *path]
    elif host not in (*_HOSTS, urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname):
        raise InputError(f"{shown} is no address of Hugging Face; download the model and give its folder")
    repo, part = "/".join(path[:2]).removesuffix(".git"), path[2:]
    if not _is_repo_id(repo) or path[0] in ("datasets", "spaces", "collections", "papers", "models", "docs"):
        raise InputError(f"{shown} is not the page of a model; give it as owner/name")
    if part[:2] in (["blob", "main"], ["resolve", "main"]) and len(part) > 2:
        return repo, unquote("/".join(part[2:]))
    if part not in ([], ["tree", "main"]):
        raise InputError(f"{shown} is a part of {repo} or another revision; give {repo}, or the folder of a download")
    return repo, ""


def _key(name: str) -> str:
    return _SEPARATORS.sub("", name.lower()).removeprefix("flux2")


def claim(model: Model) -> AbstractContextManager[object]:
    """A hold on the files of `model` that are in the Hub's cache already."""
    return Claim(model.path.absolute().parent.parent) if model.path and model.repo else nullcontext()


def holding(folder: Path, variant: str | None) -> Path:
    """The checkpoint `folder`; InputError if it is not of `variant`."""
    if variant is not None and (stored := read_json(folder / MANIFEST).get("variant", variant)) != variant:
        raise InputError(f"{folder} holds {stored}, not {variant}; leave the variant out, or choose another model")
    return folder


def _is_repo_id(text: str) -> bool:
    from ..hub import is_repo_id  # which a run of what is here already can do without

    return is_repo_id(text)
