"""Adapters written as diffusers saves LoRAs, whatever they were trained as: what they change is the same."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_mlx.adapters import BiasDifference, Decomposed, Delta, Difference, Factor, Hadamard, Kronecker, LowRank
from flux2_mlx.errors import CheckpointError, InputError
from flux2_mlx.layout import SAFETENSORS
from flux2_mlx.staging import new_file, put
from flux2_mlx.verification import Meter
from flux2_mlx.weights import FLOATS, READER, TensorInfo, write_safetensors

from ..dialects import DIFFUSERS, filled, templated
from ..folder import check_space, check_writable
from ..rules import swap_halves
from .adapter_file import AdapterFile
from .changes import Change
from .folder import DIFFUSERS_MODEL, PEFT_CONFIG, PEFT_MODEL, is_adapter, is_config_of, names_beside
from .keys import LORA
from .places import TEXT, TRANSFORMER, Place

_WEIGHT = ".weight"
_halves = swap_halves("").apply
_HERE = "it can be used here as it is"


@dataclass(frozen=True)
class _Factors:
    """A LoRA of one module: ΔW = up @ down, with what its bias changes by, and DoRA's lengths of rows."""

    down: mx.array
    up: mx.array
    bias: mx.array | None = None
    magnitude: mx.array | None = None

    def rows(self, rows: slice) -> "_Factors":
        """The same of some outputs only."""
        own = {name: x if x is None or name == "down" else x[rows] for name, x in vars(self).items()}
        return _Factors(**own)

    def swapped(self) -> "_Factors":
        """The same with the halves of the outputs exchanged."""
        own = {name: x if x is None or name == "down" else _halves(x) for name, x in vars(self).items()}
        return _Factors(**own)

    def named(self, module: str) -> Iterator[tuple[str, mx.array]]:
        names = {"down": "lora_A.weight", "up": "lora_B.weight", "bias": "lora_B.bias"}
        names["magnitude"] = "lora_magnitude_vector"
        yield from ((f"{module}.{names[key]}", x) for key, x in vars(self).items() if x is not None)


def save_adapter(
    found: AdapterFile, target: Path, *, force: bool = False, progress: Callable[[int, int], object] | None = None
) -> Path:
    """Write an adapter in the layout of diffusers, with its metadata.

    LoRA keeps its factors; alpha is multiplied into the second one, in float32 where that would be rounded. What
    diffusers has no form of becomes factors of exactly the same product, of a higher rank: LoHa, LoKr, whole
    differences. DoRA stays what it is.

    Args:
        found: the adapter.
        target: the file, if it is named `.safetensors`, or the folder that it goes to; it appears when it is complete.
        force: replace a file that is there.
        progress: called with bytes written and bytes in all.

    Returns:
        The file.

    Raises:
        InputError: it exists, can't be written, does not fit on the disk, or has a config of PEFT beside it that would
            change what it is, or no longer be about another file.
        CheckpointError: values are not finite, or diffusers can't express what changes.
    """
    path = target if target.suffix.lower() == SAFETENSORS else target / DIFFUSERS_MODEL
    _check_config(path)
    _check_free(path, force)
    _check_expressible(found)
    infos = {name: TensorInfo(FLOATS[x.dtype], x.shape) for name, x in _tensors(found)}
    needed = sum(info.nbytes for info in infos.values())
    meter = Meter(needed, progress)
    metadata = _metadata(found, infos)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_space(path.parent, needed, "the adapter")
        with new_file(path.parent) as (new, _):
            write_safetensors(new, infos, (x for _, x in _tensors(found)), metadata, meter.add)
            if not put(new, path, replace=force):
                raise InputError(f"{path} exists; choose another name or pass force=True to replace it")
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}") from error
    return path


