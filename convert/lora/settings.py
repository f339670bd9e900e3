"""What an adapter says of itself beside its tensors: how strong its changes are, who trained it, and on what."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flux2_mlx.errors import CheckpointError
from flux2_mlx.json_files import parse_json

from .keys import NOT_RUN
from .patterns import Patterns

DIFFUSERS = "lora_adapter_metadata"
ALPHA = "lora_alpha"
# Several times what all layers of a model take, and the dataset's tags.
_MAX_JSON = 1_000_000
_MAX_TEXT = 500
_MAX_WORDS = 20
_ROLES = {"use_dora": "magnitude", "lora_bias": "bias"}
_TYPES = ("LORA", "LOKR", "LOHA")
# Inits that take what the factors begin with out of the base's weights. PEFT undoes it for those of the first line.
_RESIDUAL = ("pissa", "olora", "corda", "lora_ga")
_QUANTIZED = "loftq"
# Kinds of LoRA that PEFT computes otherwise, though their tensors may be called like those of others.
_VARIANTS = {"use_bdlora": "BD-LoRA", "kasa_config": "KaSA", "use_qalora": "QALoRA", "arrow_config": "Arrow"}
_VARIANTS |= {"alora_invocation_tokens": "aLoRA"}
_USUAL_ALPHA = 8.0  # of PEFT
_SWITCHED = {"true": True, "1": True, "false": False, "0": False, "none": False}
_TRIGGERS = ("modelspec.trigger_phrase", "trigger_word", "trigger_words", "trigger_phrase", "instance_prompt")
_NO_WORDS = ("", "none", "null")  # that trainers write for no words
_TITLES = ("modelspec.title", "ss_output_name", "name")
# Not `ss_base_model_version`: ai-toolkit calls a base model as its distilled one is called.
_BASES = ("modelspec.architecture", "base_model", "base_model_name_or_path", "ss_sd_model_name")


@dataclass(frozen=True)
class Strength:
    """By what the changes of a network are multiplied, as a config of PEFT says it.

    Attributes:
        rank, alpha: those of all layers but the following; None: not said.
        ranks, alphas: those of some layers.
        is_root: whether alpha is divided by the root of the rank.
        roles: what every LoRA has besides its two factors, such as a magnitude.
    """

    rank: int | None = None
    alpha: float | None = None
    ranks: Patterns = field(default_factory=Patterns)
    alphas: Patterns = field(default_factory=Patterns)
    is_root: bool = False
    roles: frozenset[str] = frozenset()

    def scale(self, module: str, rank: int | None) -> float:
        """The factor of a module whose factors are of such a rank; None: they are whole matrices.

        Raises:
            CheckpointError: another rank is said.
        """
        said = self.ranks.value(module, self.rank)
        if None not in (said, rank) and said != rank:
            raise CheckpointError(f"{module} is of rank {rank}, but its config says {said:g}; fetch the adapter again")
        alpha = self.alphas.value(module, self.alpha)
        divisor = said if rank is None else rank
        if alpha is None or not divisor:
            return 1.0
        return alpha / (math.sqrt(divisor) if self.is_root else divisor)


@dataclass(frozen=True)
class Settings:
    """What the header of a file, and a config beside it, say.

    Attributes:
        strengths: by the network.
        trainer: which program made it, as far as that is known.
        title: what it is called, or None.
        trigger_words: what a prompt needs for it, as far as its trainer wrote it.
        bases: what it was trained on, in the words of its trainer; empty if not said.
    """

    strengths: Mapping[str, Strength]
    trainer: str | None
    title: str | None
    trigger_words: tuple[str, ...]
    bases: tuple[str, ...]


def settings(metadata: Mapping[str, str], config: Mapping[str, Any] | None) -> Settings:
    """What is said.

    Args:
        metadata: the texts of the file's header.
        config: what `adapter_config.json` holds, or None.

    Raises:
        CheckpointError: ranks or factors are said that are no such numbers, or the file is of a kind that is not run.
    """
    said = dict(config) if config is not None else _object(metadata, DIFFUSERS)
    strengths = {name: _strength(_of_network(said, name)) for name in ("transformer", "text_encoder")}
    if not said and ALPHA in metadata:
        plain = Strength(_rank(metadata.get("lora_rank")), _number(ALPHA, metadata[ALPHA]))
        strengths = dict.fromkeys(strengths, plain)
    texts = {key: text[:_MAX_TEXT] for key, text in metadata.items()}
    base = [texts.get(key) or said.get(key) for key in _BASES]
    return Settings(
        strengths,
        _trainer(metadata, said, config),
        next((texts[key] for key in _TITLES if texts.get(key)), None),
        tuple(dict.fromkeys(_triggers(metadata)))[:_MAX_WORDS],
        tuple(text[:_MAX_TEXT] for text in base if isinstance(text, str)),
    )


def _of_network(said: Mapping[str, Any], network: str) -> dict[str, Any]:
    """The config of one network: its keys begin with its name, or with no name at all."""
    start = f"{network}."
    own = {key.removeprefix(start): value for key, value in said.items() if key.startswith(start)}
    return own or {key: value for key, value in said.items() if "." not in key}


def _strength(said: Mapping[str, Any]) -> Strength:
    kind = said.get("peft_type", _TYPES[0])
    if kind not in _TYPES:
        raise CheckpointError(f"it is an adapter of the kind {kind!s:.40}; only LoRA, LoKr and LoHa are run")
    if variant := next((name for key, name in _VARIANTS.items() if said.get(key) not in (None, False, [])), None):
        raise CheckpointError(NOT_RUN.format(variant))
    if _is_on(said, "fan_in_fan_out"):
        raise CheckpointError("its config says fan_in_fan_out, which no layer of FLUX.2 is")
    _check_init(said.get("init_lora_weights"))
    rank = _rank(said.get("r"))
    alpha = said.get("lora_alpha", said.get("alpha"))
    usual = None if rank is None else _USUAL_ALPHA
    return Strength(
        rank,
        usual if alpha is None else _number("lora_alpha", alpha),
        _table(said, "rank_pattern", lambda value: _rank(value) or 0),
        _table(said, "alpha_pattern", partial(_number, "alpha_pattern")),
        _is_on(said, "use_rslora"),
        frozenset(role for key, role in _ROLES.items() if _is_on(said, key)),
    )


def _check_init(init: Any) -> None:
    """CheckpointError if the factors belong to other weights than those of the base."""
    if not isinstance(init, str) or not init.lower().startswith((*_RESIDUAL, _QUANTIZED)):
        return
    way = "save it with PEFT's path_initial_model_for_weight_conversion, which gives a plain LoRA"
    if init.lower().startswith(_QUANTIZED):
        way = "give one that was trained with another init"
    raise CheckpointError(f"its init_lora_weights is {init:.40}, which changes the weights of the base model; {way}")


def _table(said: Mapping[str, Any], key: str, number: Callable[[Any], float]) -> Patterns:
    value = said.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"its {key} is no table of layers")
    return Patterns.of(key, {pattern: number(x) for pattern, x in value.items()})


def _is_on(said: Mapping[str, Any], key: str) -> bool:
    """What a switch says, also as a text or a number; CheckpointError if that is neither yes nor no."""
    text = str(said.get(key)).lower()
    if text not in _SWITCHED:
        raise CheckpointError(f"its {key} is {text:.40}, which is neither true nor false")
    return _SWITCHED[text]


def _rank(value: Any) -> int | None:
    number = None if value is None else _number("rank", value)
    if number is not None and (number != int(number) or number < 1):
        raise CheckpointError(f"its config says a rank of {number:g}, which is none")
    return number if number is None else int(number)


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise CheckpointError(f"its {name} is {value!s:.40}, which is no finite number")
    return number


def _object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """What the JSON of an entry says; CheckpointError if it is no object."""
    text = metadata.get(key, "{}")
    try:
        if len(text) > _MAX_JSON:
            raise ValueError(f"it has more than {_MAX_JSON} characters")
        value = parse_json(text.encode(), unique=True)
    except ValueError as error:
        raise CheckpointError(f"its {key} can't be read: {error!s:.200}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"its {key} holds no JSON object")
    return value


def _said(metadata: Mapping[str, str], key: str) -> Any:
    """What an entry says that nothing depends on; nothing if it can't be read."""
    try:
        return _object(metadata, key)
    except CheckpointError:
        return {}


