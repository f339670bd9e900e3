"""Where parts of models are: files and folders here, and files of repos of the Hub."""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from ..components import MAIN_PART, PARTS, WRITING_PARTS
from ..convert import TOKENIZER_PART
from ..errors import DownloadError, InputError
from ..hub import Folders, is_repo_id, is_weight
from ..layout import INDEX, NUMBERS, PICKLES, SET_INDEX, SHARD
from ..wording import some
from .folder import expanded
from .names import addressed_file, is_address

# What is fetched of a model in the layout of diffusers, and what suffices to write text.
WHOLE = Folders((*PARTS, TOKENIZER_PART, "scheduler"), PARTS)
WRITING = replace(WHOLE, weights=WRITING_PARTS)
# What tokenizers are made from, the best first, and what says more of all but the last.
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt", "added_tokens.json"), ("tekken.json",))
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
_CONFIG = "config.json"
_COUNTED = re.compile(r"(?:.*/)?\d{1,3}\.safetensors")  # files of one set, as mflux names them
_USUAL = re.compile(rf"(?:.*/)?(?:diffusion_pytorch_model|model)(?:{NUMBERS})?\.safetensors")


@dataclass(frozen=True)
class Remote:
    """A repo of the Hub, or a file or folder of it; the `path` of the repo itself is empty."""

    repo: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.repo}:{self.path}" if self.path else self.repo


def located(text: str | os.PathLike[str]) -> Path | Remote:
    """Where a part is that a user names: a path, `owner/name`, `owner/name:file`, or the address of one of these.

    What exists here comes first, as `resolve` has it for models.

    Raises:
        InputError: an address of no repo or file of Hugging Face, no path in a repo, or a home folder of nobody.
    """
    name = os.fspath(text)
    if is_address(name):
        return Remote(*addressed_file(name))
    path = expanded(name)
    if not isinstance(text, str) or name.startswith(("/", "./", "../", "~")) or name.endswith("/") or path.exists():
        return path
    repo, _, inside = name.partition(":")
    return Remote(repo, inside) if is_repo_id(repo) else path


def files_of(remote: Remote, part: str | None, names: Collection[str]) -> list[str]:
    """The files of a repo that hold a part of a model, small ones that say how it is to be read first.

    Args:
        remote: the place that a user named.
        part: `transformer`, `text_encoder`, `vae` or `tokenizer`; None: whatever it is that weights are of.
        names: the names of all files of the repo.

    Raises:
        InputError: it is a pickle.
        DownloadError: they are not there, or there are several of the kind.
    """
    if remote.path.endswith(PICKLES):
        raise InputError(f"{remote} is a pickle, which could run code; give a .safetensors file")
    if part == TOKENIZER_PART:
        return _tokenizer(remote, names)
    if not part and not remote.path and (found := folder_files(names)):
        return [*found, *(name for name in names if name.startswith(f"{TOKENIZER_PART}/") and not is_weight(name))]
    weights = _weights(remote, part, sorted(filter(is_weight, names)))
    folder = os.path.dirname(weights[0])
    beside = [name for name in names if os.path.dirname(name) == folder and name.endswith((_CONFIG, SET_INDEX))]
    if os.path.basename(folder) == MAIN_PART and (index := os.path.join(os.path.dirname(folder), INDEX)) in names:
        beside.append(index)
    return [*sorted(name for name in beside if _belongs(name, weights)), *weights]


def folder_files(names: Collection[str]) -> list[str]:
    """Of the files of a repo those that a model is made of which has a folder for each part, but for its tokenizer,
    the small ones first; none if it is no such repo."""
    weights = [name for name in names if is_weight(name) and os.path.dirname(name) in PARTS]
    folders = {*map(os.path.dirname, weights)}
    if len(folders) < 2 or (MAIN_PART not in folders and any(is_weight(x) and "/" not in x for x in names)):
        return []
    told = {"", "scheduler", *folders}
    return [*(name for name in names if name.endswith(".json") and os.path.dirname(name) in told), *weights]


def main_place(names: Collection[str]) -> str:
    """The file that stands for all that `files_of` gives, or the folder if no file does."""
    weights = [*filter(is_weight, names)]
    if len(weights) < 2 or (SHARD.fullmatch(weights[0]) and len({*map(os.path.dirname, weights)}) == 1):
        return next(iter(weights or names))
    return os.path.commonpath([*map(os.path.dirname, weights)])


def _weights(remote: Remote, part: str | None, weights: list[str]) -> list[str]:
    """The files of weights, which may be a numbered set."""
    if remote.path in weights:
        return _set_of(remote.path, weights)
    folders = [remote.path] if remote.path else [part or MAIN_PART, ""]
    found = next(filter(None, ([x for x in weights if os.path.dirname(x) == folder] for folder in folders)), [])
    if not found and not remote.path:
        found = weights
    if len({*map(os.path.dirname, found)}) == 1 and all(map(_COUNTED.fullmatch, found)):
        return found
    sets = [_set_of(name, found) for name in found]
    distinct = [one for number, one in enumerate(sets) if one not in sets[:number]]
    usual = [one for one in distinct if _USUAL.fullmatch(one[0])]
    if len(usual or distinct) == 1:
        return (usual or distinct)[0]
    if distinct:
        raise DownloadError(f"{remote} holds several files of weights: {some(found)}; give one as {remote.repo}:FILE")
    what = f"no file of weights {remote.path[:80]!r}" if remote.path else "no weights"
    raise DownloadError(f"{remote.repo} has {what}{_named(remote, weights)}")


def _set_of(name: str, weights: list[str]) -> list[str]:
    """All files of the numbered set that a file of weights is of, or itself alone."""
    if (match := SHARD.fullmatch(name)) is None:
        return [name]
    shards = (SHARD.fullmatch(other) for other in weights)
    kind = match.group("stem", "count", "end")
    return [shard[0] for shard in shards if shard and shard.group("stem", "count", "end") == kind]


def _belongs(name: str, weights: list[str]) -> bool:
    """Whether a small file says something of these weights: a config, or the index of a set."""
    own, first = os.path.basename(name), os.path.basename(weights[0])
    lists = first.startswith(own.removesuffix(SET_INDEX) + "-") or _COUNTED.fullmatch(first)
    return own in (_CONFIG, INDEX) or bool(len(weights) > 1 and lists)


def _tokenizer(remote: Remote, names: Collection[str]) -> list[str]:
    """The files of a tokenizer of the best form that there is."""
    if remote.path in names:
        folders = [os.path.dirname(remote.path)]
    else:
        folders = [remote.path] if remote.path else [TOKENIZER_PART, ""]
    for folder in folders:
        for form in _TOKENIZERS:
            if os.path.join(folder, form[0]) in names:
                beside = _BESIDE if form != _TOKENIZERS[-1] else ()
                return [path for name in (*form, *beside) if (path := os.path.join(folder, name)) in names]
    if remote.path in names:  # whatever it is called
        return [remote.path]
    forms = " or ".join(form[0] for form in _TOKENIZERS)
    raise DownloadError(f"{remote} has no tokenizer; give a repo with {forms}")


def _named(remote: Remote, weights: list[str]) -> str:
    """How files of weights can be named, as the end of a sentence."""
    shown = some([f"{remote.repo}:{name}" for name in weights])
    return f"; give one as {shown}" if weights else "; give another repo"
