"""What the file of an image remembers of how it was made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .branches import AtWork
from .decoders import Redecoded
from .device import dtype_name, machine
from .networks import Networks
from .references import Edit
from .request import Request


def sampled(request: Request, edit: Edit) -> dict[str, Any]:
    """What images of a run were made with besides prompts, seeds and weights."""
    width, height = edit.output_size(request.width, request.height)
    settings: dict[str, Any] = {"width": width, "height": height, "steps": request.steps, "guidance": request.guidance}
    if request.step_cache:
        settings |= {"step_cache": request.step_cache}
    if request.sigmas is None:
        return settings
    return settings | {"sigmas": list(request.sigmas), "shift_steps": request.shift_steps}


def weights(networks: Networks) -> dict[str, Any]:
    """What the networks are kept and computed in, and the decoder if it is not the model's own."""
    kept = {"quant": networks.quant, "text_quant": networks.text_quant, "dtype": dtype_name(networks.dtype)}
    vae = networks.checkpoint.components["vae"]
    return kept | ({"decoder": vae.decoder.settings} if isinstance(vae, Redecoded) and vae.decoder else {})


def adapters(networks: Networks) -> dict[str, Any]:
    """What is needed to find the adapters again and to use them so; nothing without any."""
    return {"adapters": [_adapter(one) for one in networks.adapters]} if networks.adapters else {}


def _adapter(one: AtWork) -> dict[str, Any]:
    found = one.adapter
    source = Path(found.source if found.origin is None else found.origin.partition(":")[2]).name
    told = {"name": found.name, "source": source, "sha256": found.sha256, "scale": one.scale}
    told |= {} if found.config is None else {"config": found.config}
    told |= {} if found.origin is None else {"origin": found.origin}
    return told | ({} if one.steps is None else {"steps": list(one.steps)})


def image_settings(
    networks: Networks,
    *,
    model: str,
    prompt: str,
    text: str,
    settings: Mapping[str, Any],
    seed: int,
    edited: dict[str, Any] | None = None,
    beyond: Sequence[str] = (),
) -> dict[str, Any]:
    """All that is needed to make an image again; of files and folders their names only.

    Args:
        networks: what computed it.
        model: the name of its model, which is no folder of this machine.
        prompt: as it was given.
        text: what was made of the prompt.
        settings: what `sampled` gives, and the `negative_prompt` if there is one.
        seed: the image's.
        edited: where the pictures come from and what is done with them.
        beyond: names of arguments that no file can hold, so that the image can't be made again from it.
    """
    from . import __version__  # which takes a while to be read

    return {
        "prompt": prompt,
        "upsampled_prompt": None if text == prompt else text,
        "model": model,
        **weights(networks),
        **settings,
        "seed": seed,
        **adapters(networks),
        **({} if edited is None else {"edit": edited}),
        **({"beyond": list(beyond)} if beyond else {}),
        "variant": networks.checkpoint.variant.name,
        "fingerprint": networks.checkpoint.source.get("fingerprint"),
        "version": __version__,
        "machine": machine(),
    }
