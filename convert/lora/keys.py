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
NOT_RUN = "it is of the kind {}, which is not run; LoRA, LoKr, LoHa, DoRA and full differences are"
# Factors of such kinds, as PEFT, LyCORIS and kohya name them.
_NOT_RUN = re.compile(
    r"\.(?:(?P<OFT>oft_(?:blocks|diag|[Rr]))|(?P<BOFT>boft_[Rs])|(?P<GLoRA>[ab][12](?=\.weight$))|(?P<IA3>ia3_l|on_input)"
    r"|(?P<VeRA>vera_(?:lambda_[bd]|[AB]))|(?P<HRA>hra_u)|(?P<KaSA>lora_diag))(?:\.|$)"
)
# What VeLoRA keeps to save memory in training: a LoRA with it is a LoRA.
_OF_TRAINING = re.compile(r"\.lora_velora_embed(?:\.|$)")
_WHOLE = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.modules_to_save(?:\.[^.]+)?)?\.(?:weight|bias)")
_HALF = re.compile(r"(?<=lora_)(?:A|B|down|up)\b|\b(?:down|up)$")
_OTHER = {"A": "B", "B": "A", "down": "up", "up": "down"}
_ROLES = {"A": "down", "B": "up", "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude"}
LORA, LOKR, LOHA, FULL = "LoRA", "LoKr", "LoHa", "full difference"
_PAIR = {number: frozenset({f"lokr_w{number}_a", f"lokr_w{number}_b"}) for number in (1, 2)}
_HADAMARD = frozenset(f"hada_w{number}_{half}" for number in (1, 2) for half in "ab")
# The kind of a change by the factors that it consists of, all of which are needed.
_FORMS = {frozenset({"down", "up", *more}): LORA for more in ((), ("mid",), ("bias",), ("mid", "bias"))}
_FORMS |= {
    outer | inner: LOKR
    for outer in (frozenset({"lokr_w1"}), _PAIR[1])
    for inner in (frozenset({"lokr_w2"}), _PAIR[2], _PAIR[2] | {"lokr_t2"})
}
_FORMS |= {_HADAMARD: LOHA, _HADAMARD | {"hada_t1", "hada_t2"}: LOHA, frozenset({"diff"}): FULL}
_BESIDE = {"alpha", "magnitude", "diff_b"}  # a change of whatever kind


@dataclass(frozen=True)
class Module:
    """A layer of a trainer's model and the tensors that change it: their names, by what they are."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str | None:
        """The kind of the change to its weights; None: nothing but its bias changes."""
        return _FORMS.get(self._factors)

    @property
    def _factors(self) -> frozenset[str]:
        return frozenset(self.keys.keys() - _BESIDE)

    def check(self) -> None:
        """CheckpointError unless the factors are those of one change, and all of them."""
        factors = self._factors
        if factors in _FORMS or [*self.keys] == ["diff_b"]:
            return
        if not factors:
            raise CheckpointError(f"{min(self.keys.values())} belongs to no change of a layer; fetch the adapter again")
        names = sorted(self.keys[role] for role in factors)
        if missing := next((sorted(form - factors) for form in _FORMS if factors < form), None):
            wanted = " and ".join(map(self._spelled, missing))
            raise CheckpointError(f"{names[0]} has no {wanted} beside it; fetch the adapter again")
        raise CheckpointError(f"{', '.join(names)} are no factors of one change of a layer; fetch the adapter again")

    def _spelled(self, role: str) -> str:
        """A factor that is missing, as the file names such: like the other one of its pair."""
        other = self.keys.get({"down": "up", "up": "down"}.get(role, ""))
        if other is None:
            return role
        return _HALF.sub(lambda half: _OTHER[half[0]], other[len(self.name) + 1 :].removesuffix(".weight"), count=1)


def modules(names: Iterable[str]) -> tuple[dict[str, Module], list[str]]:
    """The modules that tensors of these names change, by their own names, and the tensors that are no part of that.

    Raises:
        CheckpointError: a factor is there twice, or factors are of several adapters.
    """
    found: dict[str, Module] = {}
    others: list[str] = []
    twice: list[str] = []
    adapters: set[str] = set()
    for key in names:
        match = _KEY.search(key)
        if match is None or not match.start():
            others.append(key)
            continue
        adapters |= {match[group] for group in "abcd" if match[group] is not None}
        module = found.setdefault(key[: match.start()], Module(key[: match.start()]))
        first = module.keys.setdefault(_role(match), key)
        twice += [f"{first} and {key}"] if first != key else []
    if len(adapters) > 1:
        raise CheckpointError(
            f"it holds several adapters, {', '.join(sorted(adapters)[:3])}; give a file of one of them"
        )
    if twice:
        raise CheckpointError(f"{twice[0]} are the same factor of a layer; remove one of them")
    return found, others


def check_run(names: Iterable[str]) -> None:
    """CheckpointError if a tensor's name is that of a factor of a kind that is not run."""
    if match := next(filter(None, map(_NOT_RUN.search, names)), None):
        raise CheckpointError(NOT_RUN.format(match.lastgroup))


def is_of_training(key: str) -> bool:
    """Whether a tensor of this name matters to nothing but training."""
    return _OF_TRAINING.search(key) is not None


def whole(key: str) -> str | None:
    """The module whose whole weight, or bias, a tensor of this name is, without PEFT's prefix; None: it is neither."""
    match = _WHOLE.fullmatch(key)
    return match and match[1]


def _role(match: re.Match[str]) -> str:
    if match["biased"]:
        return "bias"
    word = match["half"] or match["magnitude"] or match["factor"] or match["old"] or match["plain"]
    return _ROLES.get(word, word)
