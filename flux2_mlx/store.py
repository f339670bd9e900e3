"""The models folder: from a name, repo id or folder to a converted MLX checkpoint."""

import logging
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from . import hub
from .checkpoint import MANIFEST, PAINTING, is_checkpoint
from .config import QUANTIZATIONS, VARIANTS, Variant, get_variant
from .convert import Source, check_writable, write_checkpoint
from .errors import CheckpointError, InputError
from .quantization import DEFAULT_TEXT_QUANT, check_quant
from .staging import bring_all_back
from .weights import read_json

DEMO = "demo"
_log = logging.getLogger(__name__)


def models_folder(models_dir: str | os.PathLike | None = None) -> Path:
    """`models_dir`, or `$FLUX2_MLX_HOME`, or `~/.cache/flux2-mlx`."""
    return _expanded(models_dir or os.environ.get("FLUX2_MLX_HOME") or "~/.cache/flux2-mlx")


def demo_folder() -> Path:
    """The built-in checkpoint."""
    return Path(str(files("flux2_mlx.demo")))


def _expanded(path: str | os.PathLike) -> Path:
    """`path` with a home folder in place of a leading `~`."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"can't tell whose home folder {str(path)!r} starts with; write the folder in full") from error


def checkpoint_name(model: str, quant: str, text_quant: str) -> str:
    """The folder of a converted model: its name and quantization, the text encoder's where it is not the default."""
    text = "" if text_quant == DEFAULT_TEXT_QUANT[quant] else f"-text-{text_quant}"
    return f"{model}-{quant}{text}"


