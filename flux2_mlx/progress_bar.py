"""A bar on stderr for who calls the library from Python."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(**options: Any) -> Iterator[Callable[[int, int], None]]:
    """A function that shows how many of how many are done, and first makes the bar; `options` are tqdm's."""
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
