"""A bar on stderr for who calls the library from Python."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .store import Download


@contextmanager
def progress_bar(**options: Any) -> Iterator[Callable[[int, int], None]]:
    """A function of what is done and what there is in all, which shows both in a bar; `options` are tqdm's."""
    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            from tqdm import tqdm

            bar = tqdm(total=total, **options)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()  # what comes after is not counted

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def acquisition_bars(**options: Any) -> Iterator[Callable[[int, int, str], None]]:
    """Bars of bytes that are downloaded and then converted: a function of bytes done, bytes in all, and `download` or
    `convert`."""
    with ExitStack() as bars:
        shown: dict[str, Callable[[int, int], None]] = {}

        def show(done: int, total: int, what: str) -> None:
            if what not in shown:
                shown[what] = bars.enter_context(progress_bar(desc=what, unit="B", unit_scale=True, **options))
            shown[what](done, total)

        yield show


def announce(download: "Download") -> None:
    """Say what is about to be fetched, and where it goes."""
    from tqdm import tqdm

    licence = download.licence or "licence: see its page"
    whole, present = (f"{x / 1e9:.3g} GB" for x in (download.size, download.present))
    tqdm.write(
        f"{download.repo_id} ({licence}) is fetched from {download.page}: {whole}, of which {present} are there, "
        f"to {download.storage}",
        file=sys.stderr,
    )
