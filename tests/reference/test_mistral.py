"""The language models against transformers: dev's text encoder, logits, and text generated with and without images.

The weights go through a saved source and our converter.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.checkpoints import DEV_TEXT, VARIANT, convert, write_tokenizer
from helpers.parity import NETWORK, random_tensor, relative_error
from helpers.references import make_dev_source, save_small, small_pipeline
from PIL import Image
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.text import LanguageModel, TextEncoder
from flux2_mlx.text.generation import embed, generate, image_placeholder
from flux2_mlx.text.pixtral import preprocess
from flux2_mlx.text.prompts import UPSAMPLE_I2I, mistral_image_chat

LENGTH, PAD, NEW_TOKENS = 24, 11, 32
NO_END: frozenset[int] = frozenset()


class Pair:
    """A reference language model and the converted checkpoint made from it."""

    def __init__(self, reference: torch.nn.Module, folder: Path):
        self.reference, self.checkpoint = reference, Checkpoint.open(folder)
        self.reference.generation_config.eos_token_id = None  # so that every answer has the full length

    def load(self, name: str) -> Any:
        return self.checkpoint.components[name].load(mx.float32)

    def language_model(self) -> LanguageModel:
        return LanguageModel(self.load("text_encoder"), self.load("language_model"))

    def continuation(self, ids: list[int], **images: Any) -> list[int]:
        """The likeliest tokens after `ids` by the reference."""
        tokens, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD}
        out = self.reference.generate(input_ids=tokens, attention_mask=mask, **settings, **images)
        return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("dev")
    reference = make_dev_source(folder / "official").text_encoder
    return Pair(reference, convert(folder / "official", folder / "converted", variant="dev"))


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("klein")
    reference = small_pipeline(write_tokenizer(folder / "tokenizer")).text_encoder
    return Pair(reference, convert(save_small(folder / "official"), folder / "converted", variant=VARIANT))


@pytest.fixture(params=["dev", "klein"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def encoder(dev: Pair) -> TextEncoder:
    return dev.load("text_encoder")


def token_ids(*real: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids with `real` tokens in each row, padded on the left, and their mask."""
    ids = np.random.default_rng(0).integers(20, 275, (len(real), LENGTH), dtype=np.int32)
    mask = np.arange(LENGTH) >= LENGTH - np.array(real)[:, None]
    return np.where(mask, ids, PAD).astype(np.int32), mask


@pytest.mark.parametrize("real", [(LENGTH,), (1,), (9,), (LENGTH, 5), (7, 13)], ids=str)
def test_hidden_states(real, dev, encoder):
    """The rows of padding see nothing; PyTorch's fused attention, the reference's default, gives zero there."""
    assert dev.reference.config._attn_implementation == "sdpa"
    ids, mask = token_ids(*real)
    states = dev.reference(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask, dtype=torch.long), output_hidden_states=True
    ).hidden_states
    got = np.array(encoder(mx.array(ids), mx.array(mask)))
    assert got.shape == (len(real), LENGTH, DEV_TEXT.output_size)
    for number, layer in enumerate(DEV_TEXT.out_layers):
        ours = got[..., number * DEV_TEXT.hidden_size : (number + 1) * DEV_TEXT.hidden_size]
        expected = states[layer].numpy()
        assert relative_error(ours[mask], expected[mask]) <= NETWORK
        if not mask.all():
            assert relative_error(ours[~mask], expected[~mask]) <= NETWORK


def test_logits(pair):
    ids = token_ids(LENGTH, LENGTH)[0]
    ours, expected = pair.language_model()(mx.array(ids)), pair.reference(input_ids=torch.tensor(ids)).logits
    error = relative_error(ours, expected)
    print(f"relative error of the logits: {error:.1e}")
    assert error <= NETWORK


def test_generated_text(pair):
    ids = token_ids(LENGTH)[0][0].tolist()
    ours = list(generate(pair.language_model(), ids, NO_END, temperature=0, max_tokens=NEW_TOKENS))
    assert ours == pair.continuation(ids)
    assert len(ours) == NEW_TOKENS
    assert len(set(ours)) > 8


def test_an_end_token_ends_the_text(klein):
    model, ids = klein.language_model(), token_ids(LENGTH)[0][0].tolist()
    whole = list(generate(model, ids, NO_END, temperature=0, max_tokens=16))
    end = whole[5]
    assert list(generate(model, ids, frozenset({end}), temperature=0, max_tokens=16)) == whole[: whole.index(end)]


@pytest.mark.parametrize("sizes", [[(90, 50)], [(300, 120), (56, 84)]], ids=str)
def test_generated_text_with_images(sizes, dev):
    images = [
        Image.fromarray((random_tensor(height, width, 3, seed=width).abs().clamp(0, 1) * 255).byte().numpy())
        for width, height in sizes
    ]
    config = dev.checkpoint.components["vision"].config
    edge = {"longest_edge": config.image_size}
    cell = {"height": config.cell_size, "width": config.cell_size}
    inputs = PixtralImageProcessorPil(size=edge, patch_size=cell)(images, return_tensors="pt")
    cells = [[int(side) // config.cell_size for side in size] for size in inputs["image_sizes"]]
    placeholders = [image_placeholder(*size) for size in cells]
    tokenizer, model = dev.checkpoint.tokenizer, dev.language_model()
    ids = tokenizer.encode(mistral_image_chat("hello", UPSAMPLE_I2I, placeholders))
    assert ids.count(tokenizer.image_id) == sum(height * width for height, width in cells)
    vision = dev.load("vision")
    features = [vision(mx.array(preprocess(image, config))) for image in images]
    embeddings = embed(model, ids, features, tokenizer.image_id)
    ours = list(generate(model, ids, NO_END, embeddings=embeddings, temperature=0, max_tokens=NEW_TOKENS))
    expected = dev.continuation(ids, pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"])
    assert len(ours) == NEW_TOKENS
    assert ours == expected
    assert len(set(ours)) > 8
    assert ours[:8] != list(generate(model, ids, NO_END, temperature=0, max_tokens=8))
