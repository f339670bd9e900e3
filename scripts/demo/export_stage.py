"""Assembly of the trained parts into a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from flow_stage import TextToVelocity, load_tokenizer
from geometry import IMAGE_SIDE, STEPS, TEXT_LAYERS, TEXT_LENGTH, build_scheduler, build_vae
from PIL import Image
from training import load_average
from vae_stage import load_vae


def assemble(work: Path, model: TextToVelocity) -> Flux2KleinPipeline:
    """The pipeline made of `model` and the autoencoder of `work` (an untrained one if there is none yet)."""
    vae = load_vae(work) if (work / "vae.pt").exists() else build_vae()
    pipeline = Flux2KleinPipeline(
        scheduler=build_scheduler(),
        vae=vae.eval(),
        text_encoder=model.text_encoder,
        tokenizer=load_tokenizer(work),
        transformer=model.transformer,
        is_distilled=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export(work: Path, output: Path) -> None:
    """Writes the averaged weights of `work` as a diffusers folder; untrained parts stay as they are initialised."""
    torch.manual_seed(0)
    model = TextToVelocity(load_tokenizer(work))
    trained = [work / name for name in ("flow.pt", "edit.pt") if (work / name).exists()]
    if trained:
        load_average(trained[-1], model)
    assemble(work, model).save_pretrained(output)


@torch.no_grad()
def generate(
    pipeline: Flux2KleinPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    image: Image.Image | None = None,
    steps: int = STEPS,
) -> list[Image.Image]:
    """One 128 x 128 picture for each prompt and seed, by the reference pipeline; `image` is edited if given."""
    return pipeline(
        image=None if image is None else [image],
        prompt=list(prompts),
        height=IMAGE_SIDE,
        width=IMAGE_SIDE,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        max_sequence_length=TEXT_LENGTH,
        text_encoder_out_layers=TEXT_LAYERS,
    ).images
