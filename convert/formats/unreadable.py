"""Quantizations that can't be read: what they are, and what to fetch instead."""

from collections.abc import Iterable, Mapping
from typing import Any

_INSTEAD = "fetch a bf16, fp8 or GGUF file of the model"
# By what its users call it: what names of tensors end with, and `quant_method`s of a config.
_FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "SVDQuant for nunchaku": ((".wscales", ".wcscales", ".smooth_factor", ".smooth_factor_orig"), ("svdquant",)),
    "DFloat11": ((".encoded_exponent", ".sign_mantissa"), ("dfloat11",)),
    "SDNQ": ((".svd_up", ".zero_point", ".scale_zero_point", ".zero_point_scale"), ("sdnq", "sdnq_training")),
    "AutoRound": ((), ("auto-round", "autoround", "intel/auto-round")),
    "HQQ or gemlite": ((".W_q",), ("hqq",)),
    "compressed-tensors": ((".weight_packed",), ("compressed-tensors",)),
    "GPTQ or AWQ": ((".qweight", ".qzeros", ".g_idx"), ("gptq", "awq", "gptqmodel")),
}
_CONFIGS = {"dfloat11_config": "DFloat11", "svdquant": "SVDQuant for nunchaku"}


def unreadable(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """What tensors of these names are quantized as and what to fetch instead, or None.

    Args:
        names: of tensors, in any naming.
        config: the `config.json` beside them, or what metadata says in its place; it may be empty.
    """
    family = _by_config(config) or _by_names(names)
    return None if family is None else f"quantized as {family}, which can't be read; {_INSTEAD}"


def _by_config(config: Mapping[str, Any]) -> str | None:
    for key, family in _CONFIGS.items():
        if key in config:
            return family
    said = config.get("quantization_config", config.get("compression_config"))
    if not isinstance(said, dict):
        return None
    method = str(said.get("quant_method", said.get("method", ""))).casefold()
    return next((family for family, (_, methods) in _FAMILIES.items() if method in methods), None)


def _by_names(names: Iterable[str]) -> str | None:
    names = frozenset(names)
    for family, (endings, _) in _FAMILIES.items():
        if any(name.endswith(endings) for name in names):
            return family
    # The scale of a norm is its weight.
    layers = (name.removesuffix(".scale") for name in names if name.endswith(".scale"))
    return "SDNQ" if any(f"{x}.weight" in names and not x.endswith("norm") for x in layers) else None
