"""From the factors of a module, as a trainer stores them, to the change of our layer."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx

from flux2_mlx.adapters import BiasDifference, Decomposed, Delta, Difference, Hadamard, Kronecker, LowRank, tucker
from flux2_mlx.errors import CheckpointError
from flux2_mlx.weights import READER

from ..rules import swap_halves
from .keys import FULL, LOHA, LOKR, LORA
from .settings import Strength
from .shapes import Factors, matrix

Change = Delta | Decomposed | BiasDifference
_halves = swap_halves("").apply


def changes(
    factors: Factors, strength: Strength, arrays: Mapping[str, mx.array], *, is_swapped: bool = False
) -> list[Change]:
    """The changes that a module makes, in memory.

    Args:
        factors: the tensors of the module.
        strength: by what they are multiplied where no tensor says it.
        arrays: the tensors by what they are.
        is_swapped: whether the halves of its outputs stand in the other order than ours.

    Raises:
        CheckpointError: a number is not finite, or the config says another rank.
    """
    module = factors.module
    with mx.stream(READER):
        values = {role: _plain(array) for role, array in arrays.items()}
        for role, array in values.items():
            if not mx.isfinite(array).all().item():
                raise CheckpointError(f"{module.keys[role]} has values that are not finite; fetch the adapter again")
        found = _made(factors, values, scale(factors, strength, values.get("alpha")), is_swapped)
        for change in found:
            mx.eval(vars(change.change if isinstance(change, Decomposed) else change))
    return found


def outlined(factors: Factors, *, is_swapped: bool = False) -> list[Change]:
    """Changes of the same shapes whose arrays take no memory, as they are never computed."""
    values = {role: mx.zeros(matrix(shape)) for role, shape in factors.shapes.items()}
    return _made(factors, values, 1.0, is_swapped)


def _made(factors: Factors, values: Mapping[str, mx.array], factor: float, is_swapped: bool) -> list[Change]:
    """The changes, not computed yet."""
    found: list[Change] = []
    if factors.module.kind is not None:
        delta = _DELTAS[factors.module.kind](values, factor)
        found.append(Decomposed(delta, _magnitude(factors, values)) if "magnitude" in values else delta)
    if "bias" in values:
        found.append(BiasDifference(values["bias"], factor))
    if "diff_b" in values:
        found.append(BiasDifference(values["diff_b"]))
    return [_swapped(change) for change in found] if is_swapped else found


def scale(factors: Factors, strength: Strength, alpha: mx.array | None) -> float:
    """What the product of factors is multiplied by, where `alpha` is the tensor beside them, or None.

    LyCORIS multiplies whole matrices by nothing, whatever alpha says then: 10¹⁰ in files of ai-toolkit.
    """
    if factors.module.kind == FULL:
        return 1.0
    if alpha is None:
        return strength.scale(factors.module.name, factors.rank)
    return 1.0 if factors.rank is None else cast("float", alpha.astype(mx.float32).item()) / factors.rank


def _plain(array: mx.array) -> mx.array:
    array = array.astype(mx.float32) if array.dtype == mx.float64 else array
    return array.reshape(matrix(array.shape))


def _magnitude(factors: Factors, values: Mapping[str, mx.array]) -> mx.array:
    magnitude = values["magnitude"]
    return magnitude.reshape(-1, 1) if magnitude.shape[0] == factors.outputs else magnitude


def _low_rank(values: Mapping[str, mx.array], scale: float) -> Delta:
    down = values["down"]
    return LowRank(values["mid"] @ down if "mid" in values else down, values["up"], scale)


def _kronecker(values: Mapping[str, mx.array], scale: float) -> Delta:
    def factor(name: str) -> Any:
        if name in values:
            return values[name]
        pair = values[f"{name}_a"], values[f"{name}_b"]
        has_core = name == "lokr_w2" and "lokr_t2" in values
        return tucker(values["lokr_t2"], *pair) if has_core else pair

    return Kronecker(factor("lokr_w1"), factor("lokr_w2"), scale)


def _hadamard(values: Mapping[str, mx.array], scale: float) -> Delta:
    def pair(number: int) -> tuple[mx.array, mx.array]:
        a, b = values[f"hada_w{number}_a"], values[f"hada_w{number}_b"]
        return tucker(values[f"hada_t{number}"], a, b) if f"hada_t{number}" in values else (a, b)

    return Hadamard(*pair(1), *pair(2), scale)


_DELTAS: dict[str, Callable[[Mapping[str, mx.array], float], Delta]] = {
    LORA: _low_rank,
    LOKR: _kronecker,
    LOHA: _hadamard,
    FULL: lambda values, scale: Difference(values["diff"]),
}


def _swapped(change: Change) -> Change:
    """The same with the halves of its outputs exchanged."""
    match change:
        case Decomposed(inner, magnitude):
            return Decomposed(_swapped_weight(inner), _halves(magnitude) if magnitude.shape[1] == 1 else magnitude)
        case BiasDifference():
            return replace(change, difference=_halves(change.difference))
    return _swapped_weight(change)


def _swapped_weight(change: Delta) -> Delta:
    match change:
        case LowRank():
            return replace(change, up=_halves(change.up))
        case Hadamard():
            return replace(change, w1a=_halves(change.w1a), w2a=_halves(change.w2a))
        case Kronecker(w1=(a, b)) if len(a) % 2 == 0:
            return replace(change, w1=(_halves(a), b))
        case Kronecker(w1=mx.array() as w1) if len(w1) % 2 == 0:
            return replace(change, w1=_halves(w1))
    return Difference(_halves(change.weight()))
