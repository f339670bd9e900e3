"""The inputs of a call of the pipeline, as diffusers takes them, put together for a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from PIL import Image

from . import arguments
from .checkpoint import Checkpoint
from .errors import InputError
from .references import Edit, whole_pixels
from .request import OnProgress, Progress, check_guided

# Arguments that the file of an image can't hold.
_BEYOND = "latents", "prompt_embeds", "negative_prompt_embeds", "max_sequence_length", "callback_on_step_end"


@dataclass(frozen=True)
class Prompts:
    """The prompts of a call: `texts`, which are empty where `embeds` `[prompts, L, C]` stand for them, and encoded
    negative prompts `[prompts, L, C]` if they are given so."""

    texts: list[str]
    embeds: mx.array | None
    negative_embeds: mx.array | None

    @classmethod
    def checked(
        cls, checkpoint: Checkpoint, prompt: Any, embeds: Any, negative_prompt: Any, negative_embeds: Any
    ) -> "Prompts":
        """From the arguments of a call; InputError says which one is wrong, or one too many."""
        if (prompt is None) == (embeds is None):
            raise InputError("give either prompt or prompt_embeds")
        features = checkpoint.components["text_encoder"].config.output_size
        if embeds is None:
            texts = arguments.texts("prompt", prompt)
        else:
            embeds = arguments.embeds("prompt_embeds", embeds, features)
            texts = [""] * len(embeds)
        if negative_embeds is not None:
            if negative_prompt is not None:
                raise InputError("give either negative_prompt or negative_prompt_embeds")
            check_guided(checkpoint.variant, "negative prompt")
            negatives = arguments.embeds("negative_prompt_embeds", negative_embeds, features)
            negative_embeds = arguments.for_each(texts, negatives)
        return cls(texts, embeds, negative_embeds)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a call with the mask of the first one, and what their settings remember of each."""

    images: list[Image.Image]
    mask: Image.Image | None
    origins: list[dict[str, str]]
    mask_origin: dict[str, str] | None

    @classmethod
    def opened(cls, image: Any, mask_image: Any) -> "Pictures":
        """From the arguments of a call; InputError says which one is wrong."""
        images, origins = arguments.pictures("image", image)
        masks, mask_origins = arguments.pictures("mask_image", mask_image, "black")
        if len(masks) > 1:
            raise InputError(f"{len(masks)} masks are too many; give one, of the size of the first image")
        return cls(images, masks[0] if masks else None, origins, mask_origins[0] if masks else None)

    def edit(self, token_size: int, strength: Any, padding_mask_crop: Any, match_colors: Any, output_type: Any) -> Edit:
        """The pictures as a run takes them, given arguments of a call; see `Edit.checked`."""
        on_canvas = strength is not None
        mask_crop = None if padding_mask_crop is None else whole_pixels("padding_mask_crop", padding_mask_crop)
        edit = Edit.checked(
            self.images, token_size, mask=self.mask, on_canvas=on_canvas, mask_crop=mask_crop, match_colors=match_colors
        )
        if match_colors and output_type != "pil":
            raise InputError(
                f"colours are matched in finished images; write output_type='pil', not {output_type!r:.40}"
            )
        return edit

    def settings(self, strength: Any, mask_crop: Any, match_colors: bool) -> dict[str, Any] | None:
        """What the file of an image remembers of the pictures and of what was done with them; None without any."""
        if not self.images:
            return None
        return {
            "images": self.origins,
            "strength": strength,
            "mask": self.mask_origin,
            "mask_crop": mask_crop,
            "extend": None,
            "match_colors": match_colors,
        }


def beyond(*values: Any) -> list[str]:
    """The names of those arguments of `_BEYOND` that were given, whose `values` are in the same order."""
    return [name for name, value in zip(_BEYOND, values, strict=True) if value is not None]


def listener(pipe: Any, callback: Any, show: Callable[[int, int], None]) -> OnProgress:
    """The `on_progress` of a run of `pipe`: it shows the steps, and calls the callback of a call after each."""
    if callback is not None and not callable(callback):
        raise InputError(f"callback_on_step_end must be a function, got {callback!r:.40}")

    def on_progress(progress: Progress) -> mx.array | None:
        if progress.step is None:
            return None
        show(progress.done, progress.total)
        if callback is None:
            return None
        step = progress.step
        returned = callback(pipe, step.number - 1, 1000 * step.from_sigma, {"latents": step.tokens})
        if not isinstance(returned, Mapping | None):
            raise InputError(f"a callback returned {type(returned).__name__}; give a dictionary of latents or None")
        return (returned or {}).get("latents")

    return on_progress