def _trainer(metadata: Mapping[str, str], said: Mapping[str, Any], config: object) -> str | None:
    if isinstance(name := _said(metadata, "software").get("name"), str):
        return name[:_MAX_TEXT]
    module = metadata.get("ss_network_module", "")
    for start, name in (("lycoris", "LyCORIS"), ("networks.lora_flux_2", "musubi-tuner"), ("networks.", "kohya")):
        if module.startswith(start):
            return name
    if "ot_branch" in metadata:
        return "OneTrainer"
    return "PEFT" if config is not None else "diffusers" if said else None


def _triggers(metadata: Mapping[str, str]) -> Iterator[str]:
    """Words that a prompt needs. Of the tags of pictures they are, where all pictures have the same one."""
    for key in _TRIGGERS:
        words = (word.strip() for word in _listed(metadata.get(key, "")))
        yield from (word[:_MAX_TEXT] for word in words if word.casefold() not in _NO_WORDS)
    tables = [table for table in _said(metadata, "ss_tag_frequency").values() if isinstance(table, dict)]
    if len(tags := {tag.strip() for table in tables for tag in table}) == 1:
        yield tags.pop()[:_MAX_TEXT]


def _listed(text: str) -> list[str]:
    """The texts of a JSON list, or the text itself."""
    try:
        found = parse_json(text.encode()) if text.lstrip().startswith("[") else None
    except ValueError:
        found = None
    return [word for word in found if isinstance(word, str)] if isinstance(found, list) else [text]
