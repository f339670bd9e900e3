"""From canonical names and shapes alone to the geometry of the networks, and to the models that have it.

What shapes can't tell, such as the angles of positions, comes from the row of the table that fits. A model that fits
no row is refused: there its `config.json` is needed.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flux2_mlx.components import COMPONENTS
from flux2_mlx.config import VARIANTS, Geometries, Variant, variant_named
from flux2_mlx.errors import CheckpointError
from flux2_mlx.json_files import NONSENSE

from .naming import Reading
from .parts import LAYOUT
from .shapes import Infos

# In metadata of safetensors and GGUF files, what may say which model it is.
_TITLES = (
    "modelspec.architecture",
    "modelspec.title",
    "general.name",
    "general.basename",
    "general.finetune",
    "general.base_model.0.repo_url",
    "general.base_model.0.name",
    "base_model",
    "model_name",
    "name",
    "title",
)
_MAX_TITLE = 500
_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Words that are denied, or that say what something was made from or for.
_UNCERTAIN = re.compile(
    r"(?:un|de)[^a-z0-9]*distill|(?<![a-z])(?:non?|not|without)[^a-z0-9]*(?:distill|base|kv)"
    r"|(?<![a-z])(?:from|for)(?:[^a-z]+(?:the|flux|klein|b))*[^a-z]+(?:base|kv)(?![a-z])"
)
_FAST = {"distilled", "dmd", "hyper", "lcm", "lightning", "turbo"}  # what makes a base model one of few steps


def geometry(part: str, infos: Infos, what: str) -> Geometries:
    """The geometries of the networks that are made of a part.

    Args:
        part: one of `PARTS`.
        infos: its tensors by their canonical names; none but those that tell are looked at.
        what: the source, for errors.

    Raises:
        CheckpointError: it is no part of a model in the table, or one of those tensors is missing or of no such shape.
    """
    try:
        return LAYOUT[part].measured(infos)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    except NONSENSE as error:
        raise CheckpointError(f"{what} describes no {part} ({type(error).__name__}: {error})") from error


def understood(
    reading: Reading, what: str, wrong: str, settings: dict[str, Any] | None = None
) -> tuple[Geometries, CheckpointError | None]:
    """The geometries of the networks that are made of a part, as far as they are known, and what is wrong with it: all
    its tensors should have a place in them.

    Args:
        reading: the part as it was found.
        what: the source, for errors.
        wrong: what is said of it if tensors are missing, left over or of other shapes.
        settings: what is said of a text encoder, see `text.settings`.
    """
    configs: Geometries = {}
    try:
        measured = geometry(reading.part, reading.infos, what)
        configs = LAYOUT[reading.part].obeyed(measured, settings or {}, Path(what))
        reading.check(configs, wrong)
    except CheckpointError as error:
        if mixed := reading.mixed:
            return configs, CheckpointError(f"{what} {mixed}; fetch the file again, or give one that names all alike")
        return configs, error
    return configs, None


def candidates(configs: Geometries) -> list[Variant]:
    """The models that networks of these geometries can be of, in the order of the table."""
    return [row for row in VARIANTS.values() if all(_has(row, name, config) for name, config in configs.items())]


def _has(row: Variant, name: str, config: Any) -> bool:
    """Whether a component of this geometry can be that of a model."""
    own = getattr(row, COMPONENTS[name].geometry)
    return own is not None and own.admits(config)


def titles(metadata: Mapping[str, str], file: str = "", repo: str = "") -> list[str]:
    """What may name a model, most trustworthy first: a file's metadata, its name, and the repository's.

    Args:
        metadata: what a file's header says of it.
        file: its name without folders.
        repo: `owner/name`.
    """
    texts = [*(metadata.get(key) for key in _TITLES), file.rpartition(".")[0] or file, repo.rpartition("/")[2]]
    return [text[:_MAX_TITLE].rpartition("/")[2] for text in texts if isinstance(text, str) and text]


def choose(rows: list[Variant], hints: Iterable[str], name: str | None, what: str) -> Variant:
    """The one model of these `candidates`.

    Args:
        rows: the models that it can be.
        hints: texts of `titles`; the first that tells decides.
        name: the model that a user says it is, or None.
        what: the source, for the error.

    Raises:
        CheckpointError: it can't be known, or not be `name`; the candidates are named.
    """
    names = ", ".join(row.name for row in rows)
    if name is not None:
        if (row := variant_named(name)) not in rows:
            raise CheckpointError(f"{what} can't be {name}: its geometry is that of {names or 'no model'}")
        return row
    if not rows:
        raise CheckpointError(f"{what} has parts of different models; give those of one")
    left = rows if len(rows) == 1 else next(filter(None, (_told(rows, hint) for hint in hints)), rows)
    if len(left) != 1:
        raise CheckpointError(f"can't tell which model {what} is; name it with variant=NAME ({names})")
    return left[0]


def _told(rows: list[Variant], hint: str) -> list[Variant]:
    """The rows that a name points to; none if it tells nothing.

    Words have to do here: a base model, the one distilled from it and the one with a cache of keys and values have the
    same tensors of the same shapes. Where there is a `model_index.json`, that tells (see `configs.is_like`).
    """
    if hint in VARIANTS:
        return [row for row in rows if row.name == hint]
    text = _CASE.sub(" ", hint).lower()
    words = set(re.findall("[a-z]+", text))
    if _UNCERTAIN.search(text):
        return []
    if words & {"kv", "bkv"}:
        return [row for row in rows if row.kv_cache]
    if words & {"base", "bbase", "kleinbase"}:
        return [] if words & _FAST else [row for row in rows if not row.distilled]
    if "klein" in text and re.search("(?<![0-9])[49] ?b(?!f)", text):
        return [row for row in rows if row.distilled and not row.kv_cache]
    return []
