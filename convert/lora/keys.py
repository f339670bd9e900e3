"""What each tensor of an adapter is, by its name: which factor, of which module of the trainer's model."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from flux2_mlx.errors import CheckpointError

_NAME = r"(?:\.(?!weight$|bias$)(?P<{}>[^.]+))?"  # of one of several adapters of PEFT
_KEY = re.compile(
    r"\.(?:"
    rf"lora_(?P<half>A|B|down|up|mid){_NAME.format('a')}\.weight"
    rf"|lora_(?P<biased>B|up){_NAME.format('d')}\.bias"
    rf"|(?P<magnitude>lora_magnitude_vector){_NAME.format('b')}(?:\.weight)?"
    rf"|(?P<factor>lokr_(?:w[12](?:_[ab])?|t2)|hada_(?:w[12]_[ab]|t[12])){_NAME.format('c')}"
    r"|lora(?:_linear)?(?:_layer)?\.(?P<old>down|up)\.weight"
    r"|(?P<plain>alpha|dora_scale|diff|diff_b)"
    r")$"
)
_ROLES = {"A": "down", "B": "up", "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude"}
LORA, LOKR, LOHA, FULL = "LoRA", "LoKr", "LoHa", "full difference"
# By the factors that a module has: the kind of its change, those that it needs (one of each), and those it may have.
KINDS: dict[str, tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]] = {
    LORA: ((("down",), ("up",)), ("mid", "bias")),
    LOKR: (
        (("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a")),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ),
    LOHA: ((("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)), ("hada_t1", "hada_t2")),
    FULL: ((("diff",),), ()),
}
_PAIRS = (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"), ("hada_t1", "hada_t2"))
_SIGNS = {kind: {*more, *(name for names in needs for name in names)} for kind, (needs, more) in KINDS.items()}
_ANY = ("alpha", "magnitude", "diff_b")  # beside a change of whatever kind


@dataclass(frozen=True)
class Module:
    """A layer of a trainer's model and the tensors that change it: their names, by what they are."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str | None:
        """The kind of the change to its weights; None if nothing but a bias changes."""
        return next((kind for kind, signs in _SIGNS.items() if not signs.isdisjoint(self.keys)), None)

    def check(self) -> None:
        """CheckpointError unless the factors are those of one change, and all of them."""
        if self.kind is None:
            if alone := next((key for role, key in self.keys.items() if role != "diff_b"), None):
                raise CheckpointError(f"{alone} belongs to no change of a layer; fetch the adapter again")
            return
        needs, _ = KINDS[self.kind]
        for names in needs:
            if not any(name in self.keys for name in names):
                raise CheckpointError(f"{self._first} has no {names[0]} beside it; fetch the adapter again")
        for pair in _PAIRS:
            if (halves := [x for x in pair if x in self.keys]) and len(halves) == 1:
                missing = next(x for x in pair if x not in halves)
                raise CheckpointError(f"{self.keys[halves[0]]} has no {missing} beside it; fetch the adapter again")
        allowed = {*_SIGNS[self.kind], *_ANY}
        if other := next((key for role, key in self.keys.items() if role not in allowed), None):
            raise CheckpointError(f"{other} and {self._first} are two kinds of change of one layer; remove one of them")
        for number in "12":
            if f"lokr_w{number}" in self.keys and f"lokr_w{number}_a" in self.keys:
                raise CheckpointError(f"{self.keys[f'lokr_w{number}']} is there twice, whole and in factors")

    @property
    def _first(self) -> str:
        return next(iter(self.keys.values()))


def modules(names: Iterable[str]) -> tuple[dict[str, Module], list[str]]:
    """The modules that tensors of these names change, by their own names, and the tensors that are no part of that.

    Raises:
        CheckpointError: a factor is there twice, or factors are of several adapters.
    """
    found: dict[str, Module] = {}
    others, adapters = [], {}
    for key in names:
        match = _KEY.search(key)
        if match is None or not match.start():
            others.append(key)
            continue
        role, adapter = _role(match), match["a"] or match["b"] or match["c"] or match["d"]
        if adapter is not None:
            adapters.setdefault(adapter, key)
        keys = found.setdefault(key[: match.start()], Module(key[: match.start()])).keys
        if role in keys:
            raise CheckpointError(_twice(keys[role], key, list(adapters)))
        keys[role] = key
    if len(adapters) > 1:
        raise CheckpointError(_twice(*list(adapters.values())[:2], list(adapters)))
    return found, others


def _role(match: re.Match[str]) -> str:
    if match["biased"]:
        return "bias"
    word = match["half"] or match["magnitude"] or match["factor"] or match["old"] or match["plain"]
    return _ROLES.get(word, word)


def _twice(first: str, second: str, adapters: list[str]) -> str:
    if len(adapters) > 1:
        return f"there are several adapters, {' and '.join(adapters[:3])}; give a file of one of them"
    return f"{first} and {second} are the same factor; remove one of them"
