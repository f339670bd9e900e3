"""Runs of dev against diffusers' `Flux2Pipeline`, its system messages, and prompts with the real tokenizer."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline as Reference
from diffusers.pipelines.flux2 import system_messages
from helpers.checkpoints import convert
from helpers.parity import NETWORK, relative_error
from helpers.references import make_dev_source

from flux2_mlx import Flux2Pipeline
from flux2_mlx.text import DevTokenizer, prompts

CAT, FOX = "A cat holding a sign that says hello world", "一只狐狸 🦊 [IMG] в снегу"
LENGTH = 260  # both prompts fit; the system message takes 168 of our byte tokens
SETTINGS = {"height": 48, "width": 80, "num_inference_steps": 4}
# fmt: off
GOLDEN = [
    1, 17, 4568, 1584, 1420, 26554, 1455, 12738, 2314, 3937, 38340, 1046, 3213, 5628, 37253, 11688, 30557, 1408, 3481,
    14608, 1044, 3481, 1010, 2452, 5604, 1321, 10636, 3816, 67813, 1046, 18, 3, 1065, 7990, 14234, 1261, 2287, 1455,
    8223, 52528, 4304, 4,
]
# fmt: on


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Flux2Pipeline]:
    folder = tmp_path_factory.mktemp("dev")
    reference = make_dev_source(folder / "official")
    converted = convert(folder / "official", folder / "converted", variant="dev")
    return reference, Flux2Pipeline.from_pretrained(converted, dtype="float32")


@pytest.fixture(scope="module")
def embeds(pair) -> torch.Tensor:
    """What the reference's text encoder makes of our token ids."""
    reference, ours = pair
    ids, mask = ours.tokenizer([CAT, FOX], LENGTH)
    with torch.no_grad():
        states = reference.text_encoder(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long(), output_hidden_states=True
        ).hidden_states
    return torch.cat([states[layer] for layer in (10, 20, 30)], dim=-1)


def test_encode_prompt(pair, embeds):
    ours = pair[1].encode_prompt([CAT, FOX], max_sequence_length=LENGTH)
    assert relative_error(ours, embeds) <= NETWORK


@pytest.mark.parametrize("guidance", [4.0, 2.5])
@pytest.mark.parametrize("prompt", [CAT, FOX])
def test_images(prompt, guidance, pair, embeds):
    reference, ours = pair
    row = [CAT, FOX].index(prompt)
    settings = {**SETTINGS, "guidance_scale": guidance}

    tokens: dict[object, Any] = {}

    def keep(pipe: object, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tokens[pipe] = tensors["latents"]
        return {}

    def theirs(kind: str) -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(3)
        given = {"prompt_embeds": embeds[row : row + 1], "generator": generator, "callback_on_step_end": keep}
        return np.array(reference(output_type=kind, **given, **settings).images[0])

    def mine(kind: str) -> np.ndarray:
        given = {"seed": 3, "max_sequence_length": LENGTH, "callback_on_step_end": keep}
        return np.array(ours(prompt, output_type=kind, **given, **settings).images[0])

    images, expected = mine("np"), theirs("np")
    error = relative_error(tokens[ours], tokens[reference])
    print(f"relative error of the latents: {error:.1e}")
    assert error <= 1e-3
    assert expected.std() > 0.05
    assert np.abs(images - expected).max() <= 1e-3
    assert np.abs(mine("pil").astype(int) - theirs("pil").astype(int)).max() <= 1


def test_guidance_and_prompts_change_the_image(pair):
    settings = {**SETTINGS, "num_inference_steps": 2, "max_sequence_length": LENGTH, "seed": 3, "output_type": "np"}
    image = pair[1](CAT, guidance_scale=4.0, **settings).images
    assert np.abs(image - pair[1](CAT, guidance_scale=2.5, **settings).images).max() > 0.01
    assert np.abs(image - pair[1](FOX, guidance_scale=4.0, **settings).images).max() > 0.01


def test_system_messages():
    assert prompts.ENCODE == system_messages.SYSTEM_MESSAGE
    assert prompts.UPSAMPLE_T2I == system_messages.SYSTEM_MESSAGE_UPSAMPLING_T2I
    assert prompts.UPSAMPLE_I2I == system_messages.SYSTEM_MESSAGE_UPSAMPLING_I2I


@pytest.fixture(scope="module")
def tekken(mistral_tokenizer_file: Path) -> DevTokenizer:
    return DevTokenizer(mistral_tokenizer_file)


def test_golden_ids(tekken):
    ids, mask = tekken([CAT], 512)
    assert ids[0].tolist() == [11] * (512 - len(GOLDEN)) + GOLDEN
    assert mask[0].tolist() == [False] * (512 - len(GOLDEN)) + [True] * len(GOLDEN)
    assert tekken.count(CAT) == len(GOLDEN)


def test_special_tokens_and_padding(tekken):
    assert (tekken.image_id, tekken.end_ids) == (10, {2})
    ids, mask = tekken(["a red fox", "[IMG]a[IMG] red fox", "word " * 600], 64)
    assert ids[0].tolist() == ids[1].tolist()
    assert ids[0, -1] == 4
    assert ids[0, 0] == 11
    assert mask[2].all()
    assert ids[2, :31].tolist() == GOLDEN[:31]
    assert 4 not in ids[2].tolist()


@pytest.mark.parametrize("text", [CAT, "一只狐狸 🦊 в снегу", "  two  spaces\n\ttab", "1234567890 3.14159 don't"])
def test_text_comes_back(text, tekken):
    assert tekken.decode(tekken.encode(text)) == text
    assert tekken.decode([1, *tekken.encode(text), 2]) == text


def test_images_stand_in_rows_of_cells(tekken):
    chat = prompts.mistral_image_chat("what [IMG] now", "S", ["[IMG][IMG][IMG_BREAK][IMG][IMG][IMG_END]"])
    ids = tekken.encode(chat)
    assert ids[:2] == [1, 17]
    end = ids.index(18)
    assert ids[end + 1 : end + 10] == [3, 10, 10, 12, 10, 10, 13, 4, 3]
    assert ids.count(10) == 4
    assert ids[-1] == 4


def test_states_of_a_prompt_do_not_depend_on_its_padding(pair):
    ours = pair[1]
    count = ours.tokenizer.count(CAT)
    short, long = (ours.encode_prompt(CAT, max_sequence_length=length) for length in (count, count + 40))
    assert relative_error(short, mx.array(long)[:, -count:]) <= NETWORK
