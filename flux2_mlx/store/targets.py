"""The checkpoint that a model becomes: where it is or will be, and the making of it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from ..checkpoint import Checkpoint, is_checkpoint, variant_components
from ..components import COMPONENTS, WRITING_PARTS
from ..config import QUANTIZATIONS
from ..convert import Source, check_source, check_writable
from ..errors import CheckpointError, InputError
from ..quantization import wanted_quants
from .acquisition import convert_source
from .conversion import make_checkpoint, make_from_parts
from .converted import checkpoint_name, conversions, folder_name, keeps_bits
from .first_use import Check, Fetching
from .names import FILE, REPO, SOURCE, Model, resolve
from .sources import Wanted, what_is_here


def target_of(model: Model, wanted: Wanted, folder: Path) -> "_OfFile | _OfModel":
    """What is `wanted` of a model, as a checkpoint in the models folder."""
    return _OfFile(model, wanted, folder) if model.kind == FILE else _OfModel(model, wanted, folder)


class _OfFile:
    """The conversion of files of the Hub, which alone tell what they would be stored as without a quantization."""

    def __init__(self, model: Model, wanted: Wanted, folder: Path):
        self._model = model
        self._wanted = wanted
        self._folder = folder

    def stored(self) -> Path | None:
        """The one in most bits that there is, as far as a quantization is left open."""
        wanted = self._wanted
        found = map(Checkpoint.open, conversions(self._model, self._folder, painting=not wanted.text_only))
        fitting = [x for x in found if wanted.quant in (None, x.quant) and wanted.text_quant in (None, x.text_quant)]
        return min(fitting, key=_place).folder if fitting else None

    def make(self, fetching: Fetching) -> Path:
        check_writable(self._target("bf16", "bf16"))
        return make_from_parts(self._model, {}, self._target, self._wanted, fetching, models_dir=self._folder)

    def _target(self, quant: str, text_quant: str) -> Path:
        return self._folder / _sufficient(folder_name(self._model), quant, text_quant, self._wanted.text_only)[0]


def _place(checkpoint: Checkpoint) -> tuple[int, int]:
    """Where a checkpoint stands among those of a model, by the bits of its transformer and its text encoder."""
    return QUANTIZATIONS.index(checkpoint.quant), QUANTIZATIONS.index(checkpoint.text_quant)


class _OfModel:
    """The conversion of a model whose name or files tell what it will be stored as."""

    def __init__(self, model: Model, wanted: Wanted, folder: Path):
        self._model = model
        self._wanted = wanted
        self._folder = folder
        self._source: Source | None = None
        self._is_whole = True
        if model.kind == SOURCE:
            self._source, self._is_whole = what_is_here(model, wanted, folder)
        store_as = wanted_quants if self._source is None else self._source.quants
        self._quants = store_as(wanted.quant, wanted.text_quant)
        source = self._source
        self._name = f"{source.variant.name}-{source.fingerprint[:12]}" if source else folder_name(model)
        self._targets = [folder / name for name in _sufficient(self._name, *self._quants, wanted.text_only)]

    def stored(self) -> Path | None:
        return next(filter(is_checkpoint, self._targets), None) or self._kept()

    def _kept(self) -> Path | None:
        """One that has as few bits as the files of a repo had, as far as nothing else was asked of it."""
        if self._model.kind != REPO:
            return None
        wanted = self._wanted
        found = conversions(self._model, self._folder, painting=not wanted.text_only)
        return next((x for x in found if keeps_bits(x, wanted.quant, wanted.text_quant)), None)

    def make(self, fetching: Fetching) -> Path:
        target = self._targets[0]
        outline = self._outline() if fetching.check and self._is_whole else None
        if fetching.check and outline:
            fetching.check(outline)
            fetching = replace(fetching, check=partial(_check_again, fetching.check, outline))
        check_writable(target)
        stored = None if self._wanted.text_only else _unquantized(self._folder, self._name, *self._quants)
        try:
            return self._made(stored, fetching)
        except (InputError, CheckpointError):
            if (made := self.stored()) is None:  # by another process, meanwhile
                raise
            return made

    def _made(self, stored: Path | None, fetching: Fetching) -> Path:
        """What is made of the model, or of a checkpoint of it that is `stored`."""
        model, wanted = self._model, self._wanted
        if stored is not None:
            model, wanted = resolve(stored), replace(wanted, quant=self._quants[0], text_quant=self._quants[1])
        elif self._source is not None and self._is_whole:
            target, progress = self._targets[0], fetching.report("convert")
            convert_source(self._source, target, wanted, name=model.origin, progress=progress)
            return target
        return make_checkpoint(model, self._target, wanted, fetching, models_dir=self._folder)

    def _target(self, quant: str, text_quant: str) -> Path:
        return self._folder / _sufficient(self._name, quant, text_quant, self._wanted.text_only)[0]

    def _outline(self) -> Checkpoint | None:
        """What the model will be when it is converted; None: its files must tell, which are not here."""
        source = self._source
        variant = self._model.variant
        if source is not None:
            return Checkpoint.outline(source.variant, *self._quants, check_source(source, *self._quants))
        if variant is None:
            return None
        components = variant_components(variant, *self._quants)
        if self._wanted.text_only:
            components = {name: part for name, part in components.items() if COMPONENTS[name].part in WRITING_PARTS}
        return Checkpoint.outline(variant, *self._quants, components)


def _check_again(check: Check, outline: Checkpoint, found: Checkpoint) -> None:
    """Have what the files say checked, if it is something else than the `outline` that was."""
    if outline.fitted_variant != found.fitted_variant:
        check(found)


def _sufficient(model: str, quant: str, text_quant: str, text_only: bool) -> list[str]:
    """The names of the folders that will do, the one to make first. Every whole model has a language model."""
    if not text_only:
        return [checkpoint_name(model, quant, text_quant)]
    return [f"{model}-text-only-{text_quant}", *(checkpoint_name(model, q, text_quant) for q in QUANTIZATIONS)]


def _unquantized(folder: Path, model: str, quant: str, text_quant: str) -> Path | None:
    """A converted checkpoint that the one asked for can be made from."""
    names = [checkpoint_name(model, q, t) for q in {quant, "bf16"} for t in {text_quant, "bf16"}]
    return next((folder / name for name in sorted(names) if is_checkpoint(folder / name)), None)