def saving_notes(found: AdapterFile) -> list[str]:
    """What a user should know of a file that `save_adapter` has written: a sentence each, without a full stop."""
    notes = []
    if others := [kind for kind in found.kinds if kind not in (LORA, "DoRA")]:
        notes.append(f"{' and '.join(others)} became LoRA factors of the same product, whose rank is higher")
    if any(where.network == TEXT for where in found.places.values()):
        notes.append("diffusers reads no adapters of FLUX.2's text encoder, which are in the file nevertheless")
    if not found.models:
        notes.append("it is for no model that is known here: none has all of its layers in these sizes")
    if found.unknown:
        notes.append(f"{len(found.unknown)} tensors that change no layer were left out, such as {found.unknown[0]:.80}")
    return notes


def _check_free(path: Path, force: bool) -> None:
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise InputError(f"{path} is no file; choose another name")
    if path.exists() and not force:
        raise InputError(f"{path} exists; choose another name or pass force=True to replace it")
    check_writable(path)


def _check_config(path: Path) -> None:
    """InputError if a config of PEFT beside the new file would be about it as well, or no longer about another one."""
    names = names_beside(path) if path.parent.is_dir() else []
    config = path.with_name(PEFT_CONFIG)
    if path.name == PEFT_MODEL and PEFT_CONFIG in names:
        raise InputError(f"PEFT would apply {config} to {path}; choose another name")
    others = [name for name in names if is_adapter(name) and name != path.name and is_config_of(name, names)]
    if lost := next((name for name in others if not is_config_of(name, {*names, path.name})), None):
        raise InputError(f"{config} is about {lost}, as no other adapter is there; choose another folder")


def _check_expressible(found: AdapterFile) -> None:
    """CheckpointError for what a config of PEFT, which is one for all layers, does not have."""
    modules = found.modules.values()
    if wrong := next((module for module in modules if module.kind is None), None):
        raise CheckpointError(f"{wrong.name} changes by a bias alone, which diffusers has no form of; {_HERE}")
    with_lengths = [module for module in modules if "magnitude" in module.keys]
    if with_lengths and len(with_lengths) < len(found.modules):
        raise CheckpointError(
            f"some layers of {found.path} are DoRA and others are not, which diffusers mixes up; {_HERE}"
        )
    if with_lengths and any({"bias", "diff_b"} & module.keys.keys() for module in modules):
        raise CheckpointError(f"{found.path} is DoRA with changes of biases, which diffusers refuses; {_HERE}")


def _tensors(found: AdapterFile) -> Iterator[tuple[str, mx.array]]:
    """What is written, in its order and not evaluated."""
    has_biases = any({"bias", "diff_b"} & module.keys.keys() for module in found.modules.values())
    for module, changes in found.read(found.modules):
        with mx.stream(READER):
            factors = _factors(module, [placed.change for placed in changes])
            if has_biases and factors.bias is None:  # PEFT wants all of them
                factors = replace(factors, bias=mx.zeros(len(factors.up), factors.up.dtype))
            for name, part in _diffusers(found.places[module], factors):
                yield from part.named(name)


def _factors(module: str, changes: list[Change]) -> _Factors:
    """All changes of one module."""
    biases = [_scaled(x.difference, x.scale) for x in changes if isinstance(x, BiasDifference)]
    bias = sum(biases[1:], biases[0]) if biases else None
    change = next(x for x in changes if not isinstance(x, BiasDifference))
    if not isinstance(change, Decomposed):
        return replace(_low_rank(change), bias=bias)
    if not change.by_row:
        raise CheckpointError(f"{module} is DoRA with lengths of columns, which diffusers has no form of; {_HERE}")
    return replace(_low_rank(change.change), magnitude=change.magnitude.flatten())


