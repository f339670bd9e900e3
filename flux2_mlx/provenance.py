"""What the file of an image remembers of how it was made."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .device import dtype_name, machine
from .networks import Networks
from .references import Edit
from .sampling import Request


def image_settings(
    networks: Networks,
    model: str,
    request: Request,
    edit: Edit,
    place: int,
    *,
    asked: str | None = None,
    edited: dict[str, Any] | None = None,
    beyond: Sequence[str] = (),
) -> dict[str, Any]:
    """All that is needed to make an image again; of files and folders their names only.

    Args:
        networks: what computed it.
        model: what the model was asked for as.
        request: the settings.
        edit: the pictures.
        place: the image's among those of the run.
        asked: the prompt before it was rewritten; None: it was not.
        edited: where the pictures come from and what is done with them.
        beyond: names of arguments that no file can hold, so that the image can't be made again from it.
    """
    number, (width, height) = place // request.images_per_prompt, edit.output_size(request.width, request.height)
    prompt = request.prompts[number]
    negative = request.negative_prompts[number] if request.negative_prompts else ""
    return {
        "prompt": prompt if asked is None else asked,
        "upsampled_prompt": prompt if asked not in (None, prompt) else None,
        **({"negative_prompt": negative} if negative else {}),
        "model": Path(model).name if os.path.isdir(model) else model,
        "quant": networks.quant,
        "text_quant": networks.text_quant,
        "dtype": dtype_name(networks.dtype),
        "width": width,
        "height": height,
        "steps": request.steps,
        "guidance": request.guidance,
        "seed": request.seeds[place],
        **({} if edited is None else {"edit": edited}),
        **({"beyond": list(beyond)} if beyond else {}),
        "variant": networks.checkpoint.variant.name,
        "fingerprint": networks.checkpoint.source.get("fingerprint"),
        "version": __version__,
        "machine": machine(),
    }
