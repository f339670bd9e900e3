"""How names are listed and called in what users read."""

from collections.abc import Iterable, Sequence

_WORDS = {"vae": "VAE", "vision": "vision tower"}  # of names of networks and phases, that users read otherwise


def told(names: Iterable[str]) -> str:
    """Names of networks and phases as users read them in a sentence."""
    *most, last = [" ".join(_WORDS.get(word, word) for word in name.split("_")) for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def some(names: Sequence[str], count: int = 5) -> str:
    """The first `count` of many names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"