def _diffusers(where: Place, factors: _Factors) -> Iterator[tuple[str, _Factors]]:
    """The modules of diffusers that a layer of ours is, or a part of it, and the factors of each."""
    if where.network == TEXT:
        yield f"{TEXT}.model.{where.layer}", factors
        return
    template, numbers = templated(f"{where.layer}{_WEIGHT}")
    spelling = DIFFUSERS.table[template][0]
    names = [f"{TRANSFORMER}.{filled(x, numbers).removesuffix(_WEIGHT)}" for x in spelling.templates]
    factors = factors.swapped() if spelling.rule is swap_halves else factors
    if where.parts > 1:
        yield names[where.part], factors
        return
    outputs = len(factors.up) // len(names)
    for part, name in enumerate(names):
        yield name, factors.rows(slice(part * outputs, (part + 1) * outputs))


def _low_rank(change: Delta) -> _Factors:
    """The same change as a LoRA."""
    product: tuple[mx.array, mx.array] | None = None
    match change:
        case LowRank():
            return _Factors(change.down, _scaled(change.up, change.scale))
        case Hadamard():
            a, b, c, d = (x.astype(mx.float32) for x in (change.w1a, change.w2a, change.w1b, change.w2b))
            product = (c[:, None] * d[None]).flatten(0, 1), (a[:, :, None] * b[:, None]).flatten(1)
        case Kronecker():
            (a, b), (c, d) = _pair(change.w1), _pair(change.w2)
            product = mx.kron(b, d), mx.kron(a, c)
    if product is not None and len(product[0]) < min(change.shape):
        return _Factors(product[0], change.scale * product[1])
    plain = isinstance(change, Difference) and change.scale == 1
    up, down = _apart(change.difference if plain else change.weight())  # type: ignore[union-attr]
    return _Factors(down, up)


def _pair(factor: Factor) -> tuple[mx.array, mx.array]:
    """Two matrices in float32 that a factor is the product of."""
    a, b = _apart(factor) if isinstance(factor, mx.array) else factor
    return a.astype(mx.float32), b.astype(mx.float32)


def _apart(matrix: mx.array) -> tuple[mx.array, mx.array]:
    """A matrix and the identity, in the order in which the rank is the lower one."""
    outputs, inputs = matrix.shape
    if outputs <= inputs:
        return mx.eye(outputs, dtype=matrix.dtype), matrix
    return matrix, mx.eye(inputs, dtype=matrix.dtype)


def _scaled(array: mx.array, scale: float) -> mx.array:
    """`scale` times an array, in its dtype where that rounds nothing."""
    if scale == 1:
        return array
    exact = array.dtype != mx.float16 and abs(math.frexp(scale)[0]) == 0.5
    scaled = scale * array.astype(mx.float32)
    return scaled.astype(array.dtype) if exact else scaled


def _metadata(found: AdapterFile, infos: dict[str, TensorInfo]) -> dict[str, str]:
    """What the header says: the config of PEFT by which diffusers loads the file, and what was said of it before."""
    said: dict[str, Any] = {}
    for network in (TRANSFORMER, TEXT):
        ranks = {
            name.removeprefix(f"{network}.").removesuffix(".lora_A.weight"): info.shape[0]
            for name, info in infos.items()
            if name.startswith(f"{network}.") and name.endswith(".lora_A.weight")
        }
        if ranks:
            said |= {f"{network}.{key}": value for key, value in _config(ranks, infos).items()}
    titles = {"modelspec.title": found.said.title, "modelspec.trigger_phrase": ", ".join(found.said.trigger_words)}
    titles["base_model"] = next(iter(found.said.bases), None)
    named = {key: plain for key, text in titles.items() if text and (plain := _plain(text))}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(said, indent=2, sort_keys=True)} | named


def _plain(text: str) -> str:
    """What can be shown of a text, in one line: whoever reads the file may print it as it is."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


def _config(ranks: dict[str, int], infos: dict[str, TensorInfo]) -> dict[str, Any]:
    """What PEFT calls a LoraConfig; alpha is the rank everywhere, so that nothing is multiplied once more."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: other for name, other in ranks.items() if other != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_dora": any(name.endswith("lora_magnitude_vector") for name in infos),
        "lora_bias": any(name.endswith("lora_B.bias") for name in infos),
    }
