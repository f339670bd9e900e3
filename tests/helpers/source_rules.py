"""How our tensors are made of a model that diffusers and transformers have saved."""

from collections.abc import Callable
from typing import Any

from flux2_mlx.convert.dialects import DIFFUSERS
from flux2_mlx.convert.naming import Reading
from flux2_mlx.convert.parts import LAYOUT
from flux2_mlx.convert.rules import Rule

from flux2_mlx.components import COMPONENTS


def rules_for(network: str, config: Any) -> Callable[[str, tuple[int, ...]], Rule]:
    """What gives the rule of our tensor of a name and a shape."""
    if network == DIFFUSERS.part:
        return Reading(DIFFUSERS, "", {}).rules_for(network, config)
    return LAYOUT[COMPONENTS[network].part].rules[network](config)  # canonical names are theirs
