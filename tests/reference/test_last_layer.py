"""Text encoders with no layer more than is needed, whose last state transformers gives after the final norm."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from flux2_mlx.convert import Source
from helpers.checkpoints import DEV_TEXT, TEXT, VARIANT, convert, edit_json
from helpers.parity import NETWORK, randomize, relative_error
from helpers.references import make_dev_source, save_small
from transformers import Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from flux2_mlx.checkpoint import Checkpoint
from flux2_mlx.errors import CheckpointError
from flux2_mlx.streaming import Reading, load_streamed

LENGTH = 16
CONFIG = "text_encoder/config.json"


def make_klein(folder: Path) -> None:
    save_small(folder)
    fields = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
    values = {name: getattr(TEXT, name) for name in (*fields, "head_dim", "num_hidden_layers", "rms_norm_eps")}
    rope = {"rope_type": "default", "rope_theta": TEXT.rope_theta}
    model = Qwen3ForCausalLM(Qwen3Config(**values, rope_parameters=rope, tie_word_embeddings=True))
    randomize(model, 1, torch.bfloat16).save_pretrained(folder / "text_encoder")


def make_dev(folder: Path) -> None:
    make_dev_source(folder, text=replace(DEV_TEXT, num_later_layers=0))


FAMILIES: dict[str, tuple[Callable[[Path], None], type, tuple[int, ...]]] = {
    VARIANT: (make_klein, Qwen3ForCausalLM, TEXT.out_layers),
    "dev": (make_dev, Mistral3ForConditionalGeneration, DEV_TEXT.out_layers),
}


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "official"
    FAMILIES[request.param][0](folder)
    return request.param, folder


def set_tie(folder: Path, value: Any) -> None:
    """State whether the last state is to be the normed one, in the section that transformers reads."""
    text = json.loads((folder / CONFIG).read_text())
    inner = text.get("text_config", text)
    inner["tie_last_hidden_states"] = value
    edit_json(folder / CONFIG, **text)


def token_ids(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(20, vocab_size - 10, (2, LENGTH), dtype=np.int32)
    return ids, np.arange(LENGTH) < np.array([[LENGTH], [9]])


@torch.no_grad()
def reference_states(family: str, folder: Path, ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    _, kind, out_layers = FAMILIES[family]
    model = kind.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask, dtype=torch.long)}
    states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == max(out_layers) + 1
    return torch.cat([states[k] for k in out_layers], dim=-1)


@pytest.mark.parametrize(("tie", "normed"), [(None, True), (True, True), (False, False)])
def test_the_last_state_is_that_of_transformers(tie, normed, source, tmp_path):
    family, folder = source
    set_tie(folder, tie)
    checkpoint = Checkpoint.open(convert(folder, tmp_path / "converted", variant=family))
    encoder = checkpoint.components["text_encoder"]
    assert encoder.config.final_norm is normed
    assert "language_model" not in checkpoint.components
    ids, mask = token_ids(encoder.config.vocab_size)
    expected = reference_states(family, folder, ids, mask)
    got = encoder.load(mx.float32)(mx.array(ids), mx.array(mask))
    for start in range(0, got.shape[-1], encoder.config.hidden_size):
        state = slice(start, start + encoder.config.hidden_size)
        assert relative_error(np.array(got[..., state])[mask], expected[..., state].numpy()[mask]) <= NETWORK
    streamed = load_streamed(encoder, mx.float32, 2, Reading())
    assert mx.array_equal(got, streamed(mx.array(ids), mx.array(mask)))


def test_other_depths_have_no_final_norm(tmp_path):
    folder = save_small(tmp_path / "official")
    assert not Source.open(folder, VARIANT).configs["text_encoder"].final_norm
    set_tie(folder, True)
    assert not Source.open(folder, VARIANT).configs["text_encoder"].final_norm


def test_a_final_norm_that_is_missing_is_named(source, tmp_path):
    family, folder = source
    set_tie(folder, None)
    path = folder / "text_encoder/model.safetensors"
    before = path.read_bytes()
    data = before.replace(b'model.norm.weight"', b'model.n0rm.weight"', 1)
    path.write_bytes(data)
    try:
        with pytest.raises(CheckpointError, match=r"is not a .* text_encoder: missing \S*model\.norm\.weight"):
            convert(folder, tmp_path / "converted", variant=family)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("value", ["no", [], 2])
def test_nonsense_is_refused(value, source):
    family, folder = source
    set_tie(folder, value)
    with pytest.raises(CheckpointError, match=r"tie_last_hidden_states is .*, FLUX\.2 has True"):
        Source.open(folder, family)
    set_tie(folder, None)