def find_checkpoint(
    source: str,
    *,
    variant: str | None = None,
    quant: str | None = None,
    text_quant: str | None = None,
    models_dir: str | os.PathLike | None = None,
    text_only: bool = False,
    only_converted: bool = False,
    quiet: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The MLX checkpoint folder of `source`, fetched and converted first if need be.

    Args:
        source: a variant's name, a Hugging Face repo id, a diffusers folder, or an MLX checkpoint folder.
        variant: the model's name where the source can't tell; where it can, InputError if it is another.
        quant: `bf16` (None), `qint8` or `qint4`; an MLX checkpoint keeps its own.
        text_quant: the same for the text encoder; None: 8 bit, or 4 bit with `qint4`.
        models_dir: where converted models are kept; see `models_folder`.
        text_only: a checkpoint without transformer and VAE will do.
        only_converted: fetch and convert nothing.
        quiet: show no download progress.
        progress: called with bytes converted and bytes in all.

    Raises:
        InputError, CheckpointError, DownloadError: the source is unknown, damaged or can't be fetched.
    """
    if variant is not None:
        get_variant(variant)
    path = demo_folder() if source == DEMO else _expanded(source)
    if is_checkpoint(path):
        return _holding(path, variant)
    quant = check_quant(quant or "bf16")
    text_quant = check_quant(text_quant or DEFAULT_TEXT_QUANT[quant])
    known, repo = look_up(source)
    if known and variant not in (None, known.name):
        raise InputError(f"{source} is not {variant}; leave the variant out, or choose another model")
    variant = known.name if known else variant
    opened = None if repo else _open_folder(source, path, variant, text_only)
    name = source.replace("/", "--") if repo else f"{opened.variant.name}-{opened.fingerprint[:12]}"
    targets = [models_folder(models_dir) / x for x in _sufficient(name, quant, text_quant, text_only)]
    if found := next(filter(is_checkpoint, targets), None):
        return _holding(found, variant)
    if only_converted:
        raise InputError(f"{source} is not converted yet; name it with -m to have it fetched and converted")
    check_writable(targets[0])
    if repo:
        opened = Source.open(hub.fetch(repo, text_only=text_only, quiet=quiet), variant, text_only=text_only)
    _convert(opened, targets[0], quant, text_quant, repo or str(path), progress)
    return targets[0]


def look_up(source: str) -> tuple[Variant | None, str | None]:
    """The row of the table that `source` names or whose repo it is, and its Hugging Face repo; None: there is none.

    A model folder comes before a model of its name, any other folder does not.
    """
    if (_expanded(source) / "model_index.json").is_file():
        return None, None
    if source in VARIANTS:
        return VARIANTS[source], VARIANTS[source].repo
    if not hub.is_repo_id(source):
        return None, None
    known = next((v for v in VARIANTS.values() if v.repo and v.repo.lower() == source.lower()), None)
    return known, known.repo if known else source


def _open_folder(source: str, path: Path, variant: str | None, text_only: bool) -> Source:
    if not path.exists():
        raise InputError(
            f"there is no model or folder {source!r}; choose one of {', '.join(VARIANTS)}, a Hugging Face repo id "
            "or a model folder"
        )
    return Source.open(path, variant, text_only=text_only)


def _holding(folder: Path, variant: str | None) -> Path:
    """The checkpoint `folder`; InputError if it is not of `variant`."""
    if variant is not None and (stored := read_json(folder / MANIFEST).get("variant", variant)) != variant:
        raise InputError(f"{folder} holds {stored}, not {variant}; leave the variant out, or choose another model")
    return folder


def _sufficient(model: str, quant: str, text_quant: str, text_only: bool) -> list[str]:
    """The names of the folders that will do, the one to make first. Every whole model has a language model."""
    if not text_only:
        return [checkpoint_name(model, quant, text_quant)]
    return [f"{model}-text-only-{text_quant}", *(checkpoint_name(model, q, text_quant) for q in QUANTIZATIONS)]


def _convert(source: Source, target: Path, quant: str, text_quant: str, name: str, progress) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_checkpoint(source, target, quant, text_quant, name=name, progress=progress)
    except InputError:
        # Another process may have finished the same conversion meanwhile.
        if not is_checkpoint(target):
            raise


def converted_folders(models_dir: str | os.PathLike | None = None) -> dict[str, list[Path]]:
    """The converted checkpoints in the models folder that can make images, by the name of their variant."""
    folder, found = models_folder(models_dir), {name: [] for name in VARIANTS}
    bring_all_back(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_checkpoint(path) and (name := _painter(path)) in found:
            found[name].append(path)
    return found


def named_checkpoints(name: str, models_dir: str | os.PathLike | None = None) -> list[Path]:
    """The converted checkpoints that `name` stands for, damaged ones among them.

    Args:
        name: a converted folder, one in the models folder, or a variant or repo id that was converted to that.
        models_dir: see `models_folder`.

    Raises:
        InputError: there are none.
    """
    if name == DEMO:
        return [demo_folder()]
    folder, path = models_folder(models_dir), _expanded(name)
    for one in (path, folder / name):
        if is_checkpoint(one):
            return [one]
    bring_all_back(folder)
    converted = [x for x in sorted(folder.iterdir()) if is_checkpoint(x)] if folder.is_dir() else []
    names = {name.lower()} | ({known.name} if (known := look_up(name)[0]) else set())
    if found := [path for path in converted if _is_named(path, names)]:
        return found
    if path.is_dir():
        raise CheckpointError(f"{path} is not an MLX checkpoint: it has no {MANIFEST}")
    choices = ", ".join([DEMO, *(path.name for path in converted)])
    raise InputError(f"there is no converted model {name!r} in {folder}; choose one of {choices}, or a folder")


def _is_named(folder: Path, names: set[str]) -> bool:
    """Whether a checkpoint was made of a model of these `names`; one that can't tell is judged by its folder's."""
    try:
        manifest = read_json(folder / MANIFEST)
    except CheckpointError:
        return any(folder.name.startswith(f"{name.replace('/', '--')}-") for name in names)
    source = manifest.get("source")
    claims = [manifest.get("variant"), source.get("name") if isinstance(source, dict) else None]
    return any(isinstance(claim, str) and claim.lower() in names for claim in claims)


def _painter(folder: Path) -> str | None:
    """The variant of a checkpoint that is more than a language model; None, with a warning, if it is damaged."""
    try:
        manifest = read_json(folder / MANIFEST)
    except CheckpointError as error:
        _log.warning("%s; remove %s, or convert the model again", error, folder)
        return None
    components, name = manifest.get("components"), manifest.get("variant")
    complete = isinstance(components, list) and all(part in components for part in PAINTING)
    return name if complete and isinstance(name, str) else None
