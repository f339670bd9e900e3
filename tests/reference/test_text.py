"""The text encoder against transformers' `Qwen3ForCausalLM`, and prompts against the reference pipeline."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from helpers.parity import NETWORK, randomize, relative_error, transfer
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from flux2_mlx.config import TextConfig
from flux2_mlx.text import KleinTokenizer, TextEncoder

# Two layers more than are kept, and heads · head_dim ≠ hidden_size as in the released model.
LAYERS = 29
TINY = TextConfig("qwen3", 24, 40, 27, 97, (9, 18, 27), 4, 2, 16)
REAL_VOCABULARY = TextConfig("qwen3", 16, 24, 27, 151936, (9, 18, 27), 2, 1, 8)
LENGTH = 20


def networks(config: TextConfig, dtype=torch.float32, tied: bool = True) -> tuple[Qwen3ForCausalLM, TextEncoder]:
    fields = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
    values = {name: getattr(config, name) for name in (*fields, "head_dim", "rms_norm_eps")}
    values |= {"num_hidden_layers": LAYERS, "max_position_embeddings": 512, "tie_word_embeddings": tied}
    source = Qwen3Config(**values, rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta})
    reference = randomize(Qwen3ForCausalLM(source), dtype=dtype)
    return reference, transfer(reference, TextEncoder(config), "text_encoder", config)


def token_ids(*real: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids with `real` tokens in each row, padded on the right, and their mask."""
    ids = np.random.default_rng(0).integers(0, TINY.vocab_size - 1, (len(real), LENGTH), dtype=np.int32)
    mask = np.arange(LENGTH) < np.array(real)[:, None]
    return np.where(mask, ids, TINY.vocab_size - 1).astype(np.int32), mask


def run_reference(reference: Qwen3ForCausalLM, ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    out = reference(torch.tensor(ids), torch.tensor(mask, dtype=torch.long), output_hidden_states=True, use_cache=False)
    return torch.cat([out.hidden_states[k] for k in TINY.out_layers], dim=-1)


@pytest.mark.parametrize("real", [(LENGTH,), (1,), (12,), (LENGTH, 5), (7, 13, 3)], ids=str)
def test_hidden_states(real):
    reference, ours = networks(TINY)
    ids, mask = token_ids(*real)
    expected, got = run_reference(reference, ids, mask), ours(mx.array(ids), mx.array(mask))
    assert got.shape == (len(real), LENGTH, TINY.output_size)
    assert relative_error(got, expected) <= NETWORK
    for start in range(0, TINY.output_size, TINY.hidden_size):
        state = slice(start, start + TINY.hidden_size)
        assert relative_error(got[..., state], expected[..., state]) <= NETWORK


def test_the_mask_shapes_the_states_of_padding():
    _, ours = networks(TINY)
    ids, mask = token_ids(5)
    masked, unmasked = (np.array(ours(mx.array(ids), mx.array(m))) for m in (mask, np.ones_like(mask)))
    np.testing.assert_allclose(masked[:, :5], unmasked[:, :5], rtol=1e-4, atol=1e-5)
    assert relative_error(masked[:, 5:], unmasked[:, 5:]) > 0.01


def test_an_untied_head_is_dropped():
    reference, ours = networks(TINY, tied=False)
    ids, mask = token_ids(12)
    assert relative_error(ours(mx.array(ids), mx.array(mask)), run_reference(reference, ids, mask)) <= NETWORK


def test_bfloat16():
    reference, ours = networks(TINY, torch.bfloat16)
    ids, mask = token_ids(LENGTH, 6)
    exact = run_reference(reference, ids, mask)
    theirs = relative_error(run_reference(reference.bfloat16(), ids, mask), exact)
    ours.set_dtype(mx.bfloat16)
    got = ours(mx.array(ids), mx.array(mask))
    assert got.dtype == mx.bfloat16
    assert relative_error(got, exact) <= 1.2 * theirs  # measured: 0.95


def test_prompts_match_the_pipeline(qwen3_tokenizer_file: Path):
    reference, ours = networks(REAL_VOCABULARY)
    prompts = ["A cat holding a sign that says hello world", "", "一只猫 🐈 " * 200]
    expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        reference, AutoTokenizer.from_pretrained(qwen3_tokenizer_file.parent), prompts
    )
    ids, mask = KleinTokenizer(qwen3_tokenizer_file)(prompts, 512)
    assert mask.sum(axis=1).tolist() == [21, 12, 512]
    assert relative_error(ours(mx.array(ids), mx.array(mask)), expected) <= NETWORK
