"""Parts of models, here and on the Hub, become a checkpoint: they are looked through first, then fetched, then
converted."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from .. import hub
from ..checkpoint import Checkpoint
from ..components import MAIN_PART
from ..convert import MissingPartsError, Source, assembled, check_folds, check_source, formats, is_loose
from ..errors import CheckpointError, DownloadError, InputError
from ..hub import Download
from ..wording import told
from .acquisition import convert_source
from .first_use import Fetching
from .parts import Remote, files_of, main_place
from .sources import Wanted

_TEKKEN = ("tekken_model",)  # a tensor that is a tokenizer
Others = Callable[[], Iterable[Checkpoint]]


class Gathering:
    """A model of parts that are here or on the Hub. Use it as a context manager.

    Args:
        where: its weights: a file of one or several parts, or a whole model that is here.
        given: where other parts are than its own.
        wanted: what of it, and how it is to be stored.
        others: gives converted models, one of which gives what is missing then.
    """

    def __init__(self, where: Path | Remote, given: Mapping[str, Path | Remote], wanted: Wanted, others: Others):
        self._where = where
        self._given = dict(given)
        self._wanted = wanted
        self._others = others
        self._borrowed: list[str] = []
        self._selections: dict[tuple[Remote, str | None], hub.Selection] = {}
        self._held = ExitStack()

    def __enter__(self) -> "Gathering":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def downloads(self) -> tuple[Download, ...]:
        """What is fetched of each repo."""
        return tuple(x.download for x in self._selections.values() if x.download is not None)

    def source(self) -> Source:
        """The model, of which nothing but headers is fetched before `fetch`. What it lacks is taken from the official
        repo of its kind.

        Raises:
            CheckpointError, DownloadError, InputError: it is no model, or parts of it are nowhere to be had.
        """
        try:
            return self._assembled()
        except MissingPartsError as error:
            if not error.can_be_fetched:
                raise
            lacking = error
        self._given |= dict.fromkeys(lacking.missing, Remote(str(lacking.source.variant.repo)))
        self._borrowed = [*lacking.missing]
        try:
            return self._assembled()
        except DownloadError as error:
            raise DownloadError(f"{lacking}; they can't be had from there: {error}") from error

    def fetch(self, progress: Callable[[int, int], object] | None) -> None:
        """Bring all weights; `progress` hears the bytes that are there and those in all."""
        total = sum(download.size for download in self.downloads)
        done = 0

        def report(count: int, _: int) -> None:
            if progress:
                progress(done + count, total)

        for selection in self._selections.values():
            selection.fetch(report)
            done += selection.download.size if selection.download else 0

    def _assembled(self) -> Source:
        given = {name: self._at(where, name) for name, where in self._given.items()}
        place = self._at(self._where, None)
        wanted = self._wanted
        transformer = self._given.get(MAIN_PART, self._where)
        repo = transformer.repo if isinstance(transformer, Remote) else ""
        if not given and not is_loose(place):
            with self.named():
                source = Source.open(place, wanted.variant, text_only=wanted.text_only, repo=repo)
            self._leave_out_unread(source)
            return source
        with self.named():
            source = assembled(
                place,
                given,
                wanted.variant,
                others=self._others(),
                text_quant=wanted.text_quant,
                text_only=wanted.text_only,
                repo=repo,
                borrowed=self._borrowed,
                replaced=wanted.replaced,
            )
        notes = list(source.notes)
        if self._borrowed:
            notes.insert(0, f"{place} has no {told(self._borrowed)}; taken from {source.variant.repo}")
        return replace(source, notes=tuple(map(self.called, notes)))

    def _leave_out_unread(self, source: Source) -> None:
        """Fetch none of the weights of a whole model that it is not made from, such as those of a second format."""
        read = {path for paths in source.files.values() for path in paths}
        for selection in self._selections.values():
            selection.leave_out([x for x in selection.names if hub.is_weight(x) and selection.folder / x not in read])

    def _at(self, where: Path | Remote, part: str | None) -> Path:
        """The folder or file of a part; an outline of it, if it is on the Hub and not fetched."""
        if isinstance(where, Path):
            return where
        if (where, part) not in self._selections:
            pieces = partial(formats.outline.pieces, early=_TEKKEN)
            selected = hub.select(where.repo, partial(files_of, where, part), pieces)
            self._selections[where, part] = self._held.enter_context(selected)
        selection = self._selections[where, part]
        return selection.folder / main_place(selection.names)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let errors say what `called` gives."""
        try:
            yield
        except MissingPartsError as error:
            raise MissingPartsError(self.called(str(error)), error.source, error.missing) from error
        except (CheckpointError, InputError) as error:
            raise type(error)(self.called(str(error))) from error

    def called(self, text: str) -> str:
        """A text with the repos in place of the folders of their files."""
        for selection in self._selections.values():
            text = selection.called(text)
        return text


def gather(
    name: str,
    gathering: Gathering,
    target: Callable[[str, str], Path],
    wanted: Wanted,
    fetching: Fetching,
    *,
    force: bool = False,
) -> Path:
    """Convert a model that is put together from parts. Before the first weight is fetched everything is checked that
    small files and headers tell. Gives the folder.

    Args:
        name: what the checkpoint says that it was made from.
        gathering: its parts, which are not gathered yet.
        target: the folder to make, by the quantizations of transformer and text encoder.
        wanted: what of it, and how it is to be stored.
        fetching: how, and who hears of it.
        force: replace an MLX checkpoint at `target`.

    Raises:
        InputError, CheckpointError, DownloadError: a part is none, can't be fetched, or does not fit on the disk.
    """
    with gathering:
        source = gathering.source()
        quants = source.quants(wanted.quant, wanted.text_quant)
        folder = target(*quants)
        downloads = gathering.downloads
        check_folds(source, wanted.folds)
        if downloads:
            with gathering.named():
                components = check_source(source, *quants)
            fetching.begin(name, downloads, folder, Checkpoint.outline(source.variant, *quants, components))
            gathering.fetch(fetching.report("download"))
            source = gathering.source()
        progress = fetching.report("convert")
        convert_source(source, folder, wanted, name=name, force=force, progress=progress, called=gathering.called)
    fetching.end(downloads)
    return folder
