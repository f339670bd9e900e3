"""What the files beside a `tokenizer.json` say of how a prompt becomes ids.

Source: transformers' `TokenizersBackend`, which reads dev's tokenizer, and `Qwen2Tokenizer`, which is made of it. A key
that is not named here changes nothing there: `add_bos_token` and `add_eos_token`, for one, are dropped where there is a
`tokenizer.json`, whose own post-processor adds what is added.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, InputError
from ..files import read_bytes
from ..json_files import read_json

CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_TEMPLATE, _OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
_MAX_TEMPLATE = 1 << 20  # bytes; those of released models have a few thousand
_SIDES = {"left": True, "right": False, None: None}
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Keys that change the result, with the values that do what FLUX.2 does.
FIXED: dict[str, tuple[Any, ...]] = {
    "split_special_tokens": (False, None),
    "init_inputs": (None, []),
    "post_processor": (None,),
    "tokenizer_padding": (None,),
    "tokenizer_truncation": (None,),
}


class TokenizerSettings(NamedTuple):
    """What is stated beside a tokenizer; None where it is not.

    Tokens are as `tokenizers.AddedToken` takes them: `listed` ones with all of their flags, `named` ones by their key.
    """

    named: dict[str, dict[str, Any] | None]
    listed: list[dict[str, Any]]
    more: list[dict[str, Any]]
    pads_left: bool | None
    cuts_left: bool | None
    template: tuple[Path, str] | None


def read_settings(folder: Path, fixed: Mapping[str, tuple[Any, ...]]) -> TokenizerSettings:
    """What the files of `folder` state; `fixed` are further keys of a family that must have one of these values.

    Raises:
        CheckpointError: one of them can't be read, or asks for what is not implemented.
    """
    path = folder / CONFIG
    values = read_json(path) if path.exists() else {}
    if "added_tokens_decoder" not in values and (folder / _SPECIAL_TOKENS).exists():
        values |= read_json(folder / _SPECIAL_TOKENS)
    for key, allowed in {**FIXED, **fixed}.items():
        if values.get(key) not in allowed:
            raise CheckpointError(
                f"{path}: {key} is {reprlib.repr(values[key])}, FLUX.2 has {allowed[0]!r}, and nothing else is "
                "implemented"
            )
    more = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    named = {key: value for key, value in values.items() if _is_named_token(key, value)}
    if isinstance(more, dict):
        named = named | more
        more = []
    listed = values.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not isinstance(more, list) or not all(key.isdecimal() for key in listed):
        raise CheckpointError(f"{path}: added_tokens_decoder or extra_special_tokens are no tokens")
    return TokenizerSettings(
        {key: None if value is None else _token(key, value, path) for key, value in named.items()},
        [_token("added_tokens_decoder", listed[key], path) for key in sorted(listed, key=int)],
        [_token("extra_special_tokens", value, path) for value in more],
        _side("padding_side", values, path),
        _side("truncation_side", values, path),
        _template(folder, values),
    )


def _is_named_token(key: str, value: Any) -> bool:
    marked = isinstance(value, str) or (isinstance(value, dict) and "__type" in value)
    return key in _NAMED or (key.endswith("_token") and marked)


def _token(key: str, value: Any, path: Path) -> dict[str, Any]:
    content = value.get("content") if isinstance(value, dict) else value
    flags = {flag: value[flag] for flag in _FLAGS if flag in value} if isinstance(value, dict) else {}
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise CheckpointError(f"{path}: {reprlib.repr(key)} is {reprlib.repr(value)}, which is no token")
    return {"content": content, **flags}


def _side(key: str, values: dict[str, Any], path: Path) -> bool | None:
    """Whether `values` state the left side under `key`; None if they state no side."""
    side = values.get(key)
    if not isinstance(side, str | None) or side not in _SIDES:
        raise CheckpointError(f"{path}: {key} is {reprlib.repr(side)}, neither 'left' nor 'right'")
    return _SIDES[side]


def _template(folder: Path, values: dict[str, Any]) -> tuple[Path, str] | None:
    """The chat template and the file it stands in. One in a file of its own comes first."""
    path = next(filter(Path.exists, (folder / _TEMPLATE, folder / _OLD_TEMPLATE)), folder / CONFIG)
    if path.name == _TEMPLATE:
        template: Any = _own_template(path)
    else:
        template = (values if path.name == CONFIG else read_json(path)).get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
        if template is None:
            raise CheckpointError(f"{path}: none of the chat templates is the default")
    if not isinstance(template, str | None):
        raise CheckpointError(f"{path}: chat_template is {reprlib.repr(template)}, which is no text")
    return None if template is None else (path, template)


def _own_template(path: Path) -> str:
    """The template that a file holds."""
    try:
        return read_bytes(path, _MAX_TEMPLATE).decode("utf-8")
    except (InputError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no chat template: {error}") from error
