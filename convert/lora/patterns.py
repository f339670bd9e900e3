"""Tables of PEFT that say something of modules, by the ends of their names or by regular expressions for these."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from flux2_mlx.errors import CheckpointError

# A name, or a whole name behind `^`, as nearly all tables have them. They are looked up, and not matched.
_PLAIN = re.compile(r"\^?[\w-](?:[\w.-]*[\w-])?", re.ASCII)
_TOKEN = re.compile(
    r"(?P<one>\\[dDwW.\-]|\[\^?[\w.\-]+\]|[\w.\-])(?P<times>[*+?]?)\??|(?P<edge>[\^$])|(?P<open>\((?:\?:)?)|(?P<or>\|)"
    r"|(?P<close>\))",
    re.ASCII,
)
_CHARACTERS = [*map(chr, range(33, 127))]  # that names of modules consist of
# Of all expressions of a table, which bounds how long matching takes.
_MOST_CHARACTERS = 2000
_MOST_REPEATED = 100
_DEEPEST = 20
# What stands in front of the names that PEFT saw: diffusers' name of the network, and PEFT's own prefix.
_SAVED_WITH = re.compile(r"(?:(?:transformer|text_encoder)\.)?(?:base_model\.model\.)?")


@dataclass(frozen=True)
class _One:
    """One of some characters, one or none of them (`?`), or as many as there are (`*`, `+`)."""

    kind: frozenset[str]
    times: str

    def ends(self, name: str, starts: set[int]) -> set[int]:
        found, new = set[int](), starts
        while new := {at + 1 for at in new if name[at : at + 1] in self.kind} - found:
            found |= new
            if self.times not in ("*", "+"):
                break
        return found | starts if self.times in ("*", "?") else found


@dataclass(frozen=True)
class _Edge:
    """The start of a name (`^`), or its end."""

    sign: str

    def ends(self, name: str, starts: set[int]) -> set[int]:
        return starts & {0 if self.sign == "^" else len(name)}


@dataclass(frozen=True)
class _AnyOf:
    """One of several sequences."""

    choices: "list[list[_One | _Edge | _AnyOf]]" = field(default_factory=lambda: [[]])

    def ends(self, name: str, starts: set[int]) -> set[int]:
        """All places where parts of a name end that start at one of these places and match. Nothing is tried twice:
        it takes as many steps as the expression has parts, times the characters of the name."""
        found = set[int]()
        for choice in self.choices:
            places = starts
            for part in choice:
                places = part.ends(name, places)
            found |= places
        return found


@dataclass(frozen=True)
class Patterns:
    """The numbers of a table by its patterns, of which the first that the end of a module's name matches counts. The
    end consists of whole parts between dots, as `re.match(rf"(.*\\.)?({pattern})$", name)` has it in PEFT."""

    values: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, key: str, table: Mapping[str, float]) -> "Patterns":
        """The table called `key`.

        Raises:
            CheckpointError: a pattern is no such expression: characters and classes of them (`.`, `\\d`, `[a-z]`), each
                maybe with `*`, `+` or `?`, groups of alternatives, `^` and `$`; or they are too many.
        """
        values: dict[str, float] = {}
        for pattern, value in table.items():
            plain = pattern.replace(r"\.", ".").removesuffix("$")
            values.setdefault(plain if _PLAIN.fullmatch(plain) else pattern, value)
        read = cls(values)
        whole = "".join(read._texts)
        if len(whole) > _MOST_CHARACTERS or whole.count("*") + whole.count("+") > _MOST_REPEATED:
            raise CheckpointError(f"its {key} has too many expressions; write the name of each layer")
        for pattern in read._texts:
            try:
                _parsed(pattern)
            except (ValueError, re.error):
                way = "write the name of each layer"
                raise CheckpointError(f"its {key} has {pattern[:60]!r}, which is not understood; {way}") from None
        return read

    @cached_property
    def _texts(self) -> list[str]:
        """The patterns that are no names."""
        return [pattern for pattern in self.values if not _PLAIN.fullmatch(pattern)]

    @cached_property
    def _expressions(self) -> dict[str, _AnyOf]:
        return {pattern: _parsed(pattern) for pattern in self._texts}

    def value(self, module: str, usual: float | None) -> float | None:
        """The number of a module, called so in the file of its adapter; `usual` if no pattern matches."""
        name = _SAVED_WITH.sub("", module, count=1)
        starts = {0, *(dot.end() for dot in re.finditer(r"\.", name))}
        matching = {f"^{name}", *(name[start:] for start in starts)} & self.values.keys()
        matching |= {text for text, one in self._expressions.items() if len(name) in one.ends(name, starts)}
        return next((value for pattern, value in self.values.items() if pattern in matching), usual)


def _parsed(pattern: str) -> _AnyOf:
    """An expression; ValueError if it is none that is read."""
    groups = [_AnyOf()]  # those that are open, the innermost last
    for token in _tokens(pattern):
        _put(token, groups)
        if not 0 < len(groups) <= _DEEPEST:
            raise ValueError(pattern)
    if len(groups) != 1:
        raise ValueError(pattern)
    return groups[0]


def _tokens(pattern: str) -> Iterator[re.Match[str]]:
    at = 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None:
            raise ValueError(pattern)
        yield token
        at = token.end()


def _put(token: re.Match[str], groups: list[_AnyOf]) -> None:
    """Have a token stand behind what there is of an expression."""
    sequence = groups[-1].choices[-1]
    if token["one"]:
        kind = frozenset(x for x in _CHARACTERS if re.fullmatch(token["one"], x))
        sequence.append(_One(kind, token["times"]))
    elif token["edge"]:
        sequence.append(_Edge(token["edge"]))
    elif token["or"]:
        groups[-1].choices.append([])
    elif token["open"]:
        groups.append(_AnyOf())
        sequence.append(groups[-1])
    else:
        groups.pop()
